"""Checks that all readers share."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import refused

from clip2scene.data import poses

PINHOLE = np.array([[50.0, 0, 20], [0, 50, 12], [0, 0, 1]])


@pytest.mark.parametrize(
    ("row", "column", "value"), [(0, 0, 0), (1, 1, -50), (2, 2, 2), (2, 0, 0.1), (0, 2, np.inf), (1, 1, np.nan)]
)
def test_only_pinhole_cameras_pass(row, column, value):
    poses.check_pinhole(PINHOLE, "camera:")
    damaged = PINHOLE.copy()
    damaged[row, column] = value
    with refused("camera: .* is not a pinhole camera; needed: positive focal lengths, last row 0 0 1"):
        poses.check_pinhole(damaged, "camera:")


def test_rotations_are_told_from_mirrors_and_scales():
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    matrices = np.stack((turn, turn.round(6), -turn, 1.001 * turn, np.eye(3)))
    np.testing.assert_array_equal(poses.is_rotation(matrices), [True, True, False, False, True])
    assert poses.is_rotation(turn)
