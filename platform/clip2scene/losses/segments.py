"""Segment operations: reductions over the rows that share an id, without a loop over ids.

Wide rows (N, D) are only ever read in place: sums over them run through ``embedding_bag``, which takes the rows of a
segment one after another into a register-sized buffer, so nothing of size (N, D) is made on the way.

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
    """Which rows belong together. Values that belong to rows are kept in *sorted order*: segment by segment."""

    order_N: torch.Tensor
    """Rows in sorted order, int64; within a segment in their given order."""
    segment_N: torch.Tensor
    """Segment of each row, in sorted order, int64 from 0."""
    start_S: torch.Tensor
    """Where each segment begins in sorted order, int64."""

    @classmethod
    def of(cls, ids_N: torch.Tensor) -> Segments:
        """Rows with the same id form a segment; ids are any integers."""
        sorted_N, order_N = torch.sort(ids_N, stable=True)
        _, segment_N, counts_S = torch.unique_consecutive(sorted_N, return_inverse=True, return_counts=True)
        return cls(order_N, segment_N, counts_S.cumsum(0) - counts_S)

    @property
    def count(self) -> int:
        """S, the number of segments."""
        return self.start_S.shape[0]

    def rank(self) -> torch.Tensor:
        """Place of each row within its segment, in sorted order: (N,) int64 from 0."""
        return torch.arange(len(self.order_N), device=self.order_N.device) - self.start_S[self.segment_N]

    def blocks(self, num_rows: int) -> Iterator[tuple[slice, slice, Segments]]:
        """Whole segments, about ``num_rows`` rows at a time: their rows in sorted order, their places, they alone.

        A larger segment is a block of its own. In a block, ``order_N`` still names rows among all.
        """
        total = len(self.order_N)
        if total <= num_rows:
            yield slice(0, total), slice(0, self.count), self  # a GPU is not waited for
            return
        cuts = torch.arange(num_rows, total, num_rows, device=self.start_S.device)
        firsts = [0, *torch.unique_consecutive(torch.searchsorted(self.start_S, cuts)).tolist()]
        edges = [first for first in dict.fromkeys(firsts) if first < self.count] + [self.count]
        starts = [*self.start_S[edges[:-1]].tolist(), total]
        for (first, last), (start, stop) in zip(pairwise(edges), pairwise(starts), strict=True):
            rows, places = slice(start, stop), slice(first, last)
            yield rows, places, Segments(self.order_N[rows], self.segment_N[rows] - first, self.start_S[places] - start)

    def weighted_sum(self, rows_ND: torch.Tensor, weights_N: torch.Tensor) -> torch.Tensor:
        """Sum of ``weight * row`` of every segment: (N, D) and (N,) in sorted order to (S, D)."""
        return embedding_bag(self.order_N, rows_ND, self.start_S, mode="sum", per_sample_weights=weights_N)

    def scalar_products(self, rows_ND: torch.Tensor, vectors_SD: torch.Tensor, of_N: torch.Tensor) -> torch.Tensor:
        """Scalar product of each row with vector ``of_N`` of some: (N, D), (S, D) and (N,) to (N,) in sorted order."""
        # The derivative of weighted_sum by its weights; torch has the kernel, but no public name for it.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            vectors_SD.contiguous(), rows_ND.contiguous(), self.order_N, self.start_S, of_N, 0, -1
        )

    def unsorted(self, values_N: torch.Tensor) -> torch.Tensor:
        """From sorted order back to the order of the rows."""
        return torch.empty_like(values_N).index_copy_(0, self.order_N, values_N)


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
