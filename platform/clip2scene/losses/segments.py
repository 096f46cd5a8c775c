"""Segment operations: reductions over the rows that share an id, without a loop over ids.

Legend: N rows, S segments, D features.
"""

from __future__ import annotations

import torch


def segment_sum(rows_ND: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sum of the rows of every segment: (N, ...) and (N,) to (S, ...)."""
    out = rows_ND.new_zeros((num_segments, *rows_ND.shape[1:]))
    return out.index_add(0, segments_N, rows_ND)


def segment_max(rows_N: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Largest value of every segment: (N,) and (N,) to (S,); -inf where a segment is empty."""
    out = rows_N.new_full((num_segments,), -torch.inf)
    return out.scatter_reduce(0, segments_N, rows_N, reduce="amax")


def full_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Floating tensors in at least float32: sums of exponentials overflow and lose small terms in half precision."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]
