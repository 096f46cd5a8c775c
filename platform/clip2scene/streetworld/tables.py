"""Rows of the official nuScenes tables, and the names of its scenes.

Tokens are 32 hexadecimal characters, a hash of what identifies the row, so that a world has the same tokens however
many processes write it.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np

from clip2scene.data.splits import nuscenes_scenes
from clip2scene.streetworld.sensors import CAMERA_NAMES, LIDAR
from clip2scene.streetworld.world import CATEGORIES

VERSION = "v1.0-trainval"
Row = dict[str, Any]
TABLES = (
    "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
    "sample", "sample_data", "sample_annotation", "map", "lidarseg",
)  # fmt: skip

_ATTRIBUTES = {
    "vehicle.moving": "Vehicle is moving.",
    "vehicle.parked": "Vehicle is stationary and parked.",
    "cycle.with_rider": "There is a rider on the bicycle or motorcycle.",
    "cycle.without_rider": "There is NO rider on the bicycle or motorcycle.",
    "pedestrian.standing": "The human is standing.",
    "pedestrian.moving": "The human is moving.",
}
_VISIBILITY = {"1": (0, 40), "2": (40, 60), "3": (60, 80), "4": (80, 100)}


def scene_names(train: int, val: int) -> list[str]:
    """The first ``train`` names of the official train split, then ``val`` of the val split."""
    return [*sorted(nuscenes_scenes("train"))[:train], *sorted(nuscenes_scenes("val"))[:val]]


def token(*parts: object) -> str:
    """32 hexadecimal characters, a hash of ``parts``."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def category_token(category: int) -> str:
    """Token of the raw category with that index."""
    return token("category", category)


def sensor_token(channel: str) -> str:
    """Token of a sensor's row."""
    return token("sensor", channel)


def attribute_of(category: int, speed_m_s: float) -> list[str]:
    """Tokens of the attributes of an object of a raw category; none for things without a state."""
    name = CATEGORIES[category]
    if name in ("vehicle.bicycle", "vehicle.motorcycle"):
        state = "cycle.with_rider" if speed_m_s else "cycle.without_rider"
    elif name.startswith("vehicle."):
        state = "vehicle.moving" if speed_m_s else "vehicle.parked"
    elif name.startswith("human."):
        state = "pedestrian.moving" if speed_m_s else "pedestrian.standing"
    else:
        return []
    return [token("attribute", state)]


def visibility_of(share: float) -> str:
    """Token of the visibility level of an object, from the share of it that the cameras see."""
    return next((level for level, (_, high) in _VISIBILITY.items() if 100 * share < high), "4")


def shared_rows() -> dict[str, list[Row]]:
    """The rows that every world has: categories, attributes, visibility levels and sensors."""
    return {
        "category": [
            {"token": category_token(i), "name": name, "description": "", "index": i}
            for i, name in enumerate(CATEGORIES)
        ],
        "attribute": [
            {"token": token("attribute", name), "name": name, "description": text} for name, text in _ATTRIBUTES.items()
        ],
        "visibility": [
            {
                "token": level,
                "level": f"v{low}-{high}",
                "description": f"visibility of whole object is between {low} and {high}%",
            }
            for level, (low, high) in _VISIBILITY.items()
        ],
        "sensor": [
            {"token": sensor_token(channel), "channel": channel, "modality": "lidar" if channel == LIDAR else "camera"}
            for channel in (LIDAR, *CAMERA_NAMES)
        ],
    }


def link(rows: list[Row]) -> None:
    """Fill ``prev`` and ``next`` of rows in time order."""
    for before, after in itertools.pairwise(rows):
        before["next"], after["prev"] = after["token"], before["token"]


def translation(pose: np.ndarray) -> list[float]:
    """Position of a pose (4, 4)."""
    return pose[:3, 3].tolist()


def quaternion(pose: np.ndarray) -> list[float]:
    """Rotation of a pose (4, 4) as a unit quaternion w, x, y, z."""
    m = pose[:3, :3]
    symmetric = np.array(
        [
            [m[0, 0] - m[1, 1] - m[2, 2], 0, 0, 0],
            [m[0, 1] + m[1, 0], m[1, 1] - m[0, 0] - m[2, 2], 0, 0],
            [m[0, 2] + m[2, 0], m[1, 2] + m[2, 1], m[2, 2] - m[0, 0] - m[1, 1], 0],
            [m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], m[0, 0] + m[1, 1] + m[2, 2]],
        ]
    )
    x, y, z, w = np.linalg.eigh(symmetric)[1][:, -1]
    sign = 1.0 if w >= 0 else -1.0
    return [float(sign * value) for value in (w, x, y, z)]
