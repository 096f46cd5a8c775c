"""Point-pixel pairs: which pixel of which image shows which point of a cloud.

Pairs are made on unaugmented coordinates, so that any later transform of the cloud leaves them valid.

Legend: N points, C cameras, P pairs, V points that may be in view of a camera, camera by camera, S sides of images; a
depth map has h x w pixels, its image H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clip2scene.data.index import Camera
from clip2scene.geometry.projection import image_from_lidar, to_pixels

DEPTH_TOLERANCE_M = 0.05
"""How far a visible point may be from the measured depth, as in CLIP2Scene's released ScanNet loader
(``computeLinking``). OpenScene allows a quarter of the depth instead. Measured on the mesh of scene0000_00, 5 cm keep
75% of the visible vertices that have a depth, and 97% of those kept are visible; a quarter keeps 94% and 74%."""

_SLACK_M = 0.01
"""More than float32 rounds off within ten kilometres, so that :func:`to_pixels` alone decides what is visible."""


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
    """All pairs of a cloud with a keyframe's images, by the visibility rule of :func:`to_pixels`.

    To pair an earlier sweep with the keyframe's images, give its points in its own frame, with its own pose.

    Where an image has a depth map, a point must be in front of the camera, inside the image, and within
    ``DEPTH_TOLERANCE_M`` of the depth measured there; without a measurement there it is not visible.

    Args:
        points_N3: (N, 3) points in the LiDAR's frame, metres.
        world_from_lidar: (4, 4) pose of the LiDAR at the cloud's time.
        cameras: calibrated images, each with its camera's pose at its own time.
        depths: per camera, (h, w) metres along the optical axis, 0 where nothing was measured, or None. It covers
            the same view as its image, in any resolution.

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
    # Width, height, least depth (metres), border (pixels).
    rules = [
        (camera.width, camera.height, 1.0, 1.0) if depth_hw is None else (camera.width, camera.height, 0.0, 0.0)
        for camera, depth_hw in zip(cameras, depths or [None] * len(cameras), strict=True)
    ]
    matrices = [image_from_lidar(camera, world_from_lidar) for camera in cameras]
    xyz_3N = np.ascontiguousarray(np.asarray(points_N3).T)
    point_V, starts = _between_sides(xyz_3N, matrices, cameras)
    xyz1_4V = np.empty((4, len(point_V)))
    xyz1_4V[:3], xyz1_4V[3] = xyz_3N.take(point_V, axis=1), 1
    u_V, v_V, depth_V = image_3V = np.empty((3, len(point_V)))
    for matrix_34, start, end in zip(matrices, starts, starts[1:], strict=False):
        np.matmul(matrix_34, xyz1_4V[:, start:end], out=image_3V[:, start:end])
    same = len(set(rules)) == 1
    limits = rules[0] if same else np.repeat(np.array(rules).T, np.diff(starts), axis=1)
    kept_P = np.flatnonzero(to_pixels(u_V, v_V, depth_V, *limits))
    # Taking rows of both coordinates is twice as fast as taking each coordinate alone.
    pixel_P2 = np.stack((u_V, v_V), axis=1, dtype=np.float32, casting="same_kind").take(kept_P, axis=0)
    camera_P = np.repeat(np.arange(len(cameras)), np.diff(np.searchsorted(kept_P, starts)))
    pairs = Pairs(point_V.take(kept_P), camera_P, pixel_P2)
    if depths is None:
        return pairs
    shown_P = np.ones(len(pairs), dtype=bool)
    for position, (camera, depth_hw) in enumerate(zip(cameras, depths, strict=True)):
        if depth_hw is not None:
            own = np.flatnonzero(camera_P == position)
            shown_P[own] = _unhidden(pixel_P2[own], depth_V[kept_P[own]], camera, depth_hw)
    return Pairs(pairs.point_P[shown_P], camera_P[shown_P], pixel_P2[shown_P])


def _between_sides(
    xyz_3N: np.ndarray, matrices: Sequence[np.ndarray], cameras: Sequence[Camera]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the points between the planes through the left and the right side of each image, camera by camera.

    A camera sees at most a sixth of a scan, so dropping the other points first, in float32, saves most of the work in
    float64. In front of the camera, ``0 < u < width`` is ``0 < u * depth < width * depth``, which is linear in the
    point; a point that meets both conditions is in front.

    Returns:
        (V,) int64 and (C + 1,): the points of camera c are those from ``starts[c]`` to ``starts[c + 1]``.
    """
    sides = [(m[0], camera.width * m[2] - m[0]) for m, camera in zip(matrices, cameras, strict=True)]
    planes_S4 = np.concatenate(sides)
    planes_S4 = (planes_S4 / np.linalg.norm(planes_S4[:, :3], axis=1, keepdims=True)).astype(np.float32)
    inside_SN = planes_S4[:, :3] @ xyz_3N.astype(np.float32, copy=False) > -planes_S4[:, 3:] - _SLACK_M
    rows_V = np.flatnonzero(inside_SN[::2] & inside_SN[1::2])
    first_C = np.arange(len(cameras) + 1) * xyz_3N.shape[1]
    starts = np.searchsorted(rows_V, first_C)
    return rows_V - np.repeat(first_C[:-1], np.diff(starts)), starts


def _unhidden(pixels_V2: np.ndarray, depth_V: np.ndarray, camera: Camera, depth_hw: np.ndarray) -> np.ndarray:
    """(V,) bool, whether the depth measured at a point's pixel is the point's own."""
    height, width = depth_hw.shape
    # ScanNet's depth maps are registered to the colour images, so a pixel's relative position is the same in both; with
    # intrinsic_depth instead, the depth of scene0000_00 would be 4 pixels off.
    column_V = ((pixels_V2[:, 0] + 0.5) * (width / camera.width)).astype(np.int64).clip(0, width - 1)
    row_V = ((pixels_V2[:, 1] + 0.5) * (height / camera.height)).astype(np.int64).clip(0, height - 1)
    measured_V = depth_hw[row_V, column_V]
    return (measured_V > 0) & (np.abs(measured_V - depth_V) <= DEPTH_TOLERANCE_M)
