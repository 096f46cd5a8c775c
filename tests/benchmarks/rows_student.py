"""A distillation step: what it waits for, what it costs beyond its pieces, and where its time goes.

Legend: N points, P pairs, V voxels.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bench import Bench
from harness import RUNS, Measured, at_most, row, seconds
from torch import Tensor, nn

from clip2scene.geometry.interpolation import bilinear
from clip2scene.geometry.pairing import pair
from clip2scene.losses.scr import semantic_consistency
from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency
from clip2scene.segments import segment_mean
from clip2scene.storage import Storage
from clip2scene.student.network import Student
from clip2scene.student.voxels import rows_of_points, voxelise
from clip2scene.teacher.store import FeatureStore
from clip2scene.training.distill import Distillation
from clip2scene.training.fit import Training
from clip2scene.training.launch import Worker
from clip2scene.training.samples import Sample, SampleSource, augment, join

CLASSES = 16
BATCH = 2
"""Keyframes a worker: the demo's four on two workers."""


def distillation(bench: Bench, **resources: Any) -> Distillation:
    """The demo's pre-training on :attr:`Bench.world`, with random class embeddings."""
    features = FeatureStore.open(bench.store_path, Storage(bench.store_path))
    text_CD = torch.randn(CLASSES, features.dim, generator=torch.Generator().manual_seed(0))
    job = bench.job
    return Distillation(
        seed=0,
        frames=tuple(frame for frame in bench.world.frames if frame.sweeps),
        source=SampleSource(bench.world.root, features, job.distill.num_sweeps, job.distill.sweep_window_s),
        resources=job.resources.model_copy(update=resources),
        student=job.student,
        settings=job.distill.model_copy(update={"batch_size": BATCH}),
        text_CD=nn.functional.normalize(text_CD, dim=1),
    )


def batch_of(training: Training) -> Sample:
    """The first keyframes as one batch."""
    return join([training.source.read(frame) for frame in training.frames[:BATCH]])


class _Timed(Distillation):
    """Keeps how long every step waits for its batch."""

    def _batches(self, *given: Any) -> Iterator[Sample]:
        batches = super()._batches(*given)
        while True:
            started = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            now = time.perf_counter()
            self.waits.append((now, now - started))
            yield batch


@row(
    "step-waiting",
    "distillation step, share of time waiting for data",
    baseline="none: the share itself",
    goal=at_most(0.05),
    compare="ours",
)
def step_waiting(bench: Bench) -> Measured:
    torch.set_num_threads(1)
    training = distillation(bench, num_workers=0, cached_frames=0)
    epochs = RUNS + 1
    settings = training.settings.model_copy(update={"epochs": epochs})
    timed = _Timed(**{**vars(training), "settings": settings})
    waits: list[tuple[float, float]] = []
    object.__setattr__(timed, "waits", waits)
    timed(Worker(bench.folder / "waiting", lambda kind, value: None))
    per_epoch = timed.steps_per_epoch
    shares = []
    for epoch in range(1, epochs):
        now = waits[epoch * per_epoch : (epoch + 1) * per_epoch]
        begun = now[0][0] - now[0][1]
        shares.append(sum(wait for _, wait in now[1:]) / (now[-1][0] - begun))
    sweeps = training.source.num_sweeps
    work = f"{per_epoch} steps of {BATCH} keyframes an epoch, K = {sweeps}, no keyframe cached, one thread"
    return Measured(work, shares, unit="", limit="a keyframe that is cached (resources.cached_frames) costs no reading")


def _features_of(model: Student, batch: Sample) -> tuple[list[tuple[str, nn.Module, Any]], dict[str, Tensor]]:
    """Inputs of the network's blocks in one forward pass, and the outputs of its heads."""
    seen: list[tuple[str, nn.Module, Any]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.append((name, module, [_copy(value) for value in given]))

        return hook

    backbone = model.backbone
    groups = {"convolve": [*backbone.stem, *backbone.encoders, *backbone.decoders], "heads": [*model.heads.values()]}
    groups["points"] = [m for m in backbone.children() if isinstance(m, nn.Sequential)]
    hooks = [m.register_forward_pre_hook(keep(name)) for name, modules in groups.items() for m in modules]
    heads = model(batch.points_NI, batch.cloud_N, batch.pair_point_P)
    for hook in hooks:
        hook.remove()
    return seen, {name: value.detach() for name, value in heads.items()}


def _copy(value: Any) -> Any:
    """A leaf with the same values; of a sparse tensor, with the neighbour tables that it had at that moment."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    copied = value.replace_feature(value.features.detach().requires_grad_())
    copied.indice_dict = dict(value.indice_dict)
    return copied


def _forward_backward(run: Callable[[], Any]) -> None:
    out = run()
    out = out if isinstance(out, Tensor) else out.features
    out.backward(torch.ones_like(out))


def _pieces(training: Distillation, model: Student, batch: Sample) -> dict[str, list[Callable[[], Any]]]:
    """What a step consists of, each piece on inputs of its own."""
    seen, heads = _features_of(model, batch)
    backbone, scr_PD, stcr_PD = model.backbone, heads["scr"], heads["stcr"]
    levels, size = backbone.layout.levels, training.student.voxel_size_m

    def voxels() -> Any:
        return voxelise(batch.points_NI[:, :3], batch.cloud_N, size, 2**levels)

    made = voxels()
    pieces: dict[str, list[Callable[[], Any]]] = {"voxelise": [voxels]}
    for name, module, given in seen:
        again = functools.partial(lambda module, given: module(*[_copy(value) for value in given]), module, given)
        pieces.setdefault(name, []).append(functools.partial(_forward_backward, again))
    pieces["devoxelise"] = _devoxelise(backbone, made, seen, batch)

    def pixels() -> Tensor:
        return nn.functional.normalize(
            bilinear(batch.features_MhwD, batch.pair_image_P, batch.pair_position_P2).float(), dim=1
        )

    pixels_PD, text_CD, distill = pixels(), training.text_CD, training.settings

    def losses() -> Tensor:
        points = [rows.clone().requires_grad_() for rows in (scr_PD, stcr_PD)]
        scr, stcr = (nn.functional.normalize(rows, dim=1) for rows in points)
        with torch.no_grad():
            read_PD = pixels()
            labels_P = (read_PD @ text_CD.T).argmax(1)
            (scr @ text_CD.T).argmax(1)
        cells_P = grid_cells(batch.pair_xyz_P3, batch.pair_frame_P, distill.stcr.grid_size_m)
        return semantic_consistency(scr, labels_P, text_CD, distill.scr.tau) + spatial_temporal_consistency(
            stcr, read_PD, labels_P, cells_P, text_CD, distill.stcr.lambda_
        )

    assert len(pixels_PD) == len(batch.pair_point_P)
    pieces["losses"] = [lambda: losses().backward()]
    return pieces


def _devoxelise(backbone: Any, voxels: Any, seen: list[Any], batch: Sample) -> list[Callable[[], Any]]:
    """Rows of points on every level where points and voxels meet, voxel to point, and the mean of points back."""
    levels = backbone.layout.levels
    sparse = {id(module): given[0] for name, module, given in seen if name == "convolve"}
    meetings = []
    for join_ in [j for j in backbone.layout.fusions if j < levels]:
        meetings.append((sparse[id(backbone.decoders[join_])], 2 ** (levels - join_)))
    work: list[Callable[[], Any]] = []
    for x, stride in meetings:
        rows_N = rows_of_points(voxels, x.indices, stride)
        work.append(functools.partial(rows_of_points, voxels, x.indices, stride))
        work.append(functools.partial(_there_and_back, x.features.detach(), rows_N))
    first = next(given[0] for name, _, given in seen if name == "convolve")
    rows_N, num_voxels = voxels.voxel_of_point_N, len(voxels.coordinates_V4)
    work.append(lambda: segment_mean(batch.points_NI, rows_N, num_voxels))
    stem = backbone.stem[-1].norm.num_features
    work.append(functools.partial(_there_and_back, torch.randn(len(first.features), stem), rows_N))
    last_VF = torch.randn(num_voxels, backbone.width)

    def asked() -> Tensor:
        leaf_VF = last_VF.clone().requires_grad_()
        return leaf_VF.index_select(0, rows_N).index_select(0, batch.pair_point_P)

    work.append(functools.partial(_forward_backward, asked))
    return work


def _there_and_back(features_VD: Tensor, rows_N: Tensor) -> None:
    leaf_VD = features_VD.clone().requires_grad_()
    _forward_backward(lambda: segment_mean(leaf_VD.index_select(0, rows_N), rows_N, len(features_VD)))


@row(
    "step-overhead",
    "student step, forward and backward",
    baseline="its pieces measured alone: voxelise, convolve, devoxelise, point layers, heads, losses",
    goal=at_most(1.1),
    compare="ours / baseline",
)
def step_overhead(bench: Bench) -> Measured:
    torch.set_num_threads(1)
    training = distillation(bench, num_workers=0)
    torch.manual_seed(0)
    model = training.build()
    batch = batch_of(training)
    pieces = _pieces(training, model, batch)

    def whole() -> None:
        model.zero_grad(set_to_none=True)
        training.loss(model, batch, 0, 0)["loss"].backward()

    ours, baseline, parts = [], [], []
    whole()
    for _ in range(RUNS + 1):
        ours.append(seconds(whole))
        parts.append({name: sum(seconds(work) for work in works) for name, works in pieces.items()})
        baseline.append(sum(parts[-1].values()))
    shares = ", ".join(f"{name} {1e3 * statistics.median(p[name] for p in parts):.0f} ms" for name in pieces)
    work = f"{len(batch.points_NI)} points, {len(batch.pair_point_P)} pairs, the demo's network, one thread"
    return Measured(work, ours[1:], baseline[1:], limit=shares)


def profile(bench: Bench) -> list[tuple[str, float, float]]:
    """Part, milliseconds and share of one distillation step on one thread, medians of five; nothing is cached."""
    torch.set_num_threads(1)
    training = distillation(bench, num_workers=0, cached_frames=0)
    torch.manual_seed(0)
    model = training.build()
    assert isinstance(model, Student)
    optimiser = torch.optim.AdamW(model.parameters())
    runs = [_profiled(training, model, optimiser, step) for step in range(RUNS + 1)][1:]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    whole = sum(medians.values())
    return [(name, 1e3 * took, took / whole) for name, took in medians.items()]


def _profiled(training: Distillation, model: Student, optimiser: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """Seconds by part of a step that is put together here from the same calls."""
    from clip2scene.data.clouds import read_cloud

    frames = [training.frames[(step * BATCH + i) % len(training.frames)] for i in range(BATCH)]
    source, took = training.source, dict[str, float]()
    samples: list[Sample] = []
    reading = seconds(lambda: samples.extend(source.read(frame) for frame in frames))
    chosen = [(path, pose, frame) for frame in frames for path, pose in source._sweeps(frame, None)]
    clouds = [(read_cloud(source.root.path_of(path))[:, :3], pose, frame) for path, pose, frame in chosen]
    took["pair"] = seconds(lambda: [pair(points, pose, frame.cameras) for points, pose, frame in clouds])
    took["read"] = reading - took["pair"]
    rng, batches = np.random.default_rng(step), list[Sample]()
    took["augment, join"] = seconds(
        lambda: batches.append(join([augment(sample, training.settings.augment, rng) for sample in samples]))
    )
    batch, terms = batches[0], dict[str, Tensor]()
    alignment = 2**model.backbone.layout.levels
    took["voxelise"] = seconds(
        lambda: voxelise(batch.points_NI[:, :3], batch.cloud_N, training.student.voxel_size_m, alignment)
    )
    stamps: list[float] = []
    hooks = (
        model.register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter())),
        model.register_forward_hook(lambda *_: stamps.append(time.perf_counter())),
    )
    whole = seconds(lambda: terms.update(training.loss(model, batch, 0, step)))
    for hook in hooks:
        hook.remove()
    network = stamps[1] - stamps[0]
    took["convolve, forward (with devoxelise, heads)"] = network - took["voxelise"]
    took["losses, forward"] = whole - network
    optimiser.zero_grad(set_to_none=True)
    took["backward"] = seconds(lambda: terms["loss"].backward())
    took["optimiser"] = seconds(optimiser.step)
    return took
