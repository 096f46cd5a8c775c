"""The baselines' losses against loops: KL, cosine, InfoNCE, superpixel means."""

from __future__ import annotations

import definitions
import pytest
import torch
from definitions import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2scene.losses.contrast import info_nce, superpixel_means
from clip2scene.losses.distances import class_divergence, cosine_distance

LOSSES = {
    "divergence": lambda points, it: class_divergence(points, it.pixels, it.text, 0.5),
    "cosine": lambda points, it: cosine_distance(points, it.pixels),
    "info_nce": lambda points, it: info_nce(points, it.pixels, 0.5),
    "superpixel": lambda points, it: info_nce(*superpixel_means(points, it.pixels, it.labels - 1), 0.5),
}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 30),
    classes=st.integers(1, 8),
    temperature=st.sampled_from([0.07, 0.5, 1.0]),
)
def test_losses_equal_their_definition(seed, n, classes, temperature):
    it = draw(seed, n=n, classes=classes)
    for value, expected in (
        (
            class_divergence(it.points, it.pixels, it.text, temperature),
            definitions.divergence(it.points, it.pixels, it.text, temperature),
        ),
        (cosine_distance(it.points, it.pixels), definitions.cosine(it.points, it.pixels)),
        (info_nce(it.points, it.pixels, temperature), definitions.info_nce(it.points, it.pixels, temperature)),
    ):
        assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_superpixel_means_leave_out_what_has_no_superpixel():
    it = draw(1, n=40)
    segments = torch.randint(-1, 12, (40,), generator=torch.Generator().manual_seed(2)) * 5
    segments[segments < 0] = -1
    for mean, expected in zip(
        superpixel_means(it.points, it.pixels, segments),
        definitions.superpixel_means(it.points, it.pixels, segments),
        strict=True,
    ):
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_order(name):
    it, loss = draw(3, n=14), LOSSES[name]
    points = it.points.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, it), points)
    other = it.permuted()
    torch.testing.assert_close(loss(it.points, it), loss(other.points, other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("factor", "dtype"), [(65504, torch.float16), (1e4, torch.bfloat16)])
def test_half_precision_does_not_overflow(name, factor, dtype):
    it = draw(5).scaled(factor, dtype)
    points = it.points.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name](points, it)
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_give_zero_with_a_gradient(name):
    it = draw(0, n=0)
    points = it.points.requires_grad_()
    loss = LOSSES[name](points, it)
    loss.backward()
    assert float(loss.detach()) == 0
