"""Rigid transforms between sensor frames, and the earlier sweeps that are added to a keyframe.

A transform is a 4 x 4 float64 matrix named ``target_from_source``. Units are metres and microseconds. World coordinates
reach 1e4 m, where float32 resolves 1 mm, so transforms are composed in float64 before they are applied.

Legend: N points.
"""

from __future__ import annotations

import numpy as np

from clip2scene.data.index import Frame, Sweep
from clip2scene.data.poses import inverse

HALF_SWEEP_US = 25_000
"""Half the period of nuScenes' 20 Hz LiDAR: how far the last sweep may lie outside the window."""


def transform(target_from_source: np.ndarray, points_N3: np.ndarray) -> np.ndarray:
    """Move points from a source frame to a target frame.

    Args:
        target_from_source: (4, 4) rigid transform.
        points_N3: (N, 3) coordinates in the source frame, metres.

    Returns:
        (N, 3) coordinates in the target frame, computed in float64 and returned in the points' own floating type.

    Example:
        >>> one_metre_up = np.eye(4)
        >>> one_metre_up[2, 3] = 1
        >>> transform(one_metre_up, np.array([[5.0, 0.0, 0.0]]))
        array([[5., 0., 1.]])
    """
    matrix = np.asarray(target_from_source, dtype=np.float64)
    moved_N3 = points_N3.astype(np.float64, copy=False) @ matrix[:3, :3].T + matrix[:3, 3]
    return moved_N3.astype(np.result_type(points_N3.dtype, np.float32), copy=False)


def register(points_N3: np.ndarray, world_from_source: np.ndarray, world_from_target: np.ndarray) -> np.ndarray:
    """Express a sweep's points in the keyframe's LiDAR frame, each sensor pose taken at its own time.

    Args:
        points_N3: (N, 3) points in the sweep's LiDAR frame, metres.
        world_from_source: (4, 4) pose of the LiDAR at the sweep's time.
        world_from_target: (4, 4) pose of the LiDAR at the keyframe's time.

    Returns:
        (N, 3) points in the keyframe's LiDAR frame, in the points' own floating type.

    Example:
        >>> earlier, later = np.eye(4), np.eye(4)
        >>> later[0, 3] = 2  # the car has driven two metres along x
        >>> register(np.array([[10.0, 0.0, 0.0]]), earlier, later)
        array([[8., 0., 0.]])
    """
    return transform(inverse(world_from_target) @ np.asarray(world_from_source, dtype=np.float64), points_N3)


def without_ego_returns(points_NI: np.ndarray, half_edge_m: float) -> np.ndarray:
    """The points outside a square around the sensor, which the car itself returns.

    Once the car has moved on, an earlier sweep's returns from it lie in view of the keyframe's cameras, and would be
    paired with what these see there. Source: nuscenes-devkit, ``LidarPointCloud.from_file_multisweep``
    (``remove_close``); the released code's ``get_sweep`` does the same.

    Args:
        points_NI: x and y first, metres, in the sensor's own frame.
        half_edge_m: half the square's edge; 0 leaves all points.
    """
    return points_NI[(np.abs(points_NI[:, :2]) >= half_edge_m).any(axis=1)]


def choose_sweeps(frame: Frame, num_sweeps: int, window_s: float) -> tuple[Sweep, ...]:
    """The K - 1 earlier sweeps that a keyframe is trained with (CLIP2Scene: K sweeps within S seconds).

    K - 1 times are spread evenly over the window, the last at its far end, and each takes the nearest sweep that is
    still free. The choice depends on the index alone, so that every run and rank makes the same.

    Args:
        frame: the keyframe, with its earlier sweeps.
        num_sweeps: K, the keyframe included.
        window_s: S, seconds before the keyframe.

    Returns:
        At most K - 1 sweeps, nearest in time first; fewer where the window holds fewer, as at a scene's start.
    """
    window_us = window_s * 1e6
    left = [sweep for sweep in frame.sweeps if frame.timestamp_us - sweep.timestamp_us <= window_us + HALF_SWEEP_US]
    chosen: list[Sweep] = []
    for step in range(1, num_sweeps):
        if not left:
            break
        wanted_us = frame.timestamp_us - window_us * step / (num_sweeps - 1)
        distances_us = [abs(sweep.timestamp_us - wanted_us) for sweep in left]
        chosen.append(left.pop(int(np.argmin(distances_us))))
    return tuple(sorted(chosen, key=lambda sweep: -sweep.timestamp_us))
