"""Reductions over the rows that share an id; the losses' tests cover the others against their definitions."""

from __future__ import annotations

import torch

from clip2scene.segments import segment_mean


def test_means_of_many_rows_in_half_precision_do_not_overflow():
    rows = torch.full((8000, 2), 10.0, dtype=torch.float16)  # their sum is above 65504
    means = segment_mean(rows, torch.zeros(8000, dtype=torch.long), 2)
    torch.testing.assert_close(means, torch.tensor([[10.0, 10], [0, 0]], dtype=torch.float16))
