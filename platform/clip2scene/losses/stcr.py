"""Semantic-guided spatial-temporal consistency regularisation (StCR), CLIP2Scene equations 2 to 4.

Legend: N point-pixel pairs of all sweeps, C classes, D feature width, G non-empty grid cells, M slots of a cell.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from clip2scene.segments import Segments, full_precision, segment_max, segment_sum

_PAIRS_IN_CACHE = 2048
"""8 MiB of points and pixels at a width of 512, which fit into a last-level cache. With fewer pairs per block, the
overhead of torch's operators exceeds what a better cache hit rate saves."""


def grid_cells(coordinates_N3: torch.Tensor, frames_N: torch.Tensor, grid_size_m: float) -> torch.Tensor:
    """Cell ids of stitched sweeps: points of one keyframe in the same cube of edge ``grid_size_m`` share an id.

    Args:
        coordinates_N3: metres, all sweeps registered to their keyframe, (N, 3).
        frames_N: which keyframe of the batch each point belongs to, (N,) int64.
        grid_size_m: edge of a cell.

    Returns:
        (N,) int64, not contiguous: for contiguous ids the host would have to wait for a GPU.
    """
    if not coordinates_N3.shape[0]:
        return frames_N
    cells_N3 = torch.floor(coordinates_N3 / grid_size_m).long()
    cells_N3 = cells_N3 - cells_N3.amin(0)
    size_3 = cells_N3.amax(0) + 1
    return ((frames_N * size_3[0] + cells_N3[:, 0]) * size_3[1] + cells_N3[:, 1]) * size_3[2] + cells_N3[:, 2]


def spatial_temporal_consistency(
    points_ND: torch.Tensor,
    pixels_ND: torch.Tensor,
    labels_N: torch.Tensor,
    cells_N: torch.Tensor,
    text_CD: torch.Tensor,
    lambda_: float,
    *,
    pixel_term: bool = True,
    cell_text: Literal["point", "first"] = "point",
    max_points_per_cell: int | None = None,
    count_empty_slots: bool = False,
) -> torch.Tensor:
    """StCR: draw the points of a cell to one feature, fused from its pixels and points by their text (equations 2-4).

    ``f_n = sum_{i in g_n} a_i x_i + b_i p_i`` with ``(a, b)`` one softmax over all pixels and points of the cell, of
    ``x_i . t_i / lambda`` and ``p_i . t_i / lambda``; ``L = 1/G sum_n sum_{i in g_n} (1 - sigmoid(p_i . f_n))``.

    The keyword arguments are departures of the released code; their defaults give the paper's equation. The order of
    the pairs matters only with ``max_points_per_cell`` or ``cell_text="first"``.

    Args:
        points_ND: point features p_i, (N, D).
        pixels_ND: features x_i of the paired pixels, (N, D).
        labels_N: class of the paired pixel, with text t_i, (N,) int64 in [0, C).
        cells_N: grid cell of each point, (N,) int64, any non-negative ids; cells without pairs do not appear.
        text_CD: class embeddings, (C, D).
        lambda_: temperature.
        pixel_term: False leaves the pixels out, ``f_n = sum_i b_i p_i`` with b a softmax over the cell's points.
        cell_text: ``first`` takes the text of the cell's first pair for t_i of all its pairs.
        max_points_per_cell: M; only the first M pairs of a cell, in the given order, count. The released code sorts
            unstably, so that it keeps M random ones.
        count_empty_slots: the released mean over all M slots of all cells, ``L = 1/(G M) sum ...``, in which a slot
            without a pair counts 1 - sigmoid(0) = 0.5. Needs ``max_points_per_cell``.

    Returns:
        A scalar; 0 (attached to the graph) when there are no pairs.
    """
    if not labels_N.shape[0]:
        return points_ND.sum() * 0.0
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, pixels_ND, text_CD = full_precision(points_ND, pixels_ND, text_CD)
        cells = Segments.of(cells_N)
        if max_points_per_cell is not None:
            kept_N = cells.order_N[cells.rank() < max_points_per_cell]
            points_ND, pixels_ND, labels_N = points_ND[kept_N], pixels_ND[kept_N], labels_N[kept_N]
            cells = Segments.of(cells_N[kept_N])
        labels_N = labels_N[cells.order_N]
        if cell_text == "first":
            labels_N = labels_N[cells.start_S][cells.segment_N]
        pixels = pixels_ND if pixel_term else None
        total = _Disagreement.apply(points_ND, pixels, text_CD, labels_N, cells, lambda_)
        if not count_empty_slots:
            return total / cells.count
        assert max_points_per_cell is not None, "count_empty_slots needs max_points_per_cell, which bounds the slots"
        slots = cells.count * max_points_per_cell
        return (total + 0.5 * (slots - len(labels_N))) / slots


class _Disagreement(torch.autograd.Function):
    """``sum_i (1 - sigmoid(u_i))`` over all pairs, ``u_i = p_i . f_n``, with equations 2 and 3 inside.

    The derivative is written out. It needs five factors per pair and two vectors per cell, which the forward pass
    computes while a block of whole cells is in the processor's cache: points and pixels are read from memory once, and
    each gradient is written once. With ``h_i = dL/du_i``, ``g_n = dL/df_n = sum_i h_i p_i``, and ``r_i`` and ``s_i``
    the derivatives by ``p_i . t_i`` and ``x_i . t_i``:

    ``dL/dp_i = h_i f_n + b_i g_n + r_i t_i`` and ``r_i = b_i (p_i . g_n - f_n . g_n) / lambda``;
    ``dL/dx_i = a_i g_n + s_i t_i`` and ``s_i = a_i (x_i . g_n - f_n . g_n) / lambda``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        points_ND: torch.Tensor,
        pixels_ND: torch.Tensor | None,
        text_CD: torch.Tensor,
        labels_N: torch.Tensor,
        cells: Segments,
        lambda_: float,
    ) -> torch.Tensor:
        """Labels in sorted order; see :func:`spatial_temporal_consistency`."""
        at_once = _PAIRS_IN_CACHE if points_ND.device.type == "cpu" else len(labels_N)
        # f of every cell, g of every cell, and the texts: gradients of points and pixels are weighted sums of these.
        table_TD = torch.cat((text_CD.new_empty(2 * cells.count, text_CD.shape[1]), text_CD))
        vectors_2GD = table_TD[: 2 * cells.count].view(2, cells.count, -1)
        parts = [
            _block(points_ND, pixels_ND, text_CD, labels_N[rows], block, lambda_, vectors_2GD[:, segments])
            for rows, segments, block in cells.blocks(at_once)
        ]
        losses_N, *factors = (torch.cat(part) for part in zip(*parts, strict=True))
        # Only the text's gradient needs the points and pixels themselves; training never computes it.
        rows_ND = (points_ND, pixels_ND) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(table_TD, labels_N, *rows_ND, *factors)
        ctx.cells, ctx.pixel_term = cells, pixels_ND is not None
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of points, pixels and text."""
        table_TD, labels_N, points_ND, pixels_ND, h_N, b_N, r_N, a_N, s_N = ctx.saved_tensors
        cells: Segments = ctx.cells
        # r, s and g already contain h as a factor, and a and b are only multiplied by g.
        h_N, r_N, s_N, a_N, b_N = (factor_N * weight for factor_N in (h_N, r_N, s_N, a_N, b_N))
        points_grad = pixels_grad = text_grad = None
        fused_N, g_N, text_N = cells.segment_N, cells.segment_N + cells.count, labels_N + 2 * cells.count
        if ctx.needs_input_grad[0]:
            points_grad = _combine(table_TD, cells, (fused_N, h_N), (g_N, b_N), (text_N, r_N))
        if ctx.pixel_term and ctx.needs_input_grad[1]:
            pixels_grad = _combine(table_TD, cells, (g_N, a_N), (text_N, s_N))
        if ctx.needs_input_grad[2]:
            num_classes = len(table_TD) - 2 * cells.count
            text_grad = _spread(r_N, labels_N, cells, num_classes).T @ points_ND
            if ctx.pixel_term:
                text_grad += _spread(s_N, labels_N, cells, num_classes).T @ pixels_ND
        return points_grad, pixels_grad, text_grad, None, None, None


def _block(
    points_ND: torch.Tensor,
    pixels_ND: torch.Tensor | None,
    text_CD: torch.Tensor,
    labels_M: torch.Tensor,
    cells: Segments,
    lambda_: float,
    vectors_2GD: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """``1 - sigmoid(u)``, h, b, r, a and s, (M,) each, of the M pairs of some cells in sorted order.

    Writes f and g of the cells into ``vectors_2GD``; a and s are empty without pixels.
    """
    of_M, fused_GD, g_GD = cells.segment_N, *vectors_2GD
    point_score_M = cells.scalar_products(points_ND, text_CD, labels_M) / lambda_
    peak_G = segment_max(point_score_M, of_M, cells.count)
    if pixels_ND is not None:
        pixel_score_M = cells.scalar_products(pixels_ND, text_CD, labels_M) / lambda_
        peak_G = torch.maximum(peak_G, segment_max(pixel_score_M, of_M, cells.count))
    b_M = (point_score_M - peak_G[of_M]).exp()
    total_G = segment_sum(b_M, of_M, cells.count)
    a_M = s_M = b_M[:0]
    if pixels_ND is not None:
        a_M = (pixel_score_M - peak_G[of_M]).exp()
        total_G += segment_sum(a_M, of_M, cells.count)
        a_M /= total_G[of_M]
    b_M /= total_G[of_M]
    fused_GD.copy_(cells.weighted_sum(points_ND, b_M))
    if pixels_ND is not None:
        fused_GD += cells.weighted_sum(pixels_ND, a_M)
    loss_M = torch.sigmoid(-cells.scalar_products(points_ND, fused_GD, of_M))
    h_M = loss_M * (loss_M - 1)
    g_GD.copy_(cells.weighted_sum(points_ND, h_M))
    mean_M = (fused_GD * g_GD).sum(1)[of_M]
    r_M = b_M * (cells.scalar_products(points_ND, g_GD, of_M) - mean_M) / lambda_
    if pixels_ND is not None:
        s_M = a_M * (cells.scalar_products(pixels_ND, g_GD, of_M) - mean_M) / lambda_
    return loss_M, h_M, b_M, r_M, a_M, s_M


def _combine(table_TD: torch.Tensor, cells: Segments, *terms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rows ``sum of factor * table[row]`` over ``(row, factor)`` in sorted order, back in the order of the pairs."""
    rows_NK = cells.unsorted(torch.stack([row_N for row_N, _ in terms], dim=1))
    factors_NK = cells.unsorted(torch.stack([factor_N for _, factor_N in terms], dim=1))
    return embedding_bag(rows_NK, table_TD, mode="sum", per_sample_weights=factors_NK)


def _spread(values_N: torch.Tensor, labels_N: torch.Tensor, cells: Segments, num_classes: int) -> torch.Tensor:
    """(N, C) in the order of the pairs: each value in its label's column, 0 elsewhere."""
    values_NC = values_N.new_zeros((len(values_N), num_classes))
    values_NC[cells.order_N, labels_N] = values_N
    return values_NC
