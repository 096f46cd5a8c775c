"""Scores and counts equal scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from clip2scene.training.metrics import accuracy, confusion, iou, mean_iou


@pytest.mark.parametrize("num_classes", [5, 20])  # products of two of 20 do not fit into the labels' 8 bits
def test_counts_equal_an_independent_implementation(num_classes):
    rng = np.random.default_rng(0)
    labels = rng.choice(np.delete(np.arange(num_classes + 1), 3), size=5000)  # 0 = ignore; label 3 never occurs
    classes = rng.integers(0, num_classes, size=5000)
    counted = labels > 0
    expected = confusion_matrix(labels[counted] - 1, classes[counted], labels=range(num_classes))
    counts = confusion(labels.astype(np.uint8), classes, num_classes)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(iou(counts), jaccard_score(labels[counted] - 1, classes[counted], average=None))


def test_an_absent_class_is_left_out_of_the_mean():
    counts = confusion(np.array([1, 1, 2, 2]), np.array([0, 0, 1, 0]), 4)
    np.testing.assert_allclose(iou(counts), [2 / 3, 1 / 2, np.nan, np.nan])
    assert mean_iou(counts) == pytest.approx(7 / 12)
    assert accuracy(counts) == 0.75


def test_a_class_that_is_only_predicted_scores_zero_and_counts():
    counts = confusion(np.array([1, 1, 0]), np.array([0, 2, 1]), 4)
    np.testing.assert_allclose(iou(counts), [1 / 2, np.nan, 0, np.nan])
    assert mean_iou(counts) == pytest.approx(1 / 4)


def test_no_points_score_nan():
    counts = confusion(np.zeros(3, np.uint8), np.zeros(3, np.int64), 2)
    assert np.isnan(mean_iou(counts))
    assert np.isnan(accuracy(counts))
