"""Semantic-guided spatial-temporal consistency regularisation (StCR), CLIP2Scene equations 2 to 4.

Legend: N point-pixel pairs of all sweeps, C classes, D feature width, G non-empty grid cells.
"""

from __future__ import annotations

import torch

from clip2scene.losses.segments import full_precision, segment_max, segment_sum


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
) -> torch.Tensor:
    """StCR: draw the points of a cell to one feature, fused from its pixels and points by their text (equations 2-4).

    ``f_n = sum_{i in g_n} a_i x_i + b_i p_i`` with ``(a, b)`` one softmax over all pixels and points of the cell, of
    ``x_i . t_i / lambda`` and ``p_i . t_i / lambda``; ``L = 1/G sum_n sum_{i in g_n} (1 - sigmoid(p_i . f_n))``.

    Args:
        points_ND: point features p_i, (N, D).
        pixels_ND: features x_i of the paired pixels, (N, D).
        labels_N: class of the paired pixel, whose text is t_i, (N,) int64 in [0, C).
        cells_N: grid cell of each point, (N,) int64, any non-negative ids.
        text_CD: class embeddings, (C, D).
        lambda_: temperature.

    Returns:
        A scalar; 0 (attached to the graph) when there are no pairs.
    """
    if not labels_N.shape[0]:
        return points_ND.sum() * 0.0
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, pixels_ND, text_CD = full_precision(points_ND, pixels_ND, text_CD)
        ids_G, cells_N = torch.unique(cells_N, return_inverse=True)
        num_cells = ids_G.shape[0]
        text_ND = text_CD[labels_N]
        pixel_score_N = (pixels_ND * text_ND).sum(1) / lambda_
        point_score_N = (points_ND * text_ND).sum(1) / lambda_

        peak_G = segment_max(torch.maximum(pixel_score_N, point_score_N).detach(), cells_N, num_cells)
        pixel_weight_N = (pixel_score_N - peak_G[cells_N]).exp()
        point_weight_N = (point_score_N - peak_G[cells_N]).exp()
        total_G = segment_sum(pixel_weight_N + point_weight_N, cells_N, num_cells)
        weighted_ND = pixel_weight_N[:, None] * pixels_ND + point_weight_N[:, None] * points_ND
        fused_GD = segment_sum(weighted_ND, cells_N, num_cells) / total_G[:, None]

        agreement_N = (points_ND * fused_GD[cells_N]).sum(1)
        return torch.sigmoid(-agreement_N).sum() / num_cells
