"""From LiDAR points to pixels, with the ego motion between the two exposures taken out.

The cloud has the LiDAR's pose at its own time and every image its camera's pose at *its* own time; they meet in the
world frame. Pixels are (u right, v down) of the full-resolution image, as its intrinsics count them.

Legend: N points.
"""

from __future__ import annotations

import numpy as np

from clip2scene.data.index import Camera


def image_from_lidar(camera: Camera, world_from_lidar: np.ndarray) -> np.ndarray:
    """The (3, 4) float64 matrix that takes a point in the LiDAR's frame to (u * depth, v * depth, depth)."""
    # World coordinates cancel here, in float64, before any point is transformed. The last row of the intrinsics is
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
    """Turn ``u * depth`` and ``v * depth`` into pixels in place, and tell which of them are visible.

    The rule of visibility is that of nuscenes-devkit (``NuScenesExplorer.map_pointcloud_to_image``): depth above
    ``min_depth_m`` and, on every side, more than ``border_px`` inside the image. Nothing is tested for occlusion.

    Args:
        u_N: u * depth, replaced by u; NaN for points that are not farther than ``min_depth_m``.
        v_N: v * depth, replaced by v likewise.
        depth_N: along the optical axis, metres; may be negative.
        width: of the image; this and what follows may be (N,), where the points are of several images.
        height: of the image.
        min_depth_m: nearer points do not count: they may lie on the car itself.
        border_px: width of the image's margin that does not count.

    Returns:
        (N,) bool.
    """
    scale_N = np.where(depth_N > min_depth_m, depth_N, np.nan)
    u_N /= scale_N
    v_N /= scale_N
    return (u_N > border_px) & (u_N < width - border_px) & (v_N > border_px) & (v_N < height - border_px)
