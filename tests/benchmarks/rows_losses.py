"""StCR and SCR against plain loops, forward and backward, on the cells of real sweeps.

Legend: N pairs, C classes, D feature width, G cells, M slots of a cell.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import torch
from bench import Bench, median_ms
from harness import Measured, at_least, paired, row, seconds
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import profile

from clip2scene.losses.scr import semantic_consistency
from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency

PAIRS, CLASSES, WIDTH, SLOTS = 100_000, 16, 512, 8
GRID_M, TAU = 0.5, 0.5


@dataclass(frozen=True)
class Input:
    points_ND: Tensor
    pixels_ND: Tensor
    text_CD: Tensor
    labels_N: Tensor
    cells_N: Tensor

    @property
    def about(self) -> str:
        counts_G = torch.bincount(self.cells_N)
        return f"{len(self.cells_N)} pairs x {WIDTH} in {len(counts_G)} cells, {torch.get_num_threads()} threads"


@functools.cache
def _input(bench: Bench) -> Input:
    """Random features at the pairs of two nuScenes-like keyframes with K = 3 sweeps."""
    from rows_data import pairs_of_keyframe

    torch.set_num_threads(bench.cores)
    generator = torch.Generator().manual_seed(0)
    frames = [frame for frame in bench.dense_world.frames if len(frame.sweeps) >= 9]
    xyz, keyframe = [], []
    for number, frame in enumerate(frames):
        for points_N3, pairs in pairs_of_keyframe(bench.dense_world, frame):
            xyz.append(torch.from_numpy(points_N3[pairs.point_P]))
            keyframe.append(torch.full((len(pairs),), number))
    xyz_P3, keyframe_P = torch.cat(xyz), torch.cat(keyframe)
    chosen = torch.randperm(len(xyz_P3), generator=generator)[: bench.pick(PAIRS // 5, PAIRS)]
    count = len(chosen)
    return Input(
        normalize(torch.randn(count, WIDTH, generator=generator), dim=1).requires_grad_(),
        normalize(torch.randn(count, WIDTH, generator=generator), dim=1),
        normalize(torch.randn(CLASSES, WIDTH, generator=generator), dim=1),
        torch.randint(0, CLASSES, (count,), generator=generator),
        # Numbered through, which ours does not need and the baselines do.
        torch.unique(grid_cells(xyz_P3[chosen], keyframe_P[chosen], GRID_M), return_inverse=True)[1],
    )


def _backward(loss: Tensor, given: Input) -> float:
    given.points_ND.grad = None
    loss.backward()
    return float(loss.detach())


def _stcr(given: Input) -> float:
    loss = spatial_temporal_consistency(
        given.points_ND, given.pixels_ND, given.labels_N, given.cells_N, given.text_CD, lambda_=1.0
    )
    return _backward(loss, given)


def _stcr_loop(given: Input) -> float:
    """Equations 2 to 4 cell by cell; the rows of a cell are views, so that no gradient is scattered row by row."""
    order_N = torch.argsort(given.cells_N, stable=True)
    sizes = torch.bincount(given.cells_N).tolist()
    text_ND = given.text_CD[given.labels_N]
    total = given.points_ND.new_zeros(())
    split = (rows_ND[order_N].split(sizes) for rows_ND in (given.points_ND, given.pixels_ND, text_ND))
    for points_MD, pixels_MD, text_MD in zip(*split, strict=True):
        scores = torch.cat(((pixels_MD * text_MD).sum(1), (points_MD * text_MD).sum(1)))
        fused_D = scores.softmax(0) @ torch.cat((pixels_MD, points_MD))
        total = total + torch.sigmoid(-(points_MD @ fused_D)).sum()
    return _backward(total / len(sizes), given)


def _stcr_padded(given: Input) -> float:
    """The released code's way: the first eight pairs of every cell in a padded (G, 8, D) pack."""
    order_N = torch.argsort(given.cells_N, stable=True)
    counts_G = torch.bincount(given.cells_N)
    cells_N = given.cells_N[order_N]
    rank_N = torch.arange(len(order_N)) - (counts_G.cumsum(0) - counts_G)[cells_N]
    kept_N = rank_N < SLOTS
    rows_GM = torch.full((len(counts_G), SLOTS), -1)
    rows_GM[cells_N[kept_N], rank_N[kept_N]] = order_N[kept_N]
    used_GM, rows_GM = rows_GM >= 0, rows_GM.clamp(min=0)
    points_GMD, pixels_GMD = given.points_ND[rows_GM], given.pixels_ND[rows_GM]
    text_GMD = given.text_CD[given.labels_N[rows_GM]]
    scores = [(rows * text_GMD).sum(-1).masked_fill(~used_GM, -torch.inf) for rows in (pixels_GMD, points_GMD)]
    weights = torch.cat(scores, dim=1).softmax(1)[..., None]
    fused_GD = (weights * torch.cat((pixels_GMD, points_GMD), dim=1)).sum(1)
    agreement_GM = (points_GMD * fused_GD[:, None]).sum(-1)
    return _backward((torch.sigmoid(-agreement_GM) * used_GM).sum() / len(counts_G), given)


def _stcr_limit(bench: Bench, given: Input, ours: list[float]) -> str:
    # Points and pixels are read from memory once and one gradient is written; five scalar products and three sums a row
    # then read the block in the cache.
    floor = bench.moved(3 * given.points_ND.nbytes)
    with profile() as profiled:
        _stcr(given)
    parts = sorted(profiled.key_averages(), key=lambda part: -part.self_cpu_time_total)
    whole = sum(part.self_cpu_time_total for part in parts)
    shares = ", ".join(
        f"{part.key.removeprefix('aten::')} {part.self_cpu_time_total / whole:.0%}" for part in parts[:6]
    )
    return f"{floor} on one thread for what must be read and written; ours takes {median_ms(ours)}: {shares}, others"


@row(
    "stcr-loop",
    "StCR forward + backward",
    baseline="the equations cell by cell (PyTorch, rows of a cell as views)",
    goal=at_least(100),
    compare="baseline / ours",
)
def stcr_against_loop(bench: Bench) -> Measured:
    given = _input(bench)
    mine, plain = _stcr(given), _stcr_loop(given)
    assert abs(mine - plain) < 1e-4 * abs(plain), (mine, plain)
    ours, baseline = paired(lambda: _stcr(given), lambda: _stcr_loop(given), warm=False)
    return Measured(given.about, ours, baseline, limit=_stcr_limit(bench, given, ours))


@row(
    "stcr-padded",
    "StCR forward + backward, no pair dropped",
    baseline="padded pack of the first 8 pairs of a cell (PyTorch)",
    goal=at_least(10),
    compare="baseline / ours",
)
def stcr_against_padded(bench: Bench) -> Measured:
    given = _input(bench)
    ours, baseline = paired(lambda: _stcr(given), lambda: _stcr_padded(given))
    counts_G = torch.bincount(given.cells_N)
    dropped = float((counts_G - SLOTS).clamp(min=0).sum() / counts_G.sum())
    limit = f"the pack drops {100 * dropped:.0f}% of the pairs; {_stcr_limit(bench, given, ours)}"
    return Measured(given.about, ours, baseline, limit=limit)


def _scr_loop(given: Input) -> float:
    """Equation 1 point by point, all classes of a point at once."""
    positive: list[list[Tensor]] = [[] for _ in range(CLASSES)]
    negative_C = given.text_CD.new_zeros(CLASSES)
    everything = torch.ones(CLASSES)
    scaled_DC = given.text_CD.T / TAU
    for point_D, label in zip(given.points_ND.unbind(0), given.labels_N.tolist(), strict=True):
        exponentials_C = torch.exp(point_D @ scaled_DC)
        positive[label].append(exponentials_C[label])
        others_C = everything.clone()
        others_C[label] = 0
        negative_C = negative_C + exponentials_C * others_C
    positive_C = torch.stack([torch.stack(values).sum() for values in positive])
    return _backward((negative_C.log() - positive_C.log()).sum(), given)


def _scr_by_class(given: Input) -> float:
    logits_NC = given.points_ND @ given.text_CD.T / TAU
    terms = []
    for label in range(CLASSES):
        own_N = given.labels_N == label
        terms.append(logits_NC[~own_N, label].exp().sum().log() - logits_NC[own_N, label].exp().sum().log())
    return _backward(torch.stack(terms).sum(), given)


def _scr(given: Input) -> float:
    return _backward(semantic_consistency(given.points_ND, given.labels_N, given.text_CD, TAU), given)


@row(
    "scr-loop",
    "SCR forward + backward",
    baseline="equation 1 point by point (PyTorch, the classes of a point at once)",
    goal=at_least(50),
    compare="baseline / ours",
)
def scr_against_loop(bench: Bench) -> Measured:
    given = _input(bench)
    mine, plain = _scr(given), _scr_loop(given)
    assert abs(mine - plain) < 1e-3 * abs(plain), (mine, plain)
    ours, baseline = paired(lambda: _scr(given), lambda: _scr_loop(given), warm=False)
    by_class = statistics.median(seconds(lambda: _scr_by_class(given)) for _ in range(5))
    took = statistics.median(ours)
    work = f"{len(given.labels_N)} points x {WIDTH}, {CLASSES} classes, {torch.get_num_threads()} threads"
    # The features are read by both matrix products and their gradient is written.
    floor = bench.moved(2 * given.points_ND.nbytes)
    return Measured(work, ours, baseline, limit=f"{floor}; a loop over classes takes {by_class / took:.1f}x ours")
