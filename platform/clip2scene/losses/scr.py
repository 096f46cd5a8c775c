"""Semantic consistency regularisation (SCR): CLIP2Scene equation 1, and its form in the authors' code.

Legend: N points, C classes, D feature width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from clip2scene.segments import full_precision, segment_max, segment_sum


def semantic_consistency(
    points_ND: torch.Tensor, labels_N: torch.Tensor, text_CD: torch.Tensor, tau: float
) -> torch.Tensor:
    """SCR: draw points to the text of their pixel's class, against the points of all *other* classes (equation 1).

    ``- sum_c log [ sum_{i: t_i = c} exp(t_c . p_i / tau) / sum_{j: t_j != c} exp(t_c . p_j / tau) ]``

    A class with no point, or with no point of another class, contributes nothing.

    Args:
        points_ND: point features p_i, (N, D).
        labels_N: class of each point's pixel, (N,) int64 in [0, C).
        text_CD: class embeddings t_c, (C, D).
        tau: temperature.

    Returns:
        A scalar; 0 (attached to the graph) when no class can contribute.
    """
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, text_CD = full_precision(points_ND, text_CD)
        logits_NC = points_ND @ text_CD.T / tau
        num_classes = text_CD.shape[0]
        is_own_NC = torch.zeros_like(logits_NC, dtype=torch.bool).scatter_(1, labels_N[:, None], True)
        counts_C = is_own_NC.sum(0)
        own_N = logits_NC.gather(1, labels_N[:, None])[:, 0]
        peak_C = segment_max(own_N.detach(), labels_N, num_classes)
        positive_C = segment_sum((own_N - peak_C[labels_N]).exp(), labels_N, num_classes)
        negative_C = logits_NC.masked_fill(is_own_NC, -torch.inf).logsumexp(0)
        terms_C = negative_C - positive_C.log() - peak_C
        # Infinite for a class that contributes nothing. Selecting the other columns first would wait for a GPU.
        counted_C = (counts_C > 0) & (counts_C < labels_N.shape[0])
        return torch.where(counted_C, terms_C, 0.0).sum()


def text_cross_entropy(points_ND: torch.Tensor, labels_N: torch.Tensor, text_CD: torch.Tensor) -> torch.Tensor:
    """SCR as released: cross-entropy over text logits without a temperature, mean over points.

    ``- 1/N sum_i log [ exp(t_i . p_i) / sum_c exp(t_c . p_i) ]``

    Args:
        points_ND: point features p_i, (N, D).
        labels_N: class of each point's pixel, (N,) int64 in [0, C).
        text_CD: class embeddings t_c, (C, D).

    Returns:
        A scalar; 0 (attached to the graph) when there are no points.
    """
    if not labels_N.shape[0]:
        return points_ND.sum() * 0.0
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, text_CD = full_precision(points_ND, text_CD)
        return cross_entropy(points_ND @ text_CD.T, labels_N)
