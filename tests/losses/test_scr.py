"""SCR, as in the paper and as released, against loops."""

from __future__ import annotations

import functools

import definitions
import pytest
import torch
from definitions import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2scene.losses.scr import semantic_consistency, text_cross_entropy


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    classes=st.integers(1, 8),
    present=st.integers(1, 8),
    tau=st.sampled_from([0.07, 0.5, 1.0]),
)
def test_both_forms_equal_their_definition(seed, n, classes, present, tau):
    it = draw(seed, n=n, classes=classes, present=min(present, classes))
    value = float(semantic_consistency(it.points, it.labels, it.text, tau))
    # tau = 0.07 gives terms of +-100 that cancel, so that the error is relative to the terms.
    assert value == pytest.approx(definitions.scr(it.points, it.labels, it.text, tau), rel=1e-9, abs=1e-11)
    released = float(text_cross_entropy(it.points, it.labels, it.text))
    assert released == pytest.approx(definitions.cross_entropy(it.points, it.labels, it.text), rel=1e-9, abs=1e-12)


def test_one_class_only_has_no_negatives():
    it = draw(0, present=1)
    points = it.points.requires_grad_()
    loss = semantic_consistency(points, it.labels, it.text, 0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not points.grad.any()


def test_gradients():
    it = draw(3, n=12)
    points, text = it.points.requires_grad_(), it.text.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: semantic_consistency(p, it.labels, t, 0.5), (points, text))
    assert torch.autograd.gradcheck(lambda p, t: text_cross_entropy(p, it.labels, t), (points, text))


def test_order_of_points_does_not_matter():
    it = draw(4)
    other = it.permuted()
    for loss in (functools.partial(semantic_consistency, tau=0.5), text_cross_entropy):
        torch.testing.assert_close(
            loss(it.points, it.labels, it.text), loss(other.points, other.labels, other.text), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("factor", "dtype"), [(65504, torch.float16), (1e4, torch.bfloat16)])
def test_half_precision_does_not_overflow(factor, dtype):
    it = draw(5).scaled(factor, dtype)
    points = it.points.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = semantic_consistency(points, it.labels, it.text, 0.01) + text_cross_entropy(points, it.labels, it.text)
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for_and_says_the_same():
    it = draw(6)
    points, labels, text = it.points.cuda().requires_grad_(), it.labels.cuda(), it.text.cuda()
    semantic_consistency(points, labels, text, 0.5)  # what a first call loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = semantic_consistency(points, labels, text, 0.5)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(loss) == pytest.approx(float(semantic_consistency(it.points, it.labels, it.text, 0.5)), rel=1e-9)
