"""Segment operations: reductions over the rows that share an id, without a loop over ids.

:class:`Segments` reads wide rows (N, D) in place: its sums run through ``embedding_bag``, which adds up the rows of a
segment in a small buffer, so that no copy of size (N, D) is made.

Legend: N rows, S segments, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Segments:
    """Which rows belong together. Values per row are kept in *sorted order*: segment by segment."""

    order_N: torch.Tensor
    """int64, the rows in sorted order; within a segment they keep their order."""
    segment_N: torch.Tensor
    """int64 from 0, the segment of each row in sorted order."""
    start_S: torch.Tensor
    """int64, where each segment begins in sorted order."""

    @classmethod
    def of(cls, ids_N: torch.Tensor) -> Segments:
        """Segments of the rows with equal ids, which may be any integers."""
        sorted_N, order_N = torch.sort(ids_N, stable=True)
        _, segment_N, counts_S = torch.unique_consecutive(sorted_N, return_inverse=True, return_counts=True)
        return cls(order_N, segment_N, counts_S.cumsum(0) - counts_S)

    @property
    def count(self) -> int:
        """S, the number of segments."""
        return self.start_S.shape[0]

    def rank(self) -> torch.Tensor:
        """Position of each row within its segment, in sorted order: (N,) int64 from 0."""
        return torch.arange(len(self.order_N), device=self.order_N.device) - self.start_S[self.segment_N]

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, slice, Segments]]:
        """Blocks of whole segments, about ``num_rows`` rows each; a larger segment is a block of its own.

        Yields:
            Slice of sorted rows, slice of segments, and the block's own ``Segments``, which still number all rows.
        """
        total = len(self.order_N)
        if total <= num_rows:
            yield slice(0, total), slice(0, self.count), self  # without waiting for a GPU
            return
        cuts = torch.arange(num_rows, total, num_rows, device=self.start_S.device)
        firsts = [0, *torch.unique_consecutive(torch.searchsorted(self.start_S, cuts)).tolist()]
        edges = [first for first in dict.fromkeys(firsts) if first < self.count] + [self.count]
        starts = [*self.start_S[edges[:-1]].tolist(), total]
        for (first, last), (start, stop) in zip(pairwise(edges), pairwise(starts), strict=True):
            rows, segments = slice(start, stop), slice(first, last)
            block = Segments(self.order_N[rows], self.segment_N[rows] - first, self.start_S[segments] - start)
            yield rows, segments, block

    def weighted_sum(self, rows_ND: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """Sum of ``weight * row`` over every segment: (N, D), and (N,) in sorted order, to (S, D)."""
        return embedding_bag(self.order_N, rows_ND, self.start_S, mode="sum", per_sample_weights=weights_N)

    def scalar_products(self, rows_ND: torch.Tensor, vectors_SD: torch.Tensor, of_N: torch.Tensor) -> torch.Tensor:
        """Scalar product of each row with ``vectors_SD[of_N]``: (N, D), and (N,) in sorted order, to (N,) likewise."""
        # The derivative of weighted_sum by its weights; torch has no public name for this kernel.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors_SD.contiguous(), rows_ND.contiguous(), self.order_N, self.start_S, of_N, 0, -1
        )

    def unsorted(self, values_N: torch.Tensor) -> torch.Tensor:
        """Values in sorted order, brought back to the order of the rows."""
        return torch.empty_like(values_N).index_copy_(0, self.order_N, values_N)


def segment_sum(rows_ND: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Sum of the rows of every segment: (N, ...) and (N,) to (S, ...)."""
    out = rows_ND.new_zeros((num_segments, *rows_ND.shape[1:]))
    return out.index_add(0, segments_N, rows_ND)


def segment_mean(rows_ND: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Mean of the rows of every segment, summed in at least float32: (N, D) and (N,) to (S, D); 0 for an empty one."""
    wide_ND = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
    sums_SD = segment_sum(wide_ND, segments_N, num_segments)
    # Not bincount, which looks for the largest id and so waits for a GPU.
    counts_S = segments_N.new_zeros(num_segments).index_add_(0, segments_N, torch.ones_like(segments_N))
    return (sums_SD / counts_S.clamp(min=1)[:, None]).to(rows_ND.dtype)


def segment_max(rows_N: torch.Tensor, segments_N: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Largest value of every segment: (N,) and (N,) to (S,); -inf where a segment is empty."""
    out = rows_N.new_full((num_segments,), -torch.inf)
    return out.scatter_reduce(0, segments_N, rows_N, reduce="amax")


def full_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Floating tensors in at least float32: sums of exponentials overflow and lose small terms in half precision."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]
