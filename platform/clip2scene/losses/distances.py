"""Distillation pair by pair, the simplest baselines: class probabilities (KL) and feature directions (cosine).

Legend: N point-pixel pairs, C classes, D feature width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, kl_div

from clip2scene.segments import full_precision


def class_divergence(
    points_ND: torch.Tensor, pixels_ND: torch.Tensor, text_CD: torch.Tensor, tau: float
) -> torch.Tensor:
    """KL divergence of the points' class probabilities from those of their pixels, mean over pairs ("KL", Table 3).

    ``L = 1/N sum_i sum_c q_ic log(q_ic / s_ic)``, with ``q_i = softmax_c(x_i . t_c / tau)`` of the pixel (the teacher)
    and ``s_i = softmax_c(p_i . t_c / tau)`` of the point (the student).

    Args:
        points_ND: point features p_i, (N, D).
        pixels_ND: features x_i of the paired pixels, (N, D).
        text_CD: class embeddings, (C, D).
        tau: temperature of both.

    Returns:
        A scalar; 0 (attached to the graph) when there are no pairs.
    """
    if not points_ND.shape[0]:
        return points_ND.sum() * 0.0
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, pixels_ND, text_CD = full_precision(points_ND, pixels_ND, text_CD)
        student_NC = (points_ND @ text_CD.T / tau).log_softmax(1)
        teacher_NC = (pixels_ND @ text_CD.T / tau).log_softmax(1)
        return kl_div(student_NC, teacher_NC, reduction="batchmean", log_target=True)


def cosine_distance(points_ND: torch.Tensor, pixels_ND: torch.Tensor) -> torch.Tensor:
    """``1 - cos(p_i, x_i)``, mean over pairs (OpenScene, Peng et al., CVPR 2023, equation 2).

    Args:
        points_ND: point features, (N, D).
        pixels_ND: features of the paired pixels, (N, D).

    Returns:
        A scalar; 0 (attached to the graph) when there are no pairs.
    """
    if not points_ND.shape[0]:
        return points_ND.sum() * 0.0
    with torch.autocast(points_ND.device.type, enabled=False):
        points_ND, pixels_ND = full_precision(points_ND, pixels_ND)
        return (1 - cosine_similarity(points_ND, pixels_ND, dim=1)).mean()
