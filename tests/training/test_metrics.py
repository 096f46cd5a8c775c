"""Scores and counts equal scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from clip2scene.training.metrics import accuracy, confusion, iou, mean_iou


@pytest.mark.parametrize("seed", range(3))
def test_counts_equal_an_independent_implementation(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 4, 5], size=5000)  # 0 = ignore; class 3 never occurs
    classes = rng.integers(0, 5, size=5000)
    counted = labels > 0
    expected = confusion_matrix(labels[counted] - 1, classes[counted], labels=range(5))
    counts = confusion(labels.astype(np.uint8), classes, 5)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_allclose(iou(counts), jaccard_score(labels[counted] - 1, classes[counted], average=None))


def test_an_absent_class_is_left_out_of_the_mean():
    counts = confusion(np.array([1, 1, 2, 2]), np.array([0, 0, 1, 0]), 4)
    np.testing.assert_allclose(iou(counts), [2 / 3, 1 / 2, np.nan, np.nan])
    assert mean_iou(counts) == pytest.approx(7 / 12)
    assert accuracy(counts) == 0.75


def test_counts_of_two_ranks_add_up_to_those_of_all_points():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 21, size=4000).astype(np.uint8)  # 20 classes: products of two do not fit 8 bits
    classes = rng.integers(0, 20, size=4000)
    both = sum(confusion(labels[rank::2], classes[rank::2], 20) for rank in range(2))
    counted = labels > 0
    expected = confusion_matrix(labels[counted].astype(int) - 1, classes[counted], labels=range(20))
    np.testing.assert_array_equal(both, expected)


def test_a_class_that_is_only_predicted_scores_zero_and_counts():
    counts = confusion(np.array([1, 1, 0]), np.array([0, 2, 1]), 4)
    np.testing.assert_allclose(iou(counts), [1 / 2, np.nan, 0, np.nan])
    assert mean_iou(counts) == pytest.approx(1 / 4)


def test_no_points_score_nan():
    counts = confusion(np.zeros(3, np.uint8), np.zeros(3, np.int64), 2)
    assert np.isnan(mean_iou(counts))
    assert np.isnan(accuracy(counts))
