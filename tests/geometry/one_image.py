"""A camera, points at pixels of it, and the projection of a cloud into its image."""

from __future__ import annotations

import numpy as np

from clip2scene.data.index import Camera
from clip2scene.geometry.projection import image_from_lidar, to_pixels


def small_camera(width: int = 100, height: int = 80, focal_px: float = 50.0) -> Camera:
    """A camera at the origin that looks along z, with its principal point in the middle of the image."""
    intrinsics = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]])
    return Camera("FRONT", "front.jpg", width, height, intrinsics, np.eye(4), 0)


def points_at(pixels: list[tuple[float, float]], depth_m: float) -> np.ndarray:
    """Points in the frame of :func:`small_camera` that project to the given pixels."""
    return np.array([((u - 50) / 50 * depth_m, (v - 40) / 50 * depth_m, depth_m) for u, v in pixels])


def project(
    points_N3: np.ndarray,
    world_from_lidar: np.ndarray,
    camera: Camera,
    min_depth_m: float = 1.0,
    border_px: float = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each point is visible (N,), its pixel (N, 2) float32 and its depth (N,) in metres."""
    matrix_34 = image_from_lidar(camera, world_from_lidar)
    u_N, v_N, depth_N = matrix_34[:, :3] @ points_N3.T.astype(np.float64, copy=False) + matrix_34[:, 3:]
    visible_N = to_pixels(u_N, v_N, depth_N, camera.width, camera.height, min_depth_m, border_px)
    return visible_N, np.stack((u_N, v_N), axis=1, dtype=np.float32, casting="same_kind"), depth_N
