"""The index: one Parquet row a keyframe, the only description of a dataset that later stages read.

Poses are 4 x 4 float64 transforms named ``target_from_source``; paths are relative to the dataset's root.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip2scene.config import Clip2sceneError, digest_of
from clip2scene.storage import writing

FORMAT = "clip2scene-index-1"


class DataError(Clip2sceneError, ValueError):
    """A dataset file that is missing, damaged or contradicts its tables."""


@dataclass(frozen=True)
class Sweep:
    """One LiDAR sweep: the cloud's file, the pose of its sensor at its own time, and that time."""

    path: str
    world_from_lidar: np.ndarray
    timestamp_us: int


@dataclass(frozen=True)
class Camera:
    """One calibrated image, with the pose of its camera at its own time."""

    name: str
    image_path: str
    width: int
    height: int
    intrinsics: np.ndarray
    """(3, 3), pixels."""
    camera_from_world: np.ndarray
    """(4, 4); x right, y down, z forward, metres."""
    timestamp_us: int
    depth_path: str | None = None


@dataclass(frozen=True)
class Frame:
    """A keyframe: its cloud, earlier sweeps (nearest in time first), its images and its label file if there is one."""

    frame_id: str
    scene: str
    timestamp_us: int
    cloud_path: str
    world_from_lidar: np.ndarray
    sweeps: tuple[Sweep, ...]
    cameras: tuple[Camera, ...]
    label_path: str | None


@dataclass(frozen=True)
class Index:
    """All keyframes of a dataset version, in scene and time order."""

    dataset: str
    """Kind of dataset (``nuscenes``, ``semantickitti`` or ``scannet``): decides its classes and its splits."""
    root: Path
    version: str
    frames: tuple[Frame, ...]
    left_out: tuple[str, ...] = ()
    """A sentence each: what the builder left out, as a pose is not finite or a mesh is missing. Not in the digest."""

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the contents, independent of where the dataset lies."""
        return digest_of(FORMAT, self.dataset, self.version, [_row(frame) for frame in self.frames])

    def frame(self, frame_id: str) -> Frame:
        """The keyframe of that id.

        Raises:
            DataError: no such frame.
        """
        for frame in self.frames:
            if frame.frame_id == frame_id:
                return frame
        raise DataError(f"frame {frame_id!r} is not in the index of {self.root} ({len(self.frames)} frames)")

    def select(self, scenes: frozenset[str]) -> tuple[Frame, ...]:
        """Frames of the given scenes, in order."""
        return tuple(frame for frame in self.frames if frame.scene in scenes)


_POSE = pa.list_(pa.float64(), 16)
_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("scene", pa.string()),
        ("timestamp_us", pa.int64()),
        ("cloud_path", pa.string()),
        ("world_from_lidar", _POSE),
        (
            "sweeps",
            pa.list_(pa.struct([("path", pa.string()), ("world_from_lidar", _POSE), ("timestamp_us", pa.int64())])),
        ),
        (
            "cameras",
            pa.list_(
                pa.struct(
                    [
                        ("name", pa.string()),
                        ("image_path", pa.string()),
                        ("width", pa.int32()),
                        ("height", pa.int32()),
                        ("intrinsics", pa.list_(pa.float64(), 9)),
                        ("camera_from_world", _POSE),
                        ("timestamp_us", pa.int64()),
                        ("depth_path", pa.string()),
                    ]
                )
            ),
        ),
        ("label_path", pa.string()),
    ]
)


def write_index(index: Index, path: str | Path) -> None:
    """Write the index as Parquet, atomically; the root is kept as an absolute path in the file's metadata.

    Raises:
        StorageError: the disk is full or refuses.
    """
    path = Path(path)
    about = {
        "format": FORMAT,
        "dataset": index.dataset,
        "root": str(index.root.resolve()),
        "version": index.version,
        "left_out": index.left_out,
    }
    table = pa.Table.from_pylist([_row(frame) for frame in index.frames], schema=_SCHEMA)
    table = table.replace_schema_metadata({"clip2scene": json.dumps(about)})
    with writing(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def read_index(path: str | Path, root: str | Path | None = None) -> Index:
    """Read an index; ``root`` replaces the dataset folder that it was built from.

    Raises:
        DataError: the file is missing, damaged or no index.
    """
    path = Path(path)
    try:
        table = pq.read_table(path, partitioning=None)
        about = json.loads((table.schema.metadata or {}).get(b"clip2scene", b"{}"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such index file") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from error
    if about.get("format") != FORMAT:
        raise DataError(f"{path}: not an index of this version (format {about.get('format')!r}, expected {FORMAT!r})")
    frames = tuple(_frame(row) for row in table.to_pylist())
    root = Path(root if root is not None else about["root"])
    return Index(about["dataset"], root, about["version"], frames, tuple(about.get("left_out", ())))


def _row(frame: Frame) -> dict[str, Any]:
    return {
        "frame_id": frame.frame_id,
        "scene": frame.scene,
        "timestamp_us": frame.timestamp_us,
        "cloud_path": frame.cloud_path,
        "world_from_lidar": _flat(frame.world_from_lidar),
        "sweeps": [
            {"path": s.path, "world_from_lidar": _flat(s.world_from_lidar), "timestamp_us": s.timestamp_us}
            for s in frame.sweeps
        ],
        "cameras": [
            {
                "name": c.name,
                "image_path": c.image_path,
                "width": c.width,
                "height": c.height,
                "intrinsics": _flat(c.intrinsics),
                "camera_from_world": _flat(c.camera_from_world),
                "timestamp_us": c.timestamp_us,
                "depth_path": c.depth_path,
            }
            for c in frame.cameras
        ],
        "label_path": frame.label_path,
    }


def _frame(row: dict[str, Any]) -> Frame:
    return Frame(
        frame_id=row["frame_id"],
        scene=row["scene"],
        timestamp_us=row["timestamp_us"],
        cloud_path=row["cloud_path"],
        world_from_lidar=_square(row["world_from_lidar"], 4),
        sweeps=tuple(Sweep(s["path"], _square(s["world_from_lidar"], 4), s["timestamp_us"]) for s in row["sweeps"]),
        cameras=tuple(
            Camera(
                name=c["name"],
                image_path=c["image_path"],
                width=c["width"],
                height=c["height"],
                intrinsics=_square(c["intrinsics"], 3),
                camera_from_world=_square(c["camera_from_world"], 4),
                timestamp_us=c["timestamp_us"],
                depth_path=c["depth_path"],
            )
            for c in row["cameras"]
        ),
        label_path=row["label_path"],
    )


def _flat(matrix: np.ndarray) -> list[float]:
    return [float(value) for value in np.asarray(matrix).ravel()]


def _square(values: list[float], size: int) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(size, size)
