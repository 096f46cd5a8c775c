"""The index: one Parquet row per keyframe, the only description of a dataset that later stages read.

Poses are 4 x 4 float64 transforms named ``target_from_source``; paths are relative to the dataset's root.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip2scene.data.dataroot import DataRoot
from clip2scene.errors import DataError, one_line

FORMAT = "clip2scene-index-2"
_SAMPLED = 64


@dataclass(frozen=True)
class Sweep:
    """One LiDAR sweep: the cloud's file, its own time, and the sensor's pose at that time."""

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
    """A keyframe: its cloud, earlier sweeps (nearest in time first), images, and label file if there is one."""

    frame_id: str
    scene: str
    timestamp_us: int
    cloud_path: str
    world_from_lidar: np.ndarray
    sweeps: tuple[Sweep, ...]
    cameras: tuple[Camera, ...]
    label_path: str | None
    cloud_token: str | None = field(default_factory=lambda: None)  # a default would hide the table's from __getattr__
    """nuScenes: token of the cloud's record, by which the benchmark names its files. Not in any digest."""

    def __getattr__(self, name: str) -> Any:
        """Decodes a field from the Arrow table on access: as Python objects they would be ten times larger.

        Nothing is cached, so that a worker's memory does not grow with the keyframes that it has seen.
        """
        if name not in _LAZY or "_table" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return _LAZY[name](vars(self)["_table"].column(name)[vars(self)["_row"]])


class Digests(NamedTuple):
    """Hashes of an index (16 hex characters each)."""

    whole: str
    """Of everything."""
    unlabelled: str
    """Of everything except the label files: what is learned without labels keeps its digest when labels are added."""
    images: str
    """Of frame ids and images, which are all that a teacher's features depend on."""


class Contents(NamedTuple):
    """Hashes (16 hex characters each) of sampled files of each kind, and what tells that these have changed."""

    images: str
    clouds: str
    """Of keyframes and sweeps, and depth maps."""
    labels: str
    files: tuple[tuple[str, int, int], ...]
    """Path, bytes and time of modification (ns) of every sampled file. Not in any digest."""

    @property
    def hashes(self) -> tuple[str, str, str]:
        """Of images, clouds and labels."""
        return self.images, self.clouds, self.labels


@dataclass(frozen=True)
class Index:
    """All keyframes of a dataset version, in scene and time order."""

    dataset: str
    """Kind of dataset (``nuscenes``, ``semantickitti`` or ``scannet``), which decides classes and splits."""
    root: DataRoot
    version: str
    frames: tuple[Frame, ...]
    left_out: tuple[str, ...] = ()
    """One sentence per thing that was skipped (non-finite pose, missing mesh). Not in the digest."""
    contents: Contents | None = None
    """Not known of an index that was built without reading its files."""

    @property
    def digest(self) -> str:
        """Hash of the dataset, whatever folder it lies in."""
        return self.digests.whole

    @functools.cached_property
    def digests(self) -> Digests:
        """Hashes of the dataset and of parts of it, for artifacts that depend only on these parts."""
        # As digest_of(FORMAT, ..., hashes, rows), but row by row: one text would be a gigabyte for nuScenes.
        start = ",".join(map(_json, (FORMAT, self.dataset, self.version)))
        hashes = self.contents.hashes if self.contents else ()
        whole, unlabelled, images = (
            hashlib.sha256(f"[{start},{_json(known)},[".encode()) for known in (hashes, hashes[:2], hashes[:1])
        )
        for number, row in enumerate(map(_row, self.frames)):
            comma, text, label = "," * bool(number), _json(row), _json(row["label_path"])
            whole.update(f"{comma}{text}".encode())
            # Replaced in the text, as encoding the row again would take most of the time. The text of a key cannot
            # occur within a value, where its quotes would be escaped.
            bare = text.replace(f'"label_path":{label}', '"label_path":null')
            unlabelled.update(f"{comma}{bare}".encode())
            seen = [[camera[key] for key in ("name", "image_path", "width", "height")] for camera in row["cameras"]]
            images.update(f"{comma}{_json([row['frame_id'], seen])}".encode())
        for hashed in (whole, unlabelled, images):
            hashed.update(b"]]")
        return Digests(*(hashed.hexdigest()[:16] for hashed in (whole, unlabelled, images)))

    def frame(self, frame_id: str) -> Frame:
        """The keyframe of that id.

        Raises:
            DataError: no such frame.
        """
        for frame in self.frames:
            if frame.frame_id == frame_id:
                return frame
        raise DataError(f"frame {frame_id!r} is not in the index of {self.root.path} ({len(self.frames)} frames)")

    def select(self, scenes: frozenset[str]) -> tuple[Frame, ...]:
        """Frames of the given scenes, in order."""
        return tuple(frame for frame in self.frames if frame.scene in scenes)


def sampled(frames: Sequence[Frame]) -> list[Frame]:
    """At most 64 of the frames, spread evenly from the first to the last."""
    rows = np.linspace(0, len(frames) - 1, min(len(frames), _SAMPLED)).astype(int)
    return [frames[row] for row in rows.tolist()]


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
        ("cloud_token", pa.string()),
    ]
)


def write_index(index: Index, path: str | Path) -> None:
    """Write the index as Parquet, not atomically, with the absolute path of its root in the file's metadata."""
    about = {
        "format": FORMAT,
        "dataset": index.dataset,
        "root": str(index.root.path.resolve()),
        "version": index.version,
        "left_out": index.left_out,
        "contents": index.contents,
        "digests": index.digests._asdict(),  # computing them takes longer than reading the file
    }
    rows = [_row(frame) | {"cloud_token": frame.cloud_token} for frame in index.frames]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    table = table.replace_schema_metadata({"clip2scene": json.dumps(about)})
    pq.write_table(table, path, compression="zstd")


def read_index(path: str | Path, root: str | Path | None = None, linked_folders: Iterable[str | Path] = ()) -> Index:
    """Read an index.

    Args:
        path: its file.
        root: the dataset's folder; the one that the index was built from when not given.
        linked_folders: folders outside of the root to which links in it may lead. The file does not tell them: as a
            file from elsewhere, it must not lead anywhere.

    Raises:
        DataError: the file is missing, damaged or not an index.
    """
    path = Path(path)
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        about = json.loads((table.schema.metadata or {}).get(b"clip2scene", b"{}"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such index file") from error
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    if about.get("format") != FORMAT:
        raise DataError(f"{path}: not an index of this version (format {about.get('format')!r}, expected {FORMAT!r})")
    if "cloud_token" not in table.column_names:  # written before there were any
        table = table.append_column("cloud_token", pa.nulls(len(table), pa.string()))
    # Arrow would keep the memory that it decoded the file in, which is more than the table's own.
    pa.default_memory_pool().release_unused()
    data_root = DataRoot.at(about["root"] if root is None else root, linked_folders)
    contents = about["contents"]
    if contents is not None:
        images, clouds, labels, files = contents
        contents = Contents(images, clouds, labels, tuple(map(tuple, files)))
    index = Index(about["dataset"], data_root, about["version"], _frames(table), tuple(about["left_out"]), contents)
    # The cached property's value, and not a field, which dataclasses.replace would copy to an index of other frames.
    vars(index)["digests"] = Digests(**about["digests"])
    return index


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


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


def _frames(table: pa.Table) -> tuple[Frame, ...]:
    """One frame per row. All share the table, and are sent to a worker with one copy of it."""
    names: dict[str, str] = {}
    frames = []
    ids, scenes = (table.column(name).to_pylist() for name in ("frame_id", "scene"))
    for row, (frame_id, scene) in enumerate(zip(ids, scenes, strict=True)):
        frame = object.__new__(Frame)
        vars(frame).update(frame_id=frame_id, scene=names.setdefault(scene, scene), _table=table, _row=row)
        frames.append(frame)
    return tuple(frames)


def _value(cell: pa.Scalar) -> Any:
    return cell.as_py()


def _pose(cell: pa.Scalar) -> np.ndarray:
    return _matrices(cell.values, 4)[0]


def _matrices(numbers: pa.Array, size: int) -> np.ndarray:
    """(M, size, size) float64 copies, so that a pose does not keep the table alive."""
    return np.array(numbers, dtype=np.float64).reshape(-1, size, size)


def _sweeps(cell: pa.Scalar) -> tuple[Sweep, ...]:
    paths, poses, times = (cell.values.field(name) for name in ("path", "world_from_lidar", "timestamp_us"))
    return tuple(map(Sweep, paths.to_pylist(), _matrices(poses.flatten(), 4), times.to_pylist()))


def _cameras(cell: pa.Scalar) -> tuple[Camera, ...]:
    columns = {field.name: cell.values.field(field.name) for field in cell.values.type}
    columns = {
        "intrinsics": list(_matrices(columns.pop("intrinsics").flatten(), 3)),
        "camera_from_world": list(_matrices(columns.pop("camera_from_world").flatten(), 4)),
        **{name: column.to_pylist() for name, column in columns.items()},
    }
    return tuple(Camera(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))


_LAZY: dict[str, Callable[[pa.Scalar], Any]] = {
    "timestamp_us": _value,
    "cloud_path": _value,
    "world_from_lidar": _pose,
    "sweeps": _sweeps,
    "cameras": _cameras,
    "label_path": _value,
    "cloud_token": _value,
}
"""Fields of a frame that are decoded on access, from their cells in the table."""


def _flat(matrix: np.ndarray) -> list[float]:
    return [float(value) for value in np.asarray(matrix).ravel()]
