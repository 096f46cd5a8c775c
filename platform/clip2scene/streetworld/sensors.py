"""The sensor rig: where cameras and LiDAR sit on the ego vehicle, when they fire, and their calibration in the tables.

Frames as in nuScenes: ego x forward, y left, z up; camera x right, y down, z forward; LiDAR x right, y forward, z up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LIDAR = "LIDAR_TOP"
_LIDAR_POSITION_M = (0.94, 0.0, 1.84)
_CAMERAS: dict[str, tuple[tuple[float, float, float], float, float, float]] = {
    "CAM_FRONT": ((1.70, 0.02, 1.51), 0.0, 70.0, -0.035),
    "CAM_FRONT_RIGHT": ((1.55, -0.49, 1.50), -55.0, 70.0, -0.027),
    "CAM_FRONT_LEFT": ((1.52, 0.49, 1.51), 55.0, 70.0, -0.043),
    "CAM_BACK": ((0.03, 0.0, 1.57), 180.0, 110.0, -0.010),
    "CAM_BACK_LEFT": ((1.04, 0.48, 1.59), 110.0, 70.0, 0.001),
    "CAM_BACK_RIGHT": ((1.01, -0.48, 1.56), -110.0, 70.0, -0.020),
}
"""Position in the ego frame (m), yaw (degrees), horizontal field of view (degrees), time relative to the LiDAR (s)."""
CAMERA_NAMES = tuple(_CAMERAS)


@dataclass(frozen=True)
class CameraModel:
    """The true model of a camera; pixel (i, j) covers [i, i + 1) x [j, j + 1)."""

    name: str
    width: int
    height: int
    focal_px: float
    ego_from_camera: np.ndarray
    """(4, 4)."""
    delay_s: float
    """When it fires, relative to the LiDAR keyframe."""

    @property
    def intrinsics(self) -> np.ndarray:
        """(3, 3)."""
        return np.array([[self.focal_px, 0, self.width / 2], [0, self.focal_px, self.height / 2], [0, 0, 1.0]])


@dataclass(frozen=True)
class Rig:
    """All sensors of a scene's vehicle, with their true poses and the calibrated ones."""

    cameras: tuple[CameraModel, ...]
    ego_from_lidar: np.ndarray
    calibrated: dict[str, np.ndarray]
    """By channel, ego_from_sensor (4, 4) as written to the tables: the true pose with slight noise."""
    calibrated_intrinsics: dict[str, np.ndarray]


def make_rig(rng: np.random.Generator, width: int, height: int) -> Rig:
    """A rig with a calibration error of about a centimetre, a tenth of a degree and 0.2% of focal length."""
    cameras = []
    for name, (position, yaw, view, delay) in _CAMERAS.items():
        pose = np.eye(4)
        right, forward = _heading(yaw - 90), _heading(yaw)
        pose[:3, :3] = np.stack([right, [0, 0, -1], forward], axis=1)
        pose[:3, 3] = position
        focal = width / 2 / np.tan(np.deg2rad(view / 2))
        cameras.append(CameraModel(name, width, height, float(focal), pose, delay))
    lidar = np.eye(4)
    lidar[:3, :3] = np.stack([_heading(-90), _heading(0), [0, 0, 1]], axis=1)
    lidar[:3, 3] = _LIDAR_POSITION_M
    truth = {camera.name: camera.ego_from_camera for camera in cameras} | {LIDAR: lidar}
    calibrated = {name: disturb(rng, pose, 0.008, np.deg2rad(0.08)) for name, pose in truth.items()}
    intrinsics = {}
    for camera in cameras:
        intrinsics[camera.name] = camera.intrinsics * (1 + rng.normal(0, 0.002))
        intrinsics[camera.name][:2, 2] = width / 2 + rng.normal(0, 0.3), height / 2 + rng.normal(0, 0.3)
        intrinsics[camera.name][2] = 0, 0, 1
    return Rig(tuple(cameras), lidar, calibrated, intrinsics)


def disturb(rng: np.random.Generator, pose: np.ndarray, shift_m: float, angle_rad: float) -> np.ndarray:
    """A rigid pose (4, 4) with Gaussian noise on its position and its rotation."""
    x, y, z = rng.normal(0, angle_rad, 3)
    small = np.array([[1, -z, y], [z, 1, -x], [-y, x, 1]])
    left, _, right = np.linalg.svd(pose[:3, :3] @ small)
    result = np.eye(4)
    result[:3, :3] = left @ right
    result[:3, 3] = pose[:3, 3] + rng.normal(0, shift_m, 3)
    return result


def _heading(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), 0.0])
