"""Scores from counts: confusion matrices, IoU per class and their mean.

Legend: N points, C classes.
"""

from __future__ import annotations

import numpy as np


def confusion(labels_N: np.ndarray, classes_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Count points by true and predicted class.

    Args:
        labels_N: true labels, 0 = ignore (left out), class ``c`` is ``c + 1``.
        classes_N: predicted classes, 0-based.
        num_classes: C.

    Returns:
        (C, C) int64, rows are the truth.
    """
    counted_N = labels_N > 0
    pairs_N = (labels_N[counted_N].astype(np.int64) - 1) * num_classes + classes_N[counted_N].astype(np.int64)
    return np.bincount(pairs_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def iou(counts_CC: np.ndarray) -> np.ndarray:
    """Intersection over union per class, (C,) float64; NaN where a class neither occurs nor is predicted."""
    hits_C = np.diag(counts_CC).astype(np.float64)
    union_C = counts_CC.sum(0) + counts_CC.sum(1) - np.diag(counts_CC)
    return np.divide(hits_C, union_C, out=np.full(len(hits_C), np.nan), where=union_C > 0)


def mean_iou(counts_CC: np.ndarray) -> float:
    """Mean IoU over the classes that occur or are predicted; NaN when there are none."""
    values_C = iou(counts_CC)
    return float(np.nanmean(values_C)) if np.isfinite(values_C).any() else float("nan")


def accuracy(counts_CC: np.ndarray) -> float:
    """Share of points with the right class; NaN without points."""
    total = counts_CC.sum()
    return float(np.trace(counts_CC) / total) if total else float("nan")
