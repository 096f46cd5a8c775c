"""Point-pixel pairs: which pixel of which image shows which point of a cloud.

Pairs are made on unaugmented coordinates, so that any later transform of the cloud leaves them valid.
Shapes: N points, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip2scene.data.index import Camera
from clip2scene.geometry.projection import project


@dataclass(frozen=True)
class Pairs:
    """P pairs, ordered by camera and then by point. A point that two cameras see is in two pairs."""

    point_P: np.ndarray
    """(P,) int64, row of the point in its cloud."""
    camera_P: np.ndarray
    """(P,) int64, position of the camera in ``Frame.cameras``."""
    pixel_P2: np.ndarray
    """(P, 2) float32, (u right, v down) in the full-resolution image."""

    def __len__(self) -> int:
        return len(self.point_P)


def pair(points_N3: np.ndarray, world_from_lidar: np.ndarray, cameras: Sequence[Camera]) -> Pairs:
    """All pairs of a cloud with a keyframe's images, by the visibility rule of :func:`project`.

    A registered sweep is paired with the *same* images: give its points in its own frame with its own pose.

    Args:
        points_N3: (N, 3) points in the LiDAR's frame, metres.
        world_from_lidar: (4, 4) pose of the LiDAR at the cloud's time.
        cameras: calibrated images, each with its camera's pose at its own time.

    Returns:
        The pairs; none where no camera sees a point.

    Example:
        >>> camera = Camera("FRONT", "", 100, 80, np.array([[50.0, 0, 50], [0, 50, 40], [0, 0, 1]]), np.eye(4), 0)
        >>> pairs = pair(np.array([[0.0, 0, -5], [1, 0, 5]]), np.eye(4), [camera])
        >>> pairs.point_P, pairs.camera_P, pairs.pixel_P2
        (array([1]), array([0]), array([[60., 40.]], dtype=float32))
    """
    points_N3 = np.asarray(points_N3, dtype=np.float64)
    point, which, pixel = [], [], []
    for position, camera in enumerate(cameras):
        visible_N, pixels_N2, _ = project(points_N3, world_from_lidar, camera)
        rows = np.flatnonzero(visible_N)
        point.append(rows)
        which.append(np.full(len(rows), position))
        pixel.append(pixels_N2[rows])
    if not cameras:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.float32))
    return Pairs(
        np.concatenate(point).astype(np.int64, copy=False),
        np.concatenate(which).astype(np.int64, copy=False),
        np.concatenate(pixel),
    )
