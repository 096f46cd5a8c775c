"""Depth images of a cloud from virtual cameras at one place: PointCLIP (Zhang et al., CVPR 2022) for scenes.

PointCLIP looks at an object from six sides; in a scene the sensor stands inside and looks around. Six level views, one
every 60 degrees and each 110 degrees wide, show every direction up to about 33 degrees above and below the horizon,
which contains the whole field of a spinning LiDAR. Six tilted views show the rest (a room's floor and ceiling), so that
together they show every direction. No real camera or calibration is used.

Legend: V views, N points, P (view, point) pairs, H x W pixels. A cloud has z up; a view x right, y down, z forward.
Pixel (i, j) covers [i, i + 1) x [j, j + 1). Metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import max_pool2d

FIELD_OF_VIEW_DEG = (110.0, 75.0)
"""Horizontal and vertical, of a view of any shape; its pixels are square at the paper's 416 x 224."""
_LEVEL = tuple((60.0 * step, 0.0) for step in range(6))
_TILTED = tuple((120.0 * step + turn, pitch) for pitch, turn in ((-60.0, 0.0), (60.0, 60.0)) for step in range(3))
YAW_PITCH_DEG = (*_LEVEL, *_TILTED)
"""Per view, its turn to the left of the cloud's x axis and its pitch upwards; the level views come first."""
_MIN_DEPTH_M = 0.01
_DARKEST = 0.2
"""Brightness of the farthest point; the image is black where no point falls."""


@dataclass(frozen=True)
class Projected:
    """Which view shows which point, and where, also if a nearer point hides it; ordered by view, then by point."""

    view_P: torch.Tensor
    """int64 from 0."""
    point_P: torch.Tensor
    """int64, row of the cloud."""
    pixel_P2: torch.Tensor
    """(u right, v down), pixels; divided by (W, H) it is a relative position."""
    depth_P: torch.Tensor
    """Along the optical axis."""
    read_back_P: torch.Tensor
    """bool, whether the point is to be read back from the view: from a tilted one only if no level view shows it."""


def view_from_cloud() -> np.ndarray:
    """Rotations from the cloud's frame into every view's.

    Returns:
        (V, 3, 3) float64.
    """
    yaw_V, pitch_V = np.deg2rad(np.array(YAW_PITCH_DEG)).T
    level_V = np.zeros_like(yaw_V)
    forward_V3 = np.stack((np.cos(pitch_V) * np.cos(yaw_V), np.cos(pitch_V) * np.sin(yaw_V), np.sin(pitch_V)), axis=1)
    right_V3 = np.stack((np.sin(yaw_V), -np.cos(yaw_V), level_V), axis=1)
    return np.stack((right_V3, np.cross(forward_V3, right_V3), forward_V3), axis=1)


def project_into_views(points_N3: torch.Tensor, height: int, width: int) -> Projected:
    """Project a cloud into every view.

    Args:
        points_N3: with the sensor at the origin.
        height: H of every view.
        width: W.

    Returns:
        The pairs, of those views that at least one point is to be read back from.
    """
    rotation_V33 = torch.from_numpy(view_from_cloud()).to(points_N3)
    x_VN, y_VN, depth_VN = torch.einsum("vij,nj->ivn", rotation_V33, points_N3)
    focal_u, focal_v = np.array((width, height)) / 2 / np.tan(np.deg2rad(FIELD_OF_VIEW_DEG) / 2)
    in_front_VN = depth_VN > _MIN_DEPTH_M
    scale_VN = 1 / depth_VN.clamp(min=_MIN_DEPTH_M)
    u_VN, v_VN = x_VN * scale_VN * focal_u + width / 2, y_VN * scale_VN * focal_v + height / 2
    inside_VN = in_front_VN & (u_VN >= 0) & (u_VN < width) & (v_VN >= 0) & (v_VN < height)
    read_back_VN = inside_VN.clone()
    read_back_VN[len(_LEVEL) :] &= ~inside_VN[: len(_LEVEL)].any(0)
    inside_VN &= read_back_VN.any(1, keepdim=True)
    view_P, point_P = inside_VN.nonzero(as_tuple=True)
    return Projected(
        view_P=view_P,
        point_P=point_P,
        pixel_P2=torch.stack((u_VN[inside_VN], v_VN[inside_VN]), dim=1),
        depth_P=depth_VN[inside_VN],
        read_back_P=read_back_VN[inside_VN],
    )


def render(projected: Projected, height: int, width: int) -> torch.Tensor:
    """Depth images in which nearer points are brighter, and the nearest point in a pixel wins.

    Brightness falls with the logarithm of depth, as depths in a street span two orders of magnitude: from 1 for the
    cloud's nearest percent to 0.2 for its farthest. Points are widened into squares of about 2% of the height, which
    closes the gaps between a LiDAR's beams.

    Args:
        projected: pairs, from :func:`project_into_views`.
        height: H.
        width: W.

    Returns:
        (V, H, W) float32 in [0, 1], for all V views; black where no point falls.
    """
    images_L = torch.zeros(len(YAW_PITCH_DEG) * height * width, device=projected.depth_P.device)
    if len(projected.depth_P):
        log_P = projected.depth_P.float().log()
        ordered_P = log_P.sort().values
        outside = len(ordered_P) // 100
        near, far = ordered_P[outside], ordered_P[-1 - outside]
        share_P = ((log_P - near) / (far - near).clamp(min=1e-6)).clamp(0, 1)
        column_P, row_P = projected.pixel_P2.long().unbind(1)
        pixel_P = (projected.view_P * height + row_P) * width + column_P
        images_L.scatter_reduce_(0, pixel_P, 1 - (1 - _DARKEST) * share_P, reduce="amax")
    images_VHW = images_L.view(-1, height, width)
    radius = max(1, round(height / 100))
    return max_pool2d(images_VHW[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]
