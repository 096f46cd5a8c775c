"""From LiDAR points to pixels, with the ego motion between the two exposures taken out.

The cloud has the LiDAR's pose at its own time and every image its camera's pose at *its* own time; they meet in the
world frame. Shapes: N points. Pixels are (u right, v down) of the full-resolution image, as its intrinsics count them.
"""

from __future__ import annotations

import numpy as np

from clip2scene.data.index import Camera


def project(
    points_N3: np.ndarray,
    world_from_lidar: np.ndarray,
    camera: Camera,
    min_depth_m: float = 1.0,
    border_px: float = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Project a cloud into one image and say which points it sees.

    The rule of visibility is that of nuscenes-devkit (``NuScenesExplorer.map_pointcloud_to_image``): depth above
    ``min_depth_m`` and, on every side, more than ``border_px`` inside the image. Nothing is tested for occlusion.

    Args:
        points_N3: (N, 3) points in the LiDAR's frame, metres.
        world_from_lidar: (4, 4) pose of the LiDAR at the cloud's time.
        camera: the image's calibration, and the camera's pose at the image's time.
        min_depth_m: nearer points are not seen: they may lie on the car itself.
        border_px: width of the frame of pixels that does not count.

    Returns:
        ``(visible_N, pixels_N2, depth_N)``: bool, float32 and float64. Pixels of points that are not in front of
        ``min_depth_m`` are NaN; depth is along the optical axis, metres, and may be negative.

    Example:
        >>> camera = Camera("FRONT", "", 100, 80, np.array([[50.0, 0, 50], [0, 50, 40], [0, 0, 1]]), np.eye(4), 0)
        >>> visible, pixels, depth = project(np.array([[1.0, 0, 5], [0, 0, -5]]), np.eye(4), camera)
        >>> visible, pixels[0], depth
        (array([ True, False]), array([60., 40.], dtype=float32), array([ 5., -5.]))
    """
    matrix_34 = image_from_lidar(camera, world_from_lidar)
    u_N, v_N, depth_N = matrix_34[:, :3] @ points_N3.T.astype(np.float64, copy=False) + matrix_34[:, 3:]
    visible_N = to_pixels(u_N, v_N, depth_N, camera.width, camera.height, min_depth_m, border_px)
    return visible_N, np.stack((u_N, v_N), axis=1, dtype=np.float32, casting="same_kind"), depth_N


def image_from_lidar(camera: Camera, world_from_lidar: np.ndarray) -> np.ndarray:
    """(3, 4) float64: from a point of the LiDAR's frame to (u * depth, v * depth, depth)."""
    # World coordinates cancel here, in float64, before any point is touched. The last row of the intrinsics is
    # (0, 0, 1), so the third homogeneous coordinate is the depth.
    return camera.intrinsics @ (camera.camera_from_world @ world_from_lidar)[:3]


def to_pixels(
    u_N: np.ndarray,
    v_N: np.ndarray,
    depth_N: np.ndarray,
    width: np.ndarray | int,
    height: np.ndarray | int,
    min_depth_m: np.ndarray | float,
    border_px: np.ndarray | float,
) -> np.ndarray:
    """Turn ``u * depth`` and ``v * depth`` into pixels in place, and say which are visible by :func:`project`'s rule.

    Sizes and limits are the image's, or (N,) where the points are of several images.
    """
    scale_N = np.where(depth_N > min_depth_m, depth_N, np.nan)
    u_N /= scale_N
    v_N /= scale_N
    return (u_N > border_px) & (u_N < width - border_px) & (v_N > border_px) & (v_N < height - border_px)
