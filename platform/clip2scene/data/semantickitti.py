"""Builds the index from SemanticKITTI's official layout.

``sequences/XX/{velodyne, image_2, labels, calib.txt, poses.txt, times.txt}`` lie below the root or below its
``dataset`` folder (as the archives unpack). Line n of ``poses.txt`` is ``world_from_camera0`` of scan n, where the
world is the first scan's camera 0; ``Tr`` of ``calib.txt`` is ``camera0_from_lidar``; ``P2`` projects camera 0's
coordinates into the image of camera 2, the left colour camera. KITTI's odometry scans are motion-compensated to the
time of their image, so both have the same pose.

A sequence may lack its folder ``image_2``: supervised training reads no images, and the archive of KITTI's colour
images has 65 GB.

Legend: S scans that a sequence's ``poses.txt`` lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip2scene.data.clouds import image_size
from clip2scene.data.dataroot import DataRoot, DatasetFiles
from clip2scene.data.index import Camera, Frame, Index, Sweep
from clip2scene.data.poses import check_pinhole, is_rotation
from clip2scene.errors import DataError

NAME = "semantickitti"
CAMERA = "image_2"

_TABLES = ("calib.txt", "poses.txt", "times.txt")


@dataclass(frozen=True)
class _Sequence:
    """The contents of a sequence's tables."""

    world_from_camera0_S44: np.ndarray
    """NaN where the pose is not finite."""
    camera0_from_lidar: np.ndarray
    camera2_from_camera0: np.ndarray
    intrinsics: np.ndarray
    timestamp_us_S: np.ndarray


def build_index(root: Path, *, max_sweeps: int = 10, linked_folders: Iterable[Path] = ()) -> Index:
    """Index every scan on disk: cloud, earlier scans, image of the left colour camera, poses, labels.

    A scan without a finite pose is left out, as a keyframe and as a sweep. The keyframes of a sequence without a folder
    ``image_2`` have no cameras. ``Index.left_out`` reports both.

    Args:
        root: the dataset's folder, which holds ``sequences`` or ``dataset/sequences``.
        max_sweeps: earlier scans of the sequence to list per keyframe, nearest first.
        linked_folders: folders outside of the root to which links in it may lead.

    Returns:
        The index, with keyframes ordered by sequence and time; ``frame_id`` is like ``00_000123``, ``scene`` like
        ``00``.

    Raises:
        DataError: a file is missing or damaged (any image of a sequence that has ``image_2``), ``calib.txt`` has no
            ``Tr``, or a finite pose is not a rigid transform.
    """
    data_root = DataRoot.at(root, linked_folders)
    files = DatasetFiles(data_root)
    frames: list[Frame] = []
    left_out: list[str] = []
    for folder in _sequence_folders(data_root.path):
        scans = [name.removesuffix(".bin") for name in files.names(f"{folder}/velodyne", r"\d{6}\.bin")]
        if scans:
            kept, lost = _sequence_frames(data_root, folder, scans, files, max_sweeps)
            frames += kept
            left_out += lost
    if not frames:
        raise DataError(
            f"{data_root.path}: no scan with a finite pose; "
            + (left_out[0] if left_out else "allowed: files like sequences/00/velodyne/000000.bin")
        )
    return Index(NAME, data_root, NAME, tuple(frames), tuple(left_out))


def _sequence_folders(root: Path) -> list[str]:
    """POSIX paths of the sequences below the root, in order."""
    for prefix in ("sequences", "dataset/sequences"):
        if (root / prefix).is_dir():
            names = sorted(path.name for path in (root / prefix).iterdir() if re.fullmatch(r"\d\d", path.name))
            return [f"{prefix}/{name}" for name in names]
    raise DataError(f"{root}: no SemanticKITTI there; allowed: a folder that holds sequences or dataset/sequences")


def _sequence_frames(
    root: DataRoot, folder: str, scans: list[str], files: DatasetFiles, max_sweeps: int
) -> tuple[list[Frame], list[str]]:
    """Keyframes of one sequence, and sentences about the scans or images that were left out."""
    sequence, scene = _read_sequence(root, folder), folder[-2:]
    labelled, pictured = ((root.path / folder / part).is_dir() for part in ("labels", CAMERA))
    frames: list[Frame] = []
    left_out: list[str] = []
    earlier: list[Sweep] = []
    for scan in scans:
        row = int(scan)
        if row >= len(sequence.timestamp_us_S):
            raise DataError(
                f"{root.path / folder / 'poses.txt'}: {len(sequence.timestamp_us_S)} poses, none for scan {scan}; "
                "line n is the pose of scan n, counted from 0"
            )
        world_from_camera0 = sequence.world_from_camera0_S44[row]
        if not np.isfinite(world_from_camera0).all():
            left_out.append(f"{folder}/poses.txt: line {row + 1} is not finite, so scan {scene}_{scan} is left out")
            continue
        timestamp_us = int(sequence.timestamp_us_S[row])
        cameras: tuple[Camera, ...] = ()
        if pictured:
            image_path = files.existing(f"{folder}/{CAMERA}/{scan}.png", f"scan {scene}_{scan}")
            width, height = image_size(root.path_of(image_path), "PNG")
            # Not `inverse`: the file's rotations are rounded to 2e-6, which is 0.8 mm at the far end of a sequence.
            camera = Camera(
                name=CAMERA,
                image_path=image_path,
                width=width,
                height=height,
                intrinsics=sequence.intrinsics,
                camera_from_world=sequence.camera2_from_camera0 @ np.linalg.inv(world_from_camera0),
                timestamp_us=timestamp_us,
            )
            cameras = (camera,)
        frame = Frame(
            frame_id=f"{scene}_{scan}",
            scene=scene,
            timestamp_us=timestamp_us,
            cloud_path=files.existing(f"{folder}/velodyne/{scan}.bin", f"scan {scene}_{scan}"),
            world_from_lidar=world_from_camera0 @ sequence.camera0_from_lidar,
            sweeps=tuple(earlier[:max_sweeps]),
            cameras=cameras,
            label_path=files.existing(f"{folder}/labels/{scan}.label", f"scan {scene}_{scan}") if labelled else None,
        )
        frames.append(frame)
        earlier.insert(0, Sweep(frame.cloud_path, frame.world_from_lidar, timestamp_us))
        del earlier[max_sweeps:]
    if frames and not pictured:
        left_out.append(f"{folder}: kept for supervised training, but without pairs, as it has no folder {CAMERA}")
    return frames, left_out


def _read_sequence(root: DataRoot, folder: str) -> _Sequence:
    calib, poses, times = (root.path_of(f"{folder}/{name}") for name in _TABLES)
    projection, tr = (_calibration(calib, key) for key in ("P2", "Tr"))
    intrinsics = projection[:, :3]
    check_pinhole(intrinsics, f"{calib}: P2")
    # P2 = K [I | t]: camera 2 is parallel to camera 0, shifted by t.
    camera2_from_camera0 = np.eye(4)
    camera2_from_camera0[:3, 3] = np.linalg.solve(intrinsics, projection[:, 3])

    pose_lines, time_lines = _lines(poses), _lines(times)
    if len(pose_lines) != len(time_lines):
        raise DataError(
            f"{times}: {len(time_lines)} times for the {len(pose_lines)} poses of poses.txt; one per pose is needed"
        )
    pose_S34 = np.array([_numbers(line, 12, f"{poses}: line {n}") for n, line in enumerate(pose_lines, start=1)])
    time_S = np.array([_numbers(line, 1, f"{times}: line {n}")[0] for n, line in enumerate(time_lines, start=1)])
    later_S = (np.diff(time_S, prepend=-1) > 0) & np.isfinite(time_S)
    if not later_S.all():
        row = int(np.argmin(later_S))
        raise DataError(
            f"{times}: line {row + 1} ({time_S[row]} s) is not later than the line before; "
            "allowed: seconds from 0, ascending"
        )
    return _Sequence(
        world_from_camera0_S44=_rigid(pose_S34.reshape(-1, 3, 4), f"{poses}: the pose of line"),
        camera0_from_lidar=_rigid(tr[None], f"{calib}: Tr, matrix")[0],
        camera2_from_camera0=camera2_from_camera0,
        intrinsics=intrinsics,
        timestamp_us_S=np.round(time_S * 1e6).astype(np.int64),
    )


def _calibration(calib: Path, key: str) -> np.ndarray:
    """(3, 4) matrix of ``calib.txt``, finite."""
    texts = dict(line.split(":", 1) for line in _lines(calib) if ":" in line)
    if key not in texts:
        raise DataError(
            f"{calib}: has no {key}; SemanticKITTI's has P0 to P3 and Tr, the transform from the LiDAR to camera 0"
            + (", which is in the calibration archive of KITTI odometry" if key == "Tr" else "")
        )
    matrix = _numbers(texts[key], 12, f"{calib}: {key}").reshape(3, 4)
    if not np.isfinite(matrix).all():
        raise DataError(f"{calib}: {key} has values that are not finite ({matrix.ravel().tolist()})")
    return matrix


def _rigid(matrix_S34: np.ndarray, source: str) -> np.ndarray:
    """(S, 4, 4) transforms with the nearest exact rotations; NaN if a value is not finite."""
    finite_S = np.isfinite(matrix_S34).all(axis=(1, 2))
    rotation_S33 = np.where(finite_S[:, None, None], matrix_S34[:, :, :3], np.eye(3))
    sound_S = is_rotation(rotation_S33)
    if not sound_S.all():
        row = int(np.argmin(sound_S))
        raise DataError(f"{source} {row + 1} is not a rigid transform (rotation {rotation_S33[row].tolist()})")
    left_S33, _, right_S33 = np.linalg.svd(rotation_S33)
    transform_S44 = np.zeros((len(matrix_S34), 4, 4))
    transform_S44[:, :3, :3] = left_S33 @ right_S33
    transform_S44[:, :3, 3] = matrix_S34[:, :, 3]
    transform_S44[:, 3, 3] = 1
    transform_S44[~finite_S] = np.nan
    return transform_S44


def _lines(path: Path) -> list[str]:
    """Lines of a text file, without empty ones at its end."""
    try:
        return path.read_text(encoding="ascii").rstrip().splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing file; every sequence needs {', '.join(_TABLES)}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged: not a text of numbers (byte {error.start})") from error


def _numbers(text: str, count: int, source: str) -> np.ndarray:
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError as error:
        raise DataError(f"{source}: {text.strip()[:60]!r} are not numbers") from error
    if len(values) != count:
        raise DataError(f"{source}: has {len(values)} numbers; exactly {count} are allowed")
    return values
