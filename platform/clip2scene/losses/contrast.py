"""InfoNCE between matching rows, for the contrastive baselines, which match pairs, superpixels or views of a point.

Legend: N matching rows, P point-pixel pairs, S superpixels that hold a pair, D feature width.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from clip2scene.segments import full_precision, segment_mean


def info_nce(queries_ND: torch.Tensor, keys_ND: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE: row i of the queries matches row i of the keys, and all other keys are its negatives.

    ``L = - 1/N sum_i log [ exp(q_i . k_i / temperature) / sum_j exp(q_i . k_j / temperature) ]``

    Args:
        queries_ND: (N, D); the baselines' papers normalise both, which is left to the caller.
        keys_ND: (N, D).
        temperature: of the scalar products.

    Returns:
        A scalar; 0 (attached to the graph) when there are no rows.
    """
    if not queries_ND.shape[0]:
        return (queries_ND.sum() + keys_ND.sum()) * 0.0
    with torch.autocast(queries_ND.device.type, enabled=False):
        queries_ND, keys_ND = full_precision(queries_ND, keys_ND)
        logits_NN = queries_ND @ keys_ND.T / temperature
        return cross_entropy(logits_NN, torch.arange(len(logits_NN), device=logits_NN.device))


def superpixel_means(
    points_PD: torch.Tensor, pixels_PD: torch.Tensor, segments_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """SLidR's matches: the mean point feature and the mean pixel feature of every superpixel that holds a pair.

    SLidR (Sautier et al., CVPR 2022) takes the mean over all pixels of a superpixel; here it is over the paired pixels,
    as only their features are read.

    Args:
        points_PD: point features, (P, D).
        pixels_PD: features of the paired pixels, (P, D).
        segments_P: superpixel of each pair, (P,) int64; pairs with -1 are left out.

    Returns:
        Means of points and of pixels, (S, D) each, with the same superpixels in the same order.
    """
    with torch.autocast(points_PD.device.type, enabled=False):
        points_PD, pixels_PD = full_precision(points_PD, pixels_PD)
        counted_P = (segments_P >= 0).nonzero()[:, 0]
        ids_S, segments_P = torch.unique(segments_P[counted_P], return_inverse=True)
        return (
            segment_mean(points_PD[counted_P], segments_P, len(ids_S)),
            segment_mean(pixels_PD[counted_P], segments_P, len(ids_S)),
        )
