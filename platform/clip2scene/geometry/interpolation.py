"""Bilinear interpolation of dense feature maps.

Legend: M maps of h x w cells, P positions, D channels.
"""

from __future__ import annotations

import torch


def bilinear(grids_MhwD: torch.Tensor, grid_P: torch.Tensor, position_P2: torch.Tensor) -> torch.Tensor:
    """Interpolate feature maps at relative positions.

    Args:
        grids_MhwD: features of the cells' centres.
        grid_P: (P,) int64, the map to read.
        position_P2: (P, 2), u to the right and v down, as fractions of the image's width and height.

    Returns:
        (P, D) in the maps' type, but at least float32. Positions beyond the outermost centres read the edge cells.
    """
    _, height, width, dim = grids_MhwD.shape
    column_P = (position_P2[:, 0] * width - 0.5).clamp(0, width - 1)
    row_P = (position_P2[:, 1] * height - 0.5).clamp(0, height - 1)
    left_P, top_P = column_P.long().clamp(max=max(width - 2, 0)), row_P.long().clamp(max=max(height - 2, 0))
    right_P, bottom_P = (left_P + 1).clamp(max=width - 1), (top_P + 1).clamp(max=height - 1)
    across_P1, down_P1 = (column_P - left_P)[:, None], (row_P - top_P)[:, None]

    flat = grids_MhwD.reshape(-1, dim)
    base_P = grid_P * (height * width)

    def cell(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return flat[base_P + row * width + column].to(torch.promote_types(flat.dtype, torch.float32))

    upper = torch.lerp(cell(top_P, left_P), cell(top_P, right_P), across_P1)
    lower = torch.lerp(cell(bottom_P, left_P), cell(bottom_P, right_P), across_P1)
    return torch.lerp(upper, lower, down_P1)
