"""Point-pixel pairs: which pixel of which image shows which point of a cloud.

Pairs are made on unaugmented coordinates, so that any later transform of the cloud leaves them valid.
Shapes: N points, P pairs, V points in view; a depth map has h x w pixels, its image H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip2scene.data.index import Camera
from clip2scene.geometry.projection import project

DEPTH_TOLERANCE_M = 0.05
"""How far a visible point may be from the measured depth: CLIP2Scene's released ScanNet loader (``computeLinking``).
OpenScene allows a quarter of the depth instead. Against the mesh of scene0000_00 itself, 5 cm keep 75% of the visible
vertices that have a measurement, and 97% of what is kept is visible; a quarter keeps 94%, and 74% of it is visible."""

_SLACK = 1e-3
"""Pixels times metres: what rounding cannot reach, so that :func:`project` alone decides what is visible."""


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


def pair(
    points_N3: np.ndarray,
    world_from_lidar: np.ndarray,
    cameras: Sequence[Camera],
    depths: Sequence[np.ndarray | None] | None = None,
) -> Pairs:
    """All pairs of a cloud with a keyframe's images, by the visibility rule of :func:`project`.

    A registered sweep is paired with the *same* images: give its points in its own frame with its own pose.

    Where an image has a depth map, the rule is: in front of the camera, inside the image, and within
    ``DEPTH_TOLERANCE_M`` of the depth measured there. A point behind what was measured is hidden, and so is one whose
    pixel has no measurement.

    Args:
        points_N3: (N, 3) points in the LiDAR's frame, metres.
        world_from_lidar: (4, 4) pose of the LiDAR at the cloud's time.
        cameras: calibrated images, each with its camera's pose at its own time.
        depths: per camera, (h, w) metres along the optical axis, 0 where nothing was measured, or None. It covers what
            its image does, in any resolution.

    Returns:
        The pairs; none where no camera sees a point.

    Example:
        >>> camera = Camera("FRONT", "", 100, 80, np.array([[50.0, 0, 50], [0, 50, 40], [0, 0, 1]]), np.eye(4), 0)
        >>> pairs = pair(np.array([[0.0, 0, -5], [1, 0, 5]]), np.eye(4), [camera])
        >>> pairs.point_P, pairs.camera_P, pairs.pixel_P2
        (array([1]), array([0]), array([[60., 40.]], dtype=float32))
    """
    if not cameras:
        return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 2), np.float32))
    points_N3 = np.asarray(points_N3, dtype=np.float64)
    between = _between_sides(points_N3, world_from_lidar, cameras)
    point, which, pixel = [], [], []
    for position, (camera, depth_hw) in enumerate(zip(cameras, depths or [None] * len(cameras), strict=True)):
        near = between[position]
        points_V3 = points_N3.take(near, axis=0)
        if depth_hw is None:
            visible_V, pixels_V2, _ = project(points_V3, world_from_lidar, camera)
            rows = np.flatnonzero(visible_V)
        else:
            visible_V, pixels_V2, depth_V = project(points_V3, world_from_lidar, camera, min_depth_m=0, border_px=0)
            rows = np.flatnonzero(visible_V)
            rows = rows[_unhidden(pixels_V2[rows], depth_V[rows], camera, depth_hw)]
        point.append(near[rows])
        which.append(np.full(len(rows), position))
        pixel.append(pixels_V2[rows])
    return Pairs(
        np.concatenate(point).astype(np.int64, copy=False),
        np.concatenate(which).astype(np.int64, copy=False),
        np.concatenate(pixel),
    )


def _between_sides(points_N3: np.ndarray, world_from_lidar: np.ndarray, cameras: Sequence[Camera]) -> list[np.ndarray]:
    """Per camera, rows of the points between the planes through the left and the right side of its image.

    A camera sees a sixth of a scan or less, so leaving out the others first makes pairing twice as fast. In front of
    the camera, ``0 < u < width`` is ``0 < u * depth < width * depth``, which is linear in the point; a point that
    passes both is in front.
    """
    sides: list[np.ndarray] = []
    for camera in cameras:
        u_4, _, depth_4 = camera.intrinsics @ (camera.camera_from_world @ world_from_lidar)[:3]
        sides += [u_4, camera.width * depth_4 - u_4]
    planes_S4 = np.array(sides)
    inside_SN = planes_S4[:, :3] @ points_N3.T > -planes_S4[:, 3:] - _SLACK
    return [np.flatnonzero(left_N & right_N) for left_N, right_N in zip(inside_SN[::2], inside_SN[1::2], strict=True)]


def _unhidden(pixels_V2: np.ndarray, depth_V: np.ndarray, camera: Camera, depth_hw: np.ndarray) -> np.ndarray:
    """(V,) whether the depth that was measured at a point's pixel is the point's own."""
    height, width = depth_hw.shape
    # ScanNet's depth is registered to the colour images, so the colour pixel's place in the image is what counts. With
    # intrinsic_depth instead, scene0000_00's depth is 4 of its pixels off.
    column_V = ((pixels_V2[:, 0] + 0.5) * (width / camera.width)).astype(np.int64).clip(0, width - 1)
    row_V = ((pixels_V2[:, 1] + 0.5) * (height / camera.height)).astype(np.int64).clip(0, height - 1)
    measured_V = depth_hw[row_V, column_V]
    return (measured_V > 0) & (np.abs(measured_V - depth_V) <= DEPTH_TOLERANCE_M)
