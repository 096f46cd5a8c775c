"""Lovász-Softmax (Berman et al., CVPR 2018): the Jaccard index itself, extended to probabilities, as a loss.

Legend: N points, C classes.
"""

from __future__ import annotations

import torch

from clip2scene.segments import full_precision


def lovasz_softmax(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """One minus the intersection over union of a class, extended to probabilities; the mean over classes with a point.

    Of class c, point i is in error by ``m_i = |[label_i = c] - softmax(logits_i)_c|``. With the errors from large to
    small, ``L_c = sum_i m_i (J_i - J_{i-1})``, where ``J_i`` is one minus the intersection over union that is left when
    the first i points are wrong (algorithm 1 of the paper).

    Args:
        logits_NC: (N, C).
        labels_N: (N,) int64 in [0, C), or -1: such a point counts nowhere.

    Returns:
        A scalar; 0 (attached to the graph) where no point counts.
    """
    with torch.autocast(logits_NC.device.type, enabled=False):
        (logits_NC,) = full_precision(logits_NC)
        counted_N = labels_N >= 0
        is_own_CN = torch.arange(logits_NC.shape[1], device=labels_N.device)[:, None] == labels_N
        # Below 0, points that do not count come last and take no part. Masks: fewer rows would wait for a GPU.
        error_CN = (is_own_CN.to(logits_NC.dtype) - logits_NC.softmax(1).T).abs().where(counted_N, -1.0)
        error_CN, order_CN = error_CN.sort(dim=1, descending=True)
        with torch.no_grad():
            own_CN, counted_CN = is_own_CN.gather(1, order_CN), error_CN >= 0
            of_class_C1 = own_CN.sum(1, keepdim=True)
            union_CN = (of_class_C1 + (counted_CN & ~own_CN).cumsum(1)).to(error_CN.dtype)
            jaccard_CN = 1 - (of_class_C1 - own_CN.cumsum(1)) / union_CN.clamp(min=1)
            step_CN = jaccard_CN.diff(dim=1, prepend=torch.zeros_like(jaccard_CN[:, :1])) * counted_CN
            present_C = of_class_C1[:, 0] > 0
        loss_C = (error_CN * step_CN).sum(1)
        return loss_C.where(present_C, 0.0).sum() / present_C.sum().clamp(min=1)
