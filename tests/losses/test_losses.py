"""The losses against plain float64 loops written from the paper's equations."""

from __future__ import annotations

import math

import pytest
import torch

from clip2scene.config import S3Settings
from clip2scene.losses.scr import semantic_consistency
from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency
from clip2scene.losses.switching import switch_labels


def scr_loop(points, labels, text, tau):
    total = 0.0
    for c in range(len(text)):
        positive = [math.exp(float(text[c] @ p) / tau) for p, label in zip(points, labels, strict=True) if label == c]
        negative = [math.exp(float(text[c] @ p) / tau) for p, label in zip(points, labels, strict=True) if label != c]
        if positive and negative:
            total -= math.log(sum(positive) / sum(negative))
    return total


def stcr_loop(points, pixels, labels, cells, text, lambda_):
    total, distinct = 0.0, sorted(set(cells.tolist()))
    for cell in distinct:
        members = [i for i in range(len(cells)) if cells[i] == cell]
        a = {i: math.exp(float(pixels[i] @ text[labels[i]]) / lambda_) for i in members}
        b = {i: math.exp(float(points[i] @ text[labels[i]]) / lambda_) for i in members}
        z = sum(a.values()) + sum(b.values())
        fused = sum(a[i] / z * pixels[i] + b[i] / z * points[i] for i in members)
        total += sum(1 - 1 / (1 + math.exp(-float(points[i] @ fused))) for i in members)
    return total / len(distinct)


def random_input(seed, n=60, classes=5, width=7, cells=20, present=None):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, present or classes, (n,), generator=g)
    return (
        draw(n, width),
        draw(n, width),
        labels,
        torch.randint(0, cells, (n,), generator=g) * 7 + 3,
        draw(classes, width),
    )


@pytest.mark.parametrize(("n", "present", "cells"), [(60, None, 20), (60, 3, 60), (60, 1, 4), (1, None, 1), (40, 2, 1)])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 1.0])
def test_losses_equal_their_definition(n, present, cells, temperature):
    points, pixels, labels, ids, text = random_input(n + cells, n=n, present=present, cells=cells)
    scr = float(semantic_consistency(points, labels, text, temperature))
    assert scr == pytest.approx(scr_loop(points, labels, text, temperature), rel=1e-9, abs=1e-12)
    stcr = float(spatial_temporal_consistency(points, pixels, labels, ids, text, temperature))
    assert stcr == pytest.approx(stcr_loop(points, pixels, labels, ids, text, temperature), rel=1e-9)


def test_gradients_and_order():
    points, pixels, labels, cells, text = random_input(3, n=12, cells=4)
    points.requires_grad_()
    pixels.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: semantic_consistency(p, labels, text, 0.5), points)
    assert torch.autograd.gradcheck(
        lambda p, x: spatial_temporal_consistency(p, x, labels, cells, text, 1.0), (points, pixels)
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        semantic_consistency(points, labels, text), semantic_consistency(points[order], labels[order], text)
    )
    torch.testing.assert_close(
        spatial_temporal_consistency(points, pixels, labels, cells, text),
        spatial_temporal_consistency(points[order], pixels[order], labels[order], cells[order], text),
    )


def test_half_precision_features_do_not_overflow():
    points, pixels, labels, cells, text = (t.half() * 30 if t.is_floating_point() else t for t in random_input(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(semantic_consistency(points, labels, text, 0.01))
        assert torch.isfinite(spatial_temporal_consistency(points, pixels, labels, cells, text, 0.01))


def test_no_pairs_give_zero_with_a_gradient():
    points = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = semantic_consistency(points, none, torch.ones(3, 4)) + spatial_temporal_consistency(
        points, points, none, none, torch.ones(3, 4)
    )
    loss.backward()
    assert float(loss.detach()) == 0


def test_grid_cells_share_an_id_only_within_a_cube_of_one_frame():
    xyz = torch.tensor([[0.1, 0.1, 0.1], [0.4, 0.4, 0.4], [0.6, 0.1, 0.1], [-0.1, 0.1, 0.1], [0.1, 0.1, 0.1]])
    cells = grid_cells(xyz, torch.tensor([0, 0, 0, 0, 1]), 0.5)
    assert cells[0] == cells[1]
    assert len(set(cells.tolist())) == 4


@pytest.mark.parametrize("granularity", ["point", "batch"])
def test_switch_is_seeded_and_starts_late(granularity):
    settings = S3Settings(start_epoch=10, probability=0.5, granularity=granularity)
    pixel, own = torch.zeros(4000, dtype=torch.long), torch.ones(4000, dtype=torch.long)

    def switched(epoch, seed):
        return switch_labels(pixel, own, settings, epoch, torch.Generator().manual_seed(seed))

    assert not switched(9, 0).any()
    assert torch.equal(switched(10, 1), switched(10, 1))
    share = switched(10, 1).double().mean()
    if granularity == "point":
        assert 0.45 < share < 0.55
    else:
        assert share in (0, 1)
        assert {float(switched(10, s).double().mean()) for s in range(20)} == {0.0, 1.0}
