"""Semantic-guided spatial-temporal consistency regularisation (StCR), CLIP2Scene equations 2 to 4.

Legend: N point-pixel pairs of all sweeps, C classes, D feature width, G non-empty grid cells, M slots of a cell.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from clip2scene.losses.segments import Segments, full_precision, segment_max, segment_sum


def grid_cells(coordinates_N3: torch.Tensor, frames_N: torch.Tensor, grid_size_m: float) -> torch.Tensor:
    """Cell ids of stitched sweeps: points of one keyframe in the same cube of edge ``grid_size_m`` share an id.

    Args:
        coordinates_N3: metres, all sweeps registered to their keyframe, (N, 3).
        frames_N: which keyframe of the batch each point belongs to, (N,) int64.
        grid_size_m: edge of a cell.

    Returns:
        (N,) int64, contiguous from 0.
    """
    if not coordinates_N3.shape[0]:
        return frames_N
    cells_N3 = torch.floor(coordinates_N3 / grid_size_m).long()
    cells_N3 = cells_N3 - cells_N3.amin(0)
    size_3 = cells_N3.amax(0) + 1
    keys_N = ((frames_N * size_3[0] + cells_N3[:, 0]) * size_3[1] + cells_N3[:, 1]) * size_3[2] + cells_N3[:, 2]
    return torch.unique(keys_N, return_inverse=True)[1]


def spatial_temporal_consistency(
    points_ND: torch.Tensor,
    pixels_ND: torch.Tensor,
    labels_N: torch.Tensor,
    cells_N: torch.Tensor,
    text_CD: torch.Tensor,
    lambda_: float = 1.0,
    *,
    pixel_term: bool = True,
    cell_text: Literal["point", "first"] = "point",
    max_points_per_cell: int | None = None,
    count_empty_slots: bool = False,
) -> torch.Tensor:
    """StCR: draw the points of a cell to one feature, fused from its pixels and points by their text (equations 2-4).

    ``f_n = sum_{i in g_n} a_i x_i + b_i p_i`` with ``(a, b)`` one softmax over all pixels and points of the cell, of
    ``x_i . t_i / lambda`` and ``p_i . t_i / lambda``; ``L = 1/G sum_n sum_{i in g_n} (1 - sigmoid(p_i . f_n))``.

    The keywords are the released code's departures; without them this is the paper's equation. Without
    ``max_points_per_cell`` and ``cell_text="first"`` the order of the pairs does not matter.

    Args:
        points_ND: point features p_i, (N, D).
        pixels_ND: features x_i of the paired pixels, (N, D).
        labels_N: class of the paired pixel, whose text is t_i, (N,) int64 in [0, C).
        cells_N: grid cell of each point, (N,) int64, any non-negative ids; cells without pairs do not appear.
        text_CD: class embeddings, (C, D).
        lambda_: temperature.
        pixel_term: False leaves the pixels out, ``f_n = sum_i b_i p_i`` with b a softmax over the cell's points.
        cell_text: ``first`` takes the text of the cell's first pair for t_i of all its pairs.
        max_points_per_cell: M; only the first M pairs of a cell enter, in the given order. The released code sorts
            unstably, so that which ones stay is left to chance there.
        count_empty_slots: the released mean over all M slots of all cells, ``L = 1/(G M) sum ...``, in which a slot
            without a pair counts 1 - sigmoid(0) = 0.5. Needs ``max_points_per_cell``.

    Returns:
        A scalar; 0 (attached to the graph) when there are no pairs.

    Raises:
        ValueError: empty slots are to be counted, but their number is unbounded.
    """
    if count_empty_slots and max_points_per_cell is None:
        raise ValueError("count_empty_slots=True needs max_points_per_cell: without it a cell has no empty slots")
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
        agreement_N = _FusedAgreement.apply(points_ND, pixels, text_CD, labels_N, cells, lambda_)
        total = torch.sigmoid(-agreement_N).sum()
        if not count_empty_slots:
            return total / cells.count
        slots = cells.count * (max_points_per_cell or 0)
        return (total + 0.5 * (slots - len(labels_N))) / slots


class _FusedAgreement(torch.autograd.Function):
    """``u_i = p_i . f_n`` of every pair, in sorted order, with equations 2 and 3 inside.

    The derivative is written out so that forward and backward read points and pixels in place and write each gradient
    once: about ten passes over (N, D) where the operations one by one make thirty. With ``g_n = dL/df_n = sum_i h_i
    p_i``, ``h_i = dL/du_i`` and ``r_i`` the derivative by ``p_i . t_i``:

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
        of = cells.segment_N
        point_score_N = _scores(points_ND, text_CD, labels_N, cells) / lambda_
        peak_G = segment_max(point_score_N, of, cells.count)
        if pixels_ND is not None:
            pixel_score_N = _scores(pixels_ND, text_CD, labels_N, cells) / lambda_
            peak_G = torch.maximum(peak_G, segment_max(pixel_score_N, of, cells.count))
        b_N = (point_score_N - peak_G[of]).exp()
        total_G = segment_sum(b_N, of, cells.count)
        a_N = b_N.new_empty(0)
        if pixels_ND is not None:
            a_N = (pixel_score_N - peak_G[of]).exp()
            total_G += segment_sum(a_N, of, cells.count)
            a_N /= total_G[of]
        b_N /= total_G[of]
        fused_GD = cells.weighted_sum(points_ND, b_N)
        if pixels_ND is not None:
            fused_GD += cells.weighted_sum(pixels_ND, a_N)
        ctx.save_for_backward(points_ND, pixels_ND, text_CD, labels_N, a_N, b_N, fused_GD)
        ctx.cells, ctx.lambda_ = cells, lambda_
        return cells.scalar_products(points_ND, fused_GD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, h_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of points, pixels and text."""
        points_ND, pixels_ND, text_CD, labels_N, a_N, b_N, fused_GD = ctx.saved_tensors
        cells: Segments = ctx.cells
        g_GD = cells.weighted_sum(points_ND, h_N.contiguous())
        mean_N = (fused_GD * g_GD).sum(1)[cells.segment_N]
        r_N = b_N * (cells.scalar_products(points_ND, g_GD) - mean_N) / ctx.lambda_
        s_N = r_N.new_empty(0)
        if pixels_ND is not None:
            s_N = a_N * (cells.scalar_products(pixels_ND, g_GD) - mean_N) / ctx.lambda_

        points_grad = pixels_grad = text_grad = None
        table_TD = torch.cat((fused_GD, g_GD, text_CD))
        fused_N, g_N, text_N = cells.segment_N, cells.segment_N + cells.count, labels_N + 2 * cells.count
        if ctx.needs_input_grad[0]:
            points_grad = _combine(table_TD, cells, (fused_N, h_N), (g_N, b_N), (text_N, r_N))
        if pixels_ND is not None and ctx.needs_input_grad[1]:
            pixels_grad = _combine(table_TD, cells, (g_N, a_N), (text_N, s_N))
        if ctx.needs_input_grad[2]:
            text_grad = _spread(r_N, labels_N, cells, text_CD).T @ points_ND
            if pixels_ND is not None:
                text_grad += _spread(s_N, labels_N, cells, text_CD).T @ pixels_ND
        return points_grad, pixels_grad, text_grad, None, None, None


def _scores(rows_ND: torch.Tensor, text_CD: torch.Tensor, labels_N: torch.Tensor, cells: Segments) -> torch.Tensor:
    """``row . t`` with the text of each row's label, in sorted order."""
    return (rows_ND @ text_CD.T)[cells.order_N, labels_N]


def _combine(table_TD: torch.Tensor, cells: Segments, *terms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rows ``sum of factor * table[row]`` over ``(row, factor)`` in sorted order, back in the order of the pairs."""
    rows_NK = cells.unsorted(torch.stack([row_N for row_N, _ in terms], dim=1))
    factors_NK = cells.unsorted(torch.stack([factor_N for _, factor_N in terms], dim=1))
    return embedding_bag(rows_NK, table_TD, mode="sum", per_sample_weights=factors_NK)


def _spread(values_N: torch.Tensor, labels_N: torch.Tensor, cells: Segments, text_CD: torch.Tensor) -> torch.Tensor:
    """(N, C) in the order of the pairs: each value in its label's column, 0 elsewhere."""
    values_NC = values_N.new_zeros((len(values_N), len(text_CD)))
    values_NC[cells.order_N, labels_N] = values_N
    return values_NC
