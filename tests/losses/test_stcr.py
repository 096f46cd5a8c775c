"""StCR and its switches against loops."""

from __future__ import annotations

import definitions
import pytest
import torch
from definitions import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency

SWITCHES = st.fixed_dictionaries(
    {
        "pixel_term": st.booleans(),
        "cell_text": st.sampled_from(["point", "first"]),
        "max_points_per_cell": st.sampled_from([None, 1, 2, 8]),
    }
)
RELEASED = {"pixel_term": False, "cell_text": "first", "max_points_per_cell": 8, "count_empty_slots": True}


def stcr(it, lambda_=1.0, **switches):
    return spatial_temporal_consistency(it.points, it.pixels, it.labels, it.cells, it.text, lambda_, **switches)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    classes=st.integers(1, 8),
    present=st.integers(1, 8),
    cells=st.integers(1, 40),
    lambda_=st.sampled_from([0.07, 0.5, 1.0]),
    switches=SWITCHES,
    empty=st.booleans(),
)
def test_equals_its_definition(seed, n, classes, present, cells, lambda_, switches, empty):
    it = draw(seed, n=n, classes=classes, present=min(present, classes), cells=cells)
    empty = empty and switches["max_points_per_cell"] is not None
    expected = definitions.stcr(
        it.points,
        it.pixels,
        it.labels,
        it.cells,
        it.text,
        lambda_,
        pixel_term=switches["pixel_term"],
        cell_text=switches["cell_text"],
        max_points=switches["max_points_per_cell"],
        empty=empty,
    )
    assert float(stcr(it, lambda_, count_empty_slots=empty, **switches)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_sweeps", range(1, 11))
def test_points_of_all_sweeps_share_cells(num_sweeps):
    """The same places seen K times: K points per cell, whatever sweep they come from."""
    g = torch.Generator().manual_seed(num_sweeps)
    places = (torch.randint(-4, 4, (6, 3), generator=g) + 0.5) * 0.5
    xyz = (places[None] + 0.2 * (torch.rand(num_sweeps, 6, 3, generator=g) - 0.5)).reshape(-1, 3)
    it = draw(num_sweeps, n=len(xyz))
    it.cells = grid_cells(xyz, torch.zeros(len(xyz), dtype=torch.long), 0.5)
    by_place = torch.unique((places / 0.5).floor(), dim=0, return_inverse=True)[1].repeat(num_sweeps)
    assert len(set(it.cells.tolist())) == len(set(by_place.tolist()))
    expected = definitions.stcr(it.points, it.pixels, it.labels, by_place, it.text, 1.0)
    assert float(stcr(it)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("switches", [{}, {"cell_text": "first"}, {"pixel_term": False}, RELEASED], ids=str)
def test_gradients(switches):
    it = draw(3, n=12, cells=4)
    inputs = it.points.requires_grad_(), it.pixels.requires_grad_(), it.text.requires_grad_()

    def loss(points, pixels, text):
        return spatial_temporal_consistency(points, pixels, it.labels, it.cells, text, 0.7, **switches)

    assert torch.autograd.gradcheck(loss, inputs)


def test_gradients_do_not_depend_on_which_are_asked_for():
    """Training takes only the gradient of the points."""
    alone, together = draw(3), draw(3)
    stcr_of = lambda it: stcr(it, 0.7).backward()  # noqa: E731
    alone.points.requires_grad_()
    together.points.requires_grad_(), together.pixels.requires_grad_()
    stcr_of(alone)
    stcr_of(together)
    assert torch.equal(alone.points.grad, together.points.grad)


@pytest.mark.parametrize("switches", [{}, {"pixel_term": False}], ids=str)
def test_order_of_pairs_does_not_matter(switches):
    it = draw(4)
    torch.testing.assert_close(stcr(it, **switches), stcr(it.permuted(), **switches), rtol=1e-12, atol=1e-12)


def test_a_cap_keeps_the_first_pairs_of_a_cell():
    it = draw(6, n=30, cells=1)
    first = definitions.Input(it.points[:8], it.pixels[:8], it.labels[:8], it.cells[:8], it.text)
    torch.testing.assert_close(stcr(it, max_points_per_cell=8), stcr(first))


def test_empty_slots_count_half_in_a_mean_over_all_slots():
    it = draw(7, n=1, cells=1)
    plain = float(stcr(it, max_points_per_cell=4))
    counted = float(stcr(it, max_points_per_cell=4, count_empty_slots=True))
    assert counted == pytest.approx((plain + 3 * 0.5) / 4)
    with pytest.raises(AssertionError, match="needs max_points_per_cell"):
        stcr(it, count_empty_slots=True)


@pytest.mark.parametrize("switches", [{}, RELEASED], ids=str)
@pytest.mark.parametrize(("factor", "dtype"), [(65504, torch.float16), (1e4, torch.bfloat16)])
def test_half_precision_does_not_overflow(switches, factor, dtype):
    it = draw(5).scaled(factor, dtype)
    it.points.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stcr(it, 0.01, **switches)
    loss.backward()
    assert torch.isfinite(loss)
    assert loss.dtype == torch.float32
    assert torch.isfinite(it.points.grad.float()).all()


def test_no_pairs_give_zero_with_a_gradient():
    it = draw(0, n=0)
    it.points.requires_grad_()
    loss = stcr(it)
    loss.backward()
    assert float(loss.detach()) == 0


def test_grid_cells_share_an_id_only_within_a_cube_of_one_frame():
    xyz = torch.tensor([[0.1, 0.1, 0.1], [0.4, 0.4, 0.4], [0.6, 0.1, 0.1], [-0.1, 0.1, 0.1], [0.1, 0.1, 0.1]])
    cells = grid_cells(xyz, torch.tensor([0, 0, 0, 0, 1]), 0.5)
    assert cells[0] == cells[1]
    assert len(set(cells.tolist())) == 4
