"""Builds the index from nuScenes' official tables. Only this imports nuscenes-devkit, never a worker.

The devkit loads the tables; what it does not check is checked here: that every pose is a finite rigid transform, that
every file that the index names exists, and that no path leaves the dataset's folder. Where the devkit itself fails,
:mod:`clip2scene.data.nuscenes_tables` finds the reason.

The tables are those of all scenes, also where only some of the ten archives of sensor files were downloaded, each with
those of 85 whole scenes.

Poses are float64, as nuScenes' world coordinates reach 1e4 m.

Legend: M sensor records.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from clip2scene.data.dataroot import DataRoot, DatasetFiles, check_relative
from clip2scene.data.index import Camera, Frame, Index, Sweep
from clip2scene.data.nuscenes_tables import check_tables, explain
from clip2scene.data.poses import check_pinhole, inverse
from clip2scene.errors import DataError, one_line

LIDAR = "LIDAR_TOP"
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")
"""Order of ``Frame.cameras``: clockwise from the front."""

_UNIT_TOLERANCE = 1e-3
"""How far a quaternion's norm may be from 1: rounding is normalised away, and more is a damaged pose."""

_PARTIAL = "allowed: all files of a scene's keyframes or none, in which case the scene is left out"
_ONLY_KEYFRAMES = "allowed: dataset.max_sweeps=0 (`clip2scene index`: --max-sweeps 0) if only keyframes were downloaded"

Record = dict[str, Any]


def build_index(root: Path, version: str, *, max_sweeps: int = 10, linked_folders: Iterable[Path] = ()) -> Index:
    """Index every keyframe of a nuScenes dataset: cloud, earlier sweeps, six images, poses, labels if there are any.

    A scene of which no cloud and no image of any keyframe is on disk was not downloaded: it is left out, and
    ``Index.left_out`` reports how many are. In other scenes no file may be missing.

    Args:
        root: the dataset's folder, which holds ``version``, ``samples`` and ``sweeps``.
        version: its folder of tables, e.g. ``v1.0-trainval``, ``v1.0-mini`` or ``v1.0-test``.
        max_sweeps: earlier LiDAR sweeps to list per keyframe, nearest first; fewer at a scene's start. They may be
            keyframes themselves.
        linked_folders: folders outside of the root to which links in it may lead.

    Returns:
        The index, with keyframes ordered by scene name and then by time.

    Raises:
        DataError: no scene is on disk, a table or a sensor file is missing or damaged, a record refers to one that
            does not exist, a pose is not a finite rigid transform, or a path leaves the root.
    """
    data_root = DataRoot.at(root, linked_folders)
    tables = data_root.path / version
    nusc = _load(data_root, version)
    try:
        return _build(nusc, data_root, version, max_sweeps)
    except KeyError as error:
        # Tokens are looked up with _get, so this is a record without one of its fields.
        raise DataError(f"{tables}: a record has no field {error}; the official schema is needed") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{tables}: a record is not as in the official schema ({error})") from error


def _load(root: DataRoot, version: str) -> Any:
    """The devkit's ``NuScenes`` object."""
    check_tables(root.path, version)
    from nuscenes.nuscenes import NuScenes

    try:
        return NuScenes(version=version, dataroot=str(root.path), verbose=False)
    except MemoryError:
        raise
    except Exception as error:
        # The devkit raises errors of any kind (KeyError, AssertionError, IndexError, bare Exception).
        explain(root, version)
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"{root.path / version}: nuscenes-devkit cannot load these tables ({reason})") from error


def _build(nusc: Any, root: DataRoot, version: str, max_sweeps: int) -> Index:
    for table in ("sample", "sample_data", "ego_pose", "calibrated_sensor", "scene"):
        _refuse_duplicates(getattr(nusc, table), table)
    for table in ("sample_data", "map", *(["lidarseg"] if hasattr(nusc, "lidarseg") else [])):
        for record in getattr(nusc, table):
            check_relative(record["filename"], f"{table}.json")

    if not nusc.sample:
        raise DataError(f"{root.path / version / 'sample.json'}: no keyframe; at least one is needed")
    files = DatasetFiles(root)
    samples, left_out = _on_disk(nusc, root, version, files)
    chains = [_lidar_chain(nusc, sample, max_sweeps) for sample in samples]
    images = [[_keyframe_data(nusc, sample, channel) for channel in CAMERAS] for sample in samples]
    world_from_sensor = _poses(nusc, (record for group in (*chains, *images) for record in group))
    label_paths = {record["sample_data_token"]: record["filename"] for record in getattr(nusc, "lidarseg", [])}

    frames = []
    for sample, (lidar, *sweeps), cameras in zip(samples, chains, images, strict=True):
        label_path = label_paths.get(lidar["token"])
        frame = Frame(
            frame_id=sample["token"],
            scene=_scene(nusc, sample),
            timestamp_us=_timestamp(lidar),
            cloud_path=files.existing(lidar["filename"], _name(lidar), _PARTIAL),
            world_from_lidar=world_from_sensor[lidar["token"]],
            sweeps=tuple(
                Sweep(
                    # A scene that lost its sweeps would silently be trained with a smaller K.
                    files.existing(sweep["filename"], _name(sweep), _ONLY_KEYFRAMES),
                    world_from_sensor[sweep["token"]],
                    _timestamp(sweep),
                )
                for sweep in sweeps
            ),
            cameras=tuple(_camera(nusc, image, world_from_sensor[image["token"]], files) for image in cameras),
            label_path=None if label_path is None else files.existing(label_path, f"lidarseg.json: {lidar['token']!r}"),
            cloud_token=lidar["token"],
        )
        frames.append(frame)
    return Index("nuscenes", root, version, tuple(frames), left_out)


def _on_disk(nusc: Any, root: DataRoot, version: str, files: DatasetFiles) -> tuple[list[Record], tuple[str, ...]]:
    """Keyframes of the scenes that are on disk, by scene name and time, and a sentence about the other scenes.

    Raises:
        DataError: no scene is on disk.
    """
    samples = sorted(nusc.sample, key=lambda sample: (_scene(nusc, sample), sample["timestamp"]))
    scenes = {name: list(group) for name, group in groupby(samples, key=lambda sample: _scene(nusc, sample))}
    absent = [name for name, keyframes in scenes.items() if not _is_there(nusc, keyframes, files)]
    if not absent:
        return samples, ()
    missing = _keyframe_data(nusc, scenes[absent[0]][0], LIDAR)["filename"]
    example = f"of {absent[0]}, file {missing} is missing below {root.path}"
    what = f"no cloud and no image of their keyframes is on disk ({example})"
    if len(absent) == len(scenes):
        raise DataError(f"{root.path / version}: none of its {len(scenes)} scenes can be indexed, as {what}")
    left_out = f"{version}: {len(absent)} of {len(scenes)} scenes left out, as {what}"
    return [sample for name, keyframes in scenes.items() if name not in absent for sample in keyframes], (left_out,)


def _is_there(nusc: Any, keyframes: list[Record], files: DatasetFiles) -> bool:
    """Whether any cloud or image of a scene's keyframes is on disk."""
    records = (_keyframe_data(nusc, sample, channel) for sample in keyframes for channel in (LIDAR, *CAMERAS))
    return any(files.holds(record["filename"]) for record in records)


def _lidar_chain(nusc: Any, sample: Record, max_sweeps: int) -> list[Record]:
    """Records of the keyframe's cloud and up to ``max_sweeps`` before it in the scene, going back in time."""
    chain = [_keyframe_data(nusc, sample, LIDAR)]
    while chain[-1]["prev"] and len(chain) <= max_sweeps:
        record = _get(nusc, "sample_data", chain[-1]["prev"], _name(chain[-1]))
        if _get(nusc, "sample", record["sample_token"], _name(record))["scene_token"] != sample["scene_token"]:
            break
        if record["channel"] != LIDAR or _timestamp(record) >= _timestamp(chain[-1]):
            raise DataError(f"{_name(chain[-1])}: prev {record['token']!r} is not an earlier sweep of {LIDAR}")
        chain.append(record)
    return chain


def _keyframe_data(nusc: Any, sample: Record, channel: str) -> Record:
    if channel not in sample["data"]:
        raise DataError(
            f"sample_data.json: sample {sample['token']!r} has no keyframe of {channel}; "
            f"{LIDAR} and six cameras are needed"
        )
    return _get(nusc, "sample_data", sample["data"][channel], f"sample {sample['token']!r}")


def _camera(nusc: Any, image: Record, world_from_camera: np.ndarray, files: DatasetFiles) -> Camera:
    calibration = _get(nusc, "calibrated_sensor", image["calibrated_sensor_token"], _name(image))
    name = f"calibrated_sensor.json: record {calibration['token']!r}"
    intrinsics = _numbers(calibration["camera_intrinsic"], (3, 3), name, "camera_intrinsic")
    check_pinhole(intrinsics, f"{name}: camera_intrinsic")
    for side in ("width", "height"):
        if not isinstance(image[side], int) or image[side] <= 0:
            raise DataError(f"{_name(image)}: {side} {image[side]!r} is not a positive number of pixels")
    return Camera(
        name=image["channel"],
        image_path=files.existing(image["filename"], _name(image), _PARTIAL),
        width=image["width"],
        height=image["height"],
        intrinsics=intrinsics,
        camera_from_world=inverse(world_from_camera),
        timestamp_us=_timestamp(image),
    )


def _poses(nusc: Any, records: Iterable[Record]) -> dict[str, np.ndarray]:
    """Pose (4, 4) ``world_from_sensor`` of each sensor record at its own time, by token."""
    unique = {record["token"]: record for record in records}
    ego = [_get(nusc, "ego_pose", r["ego_pose_token"], _name(r)) for r in unique.values()]
    sensor = [_get(nusc, "calibrated_sensor", r["calibrated_sensor_token"], _name(r)) for r in unique.values()]
    world_from_sensor_M44 = _rigid(ego, "ego_pose.json") @ _rigid(sensor, "calibrated_sensor.json")
    return dict(zip(unique, world_from_sensor_M44, strict=True))


def _rigid(records: list[Record], table: str) -> np.ndarray:
    """(M, 4, 4) transforms of the records' quaternions (w, x, y, z) and translations (metres)."""
    names = [f"{table}: record {record['token']!r}" for record in records]
    pairs = list(zip(records, names, strict=True))
    rotation_M4 = np.array([_numbers(r["rotation"], (4,), name, "rotation") for r, name in pairs])
    translation_M3 = np.array([_numbers(r["translation"], (3,), name, "translation") for r, name in pairs]).reshape(
        -1, 3
    )
    norm_M1 = np.linalg.norm(rotation_M4, axis=1, keepdims=True)
    finite_M = np.isfinite(rotation_M4).all(axis=1) & np.isfinite(translation_M3).all(axis=1)
    # With a NaN norm the comparison is False, so that it is not sound either.
    sound_M = finite_M & (np.abs(norm_M1[:, 0] - 1) <= _UNIT_TOLERANCE)
    if not sound_M.all():
        row = int(np.argmin(sound_M))
        if not finite_M[row]:
            values = [*translation_M3[row].tolist(), *rotation_M4[row].tolist()]
            raise DataError(f"{names[row]}: the pose has values that are not finite ({values})")
        raise DataError(f"{names[row]}: rotation has norm {norm_M1[row, 0]:.6g}; a unit quaternion w x y z is needed")
    w, x, y, z = (rotation_M4 / norm_M1).T
    transform_M44 = np.zeros((len(records), 4, 4))
    transform_M44[:, 0, :3] = np.stack((1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)), axis=1)
    transform_M44[:, 1, :3] = np.stack((2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)), axis=1)
    transform_M44[:, 2, :3] = np.stack((2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)), axis=1)
    transform_M44[:, :3, 3] = translation_M3
    transform_M44[:, 3, 3] = 1
    return transform_M44


def _numbers(values: object, shape: tuple[int, ...], name: str, field: str) -> np.ndarray:
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.shape != shape:
        raise DataError(f"{name}: {field} {values!r} is not {' x '.join(map(str, shape))} numbers")
    return numbers


def _get(nusc: Any, table: str, token: str, source: str) -> Record:
    try:
        return nusc.get(table, token)
    except KeyError as error:
        raise DataError(f"{source} names {table} {token!r}, which {table}.json does not hold") from error


def _refuse_duplicates(records: list[Record], table: str) -> None:
    """Refuse two records with one token, of which the devkit would silently take the last."""
    if len({record["token"] for record in records}) == len(records):
        return
    seen: set[str] = set()
    for record in records:
        if record["token"] in seen:
            raise DataError(f"{table}.json: token {record['token']!r} occurs twice; every record needs its own")
        seen.add(record["token"])


def _scene(nusc: Any, sample: Record) -> str:
    return _get(nusc, "scene", sample["scene_token"], f"sample.json: record {sample['token']!r}")["name"]


def _timestamp(record: Record) -> int:
    if not isinstance(record["timestamp"], int):
        raise DataError(f"{_name(record)}: timestamp {record['timestamp']!r} is not a whole number of microseconds")
    return record["timestamp"]


def _name(record: Record) -> str:
    return f"sample_data.json: record {record['token']!r}"
