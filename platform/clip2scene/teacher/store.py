"""The feature store: what the frozen teacher sees, computed once, one file a frame.

``STORE/frames/<frame_id>.safetensors`` holds, per camera, the dense features at the teacher's patch grid, and as
metadata the teacher's digest and the images that could not be read. ``STORE/manifest.json`` is written last: a store
that has one is finished. With an object store as storage the folder here caches it: every frame is put there when it is
written, and brought when it is read, so that no machine needs the whole store. Shapes: h x w patches, D channels.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from clip2scene.data.index import DataError
from clip2scene.storage import Storage

FORMAT = "clip2scene-features-2"
_log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_ABOUT = "clip2scene"
"""Key of a file's metadata."""
_FRAME_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class FrameEntry:
    """What a frame's file says about itself."""

    teacher: str
    """Digest of the teacher that made it."""
    cameras: tuple[str, ...]
    """Cameras with features."""
    broken: dict[str, str]
    """Camera to the reason why its image has none."""


@dataclass(frozen=True)
class BrokenImage:
    """An image without features, and why."""

    frame_id: str
    camera: str
    reason: str


@dataclass(frozen=True)
class FeatureStore:
    """Random access to a finished store by frame; small, and cheap to send to a worker."""

    path: Path
    manifest: dict[str, Any]
    """See :func:`read_manifest`."""
    storage: Storage | None = None
    """Brings frames that are not here yet."""

    @classmethod
    def open(
        cls, path: str | Path, *, teacher_digest: str | None = None, storage: Storage | None = None
    ) -> FeatureStore:
        """Open a finished store, and check whose it is.

        Raises:
            DataError: no finished store there, or one from another teacher than ``teacher_digest``.
            StorageError: the object store cannot be reached or refuses.
        """
        path = Path(path).absolute()
        if storage is not None:
            storage.fetch(path / "manifest.json")
        manifest = read_manifest(path)
        if teacher_digest is not None and manifest["teacher"] != teacher_digest:
            raise DataError(
                f"{path}: store from another teacher: its features are of {manifest['teacher']}, expected "
                f"{teacher_digest}; extract again into another folder"
            )
        return cls(path, manifest, storage)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        height, width = self.manifest["grid"]
        return height, width

    @property
    def dim(self) -> int:
        """D."""
        return int(self.manifest["dim"])

    def read(self, frame_id: str) -> dict[str, np.ndarray]:
        """Features of one frame.

        Returns:
            Camera name to (h, w, D) float16. Quarantined images are left out.

        Raises:
            DataError: the frame is not in the store, its file is damaged, or it was made by another teacher.
            StorageError: the object store cannot be reached or refuses.
        """
        file = frame_file(self.path, frame_id)
        if self.storage is not None:
            self.storage.fetch(file)
        with _opened(file) as handle:
            entry = _entry(file, handle.metadata())
            _check_teacher(file, entry, self.manifest["teacher"])
            features = {camera: handle.get_tensor(camera) for camera in handle.keys()}  # noqa: SIM118 (no mapping)
        shape = (*self.grid, self.dim)
        for camera, features_hwD in features.items():
            if features_hwD.shape != shape or features_hwD.dtype != np.float16:
                raise DataError(
                    f"{file}: features of {camera} are {features_hwD.dtype} {features_hwD.shape}, the manifest says "
                    f"float16 {shape}"
                )
        return features


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a finished store.

    Returns:
        ``format``, ``index`` and ``teacher`` (digests), ``grid`` [h, w], ``dim``, ``dtype``, ``frames``, ``images``
        (counts, quarantined images not included) and ``broken`` [{``frame_id``, ``camera``, ``reason``}].

    Raises:
        DataError: there is no manifest (the store is missing or not finished), or it is damaged or of another format.
    """
    file = Path(path) / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no finished feature store there (manifest.json is missing); run the extract stage"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable manifest ({' '.join(str(error).split())})") from error
    required = {"index", "teacher", "grid", "dim", "dtype", "frames", "images", "broken"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not required <= set(manifest):
        raise DataError(f"{file}: not the manifest of a feature store of this version (format {FORMAT!r})")
    return manifest


def write_manifest(path: Path, manifest: Mapping[str, Any], storage: Storage | None = None) -> None:
    """Mark a store as finished.

    Raises:
        DataError: the disk is full or the folder cannot be written.
        StorageError: the object store cannot be reached or refuses.
    """
    text = json.dumps({"format": FORMAT, **manifest}, indent=1, sort_keys=True)
    _write(path / "manifest.json", text.encode(), storage)


def frame_file(path: Path, frame_id: str) -> Path:
    """File of a frame.

    Raises:
        DataError: the id is no plain file name.
    """
    if not _FRAME_ID.fullmatch(frame_id):
        raise DataError(
            f"frame id {frame_id!r} cannot name a file; allowed: 1 to 200 letters, digits, _, - and ., not first a dot"
        )
    return path / "frames" / f"{frame_id}{_SUFFIX}"


def write_frame(
    path: Path,
    frame_id: str,
    features: Mapping[str, np.ndarray],
    broken: Mapping[str, str],
    teacher_digest: str,
    storage: Storage | None = None,
) -> None:
    """Write one frame, whole or not at all.

    Args:
        path: the store.
        frame_id: a plain file name.
        features: camera to (h, w, D), stored as float16.
        broken: camera to the reason why it has no features.
        teacher_digest: of the teacher that made them.
        storage: whose object store gets it too.

    Raises:
        DataError: the id is no file name, the features do not fit float16, the disk is full or the folder cannot be
            written.
        StorageError: the object store cannot be reached or refuses.
    """
    file = frame_file(path, frame_id)
    tensors = {}
    for camera, features_hwD in features.items():
        with np.errstate(over="ignore"):
            tensors[camera] = np.ascontiguousarray(features_hwD, dtype=np.float16)
        if not np.isfinite(tensors[camera]).all():
            raise DataError(f"frame {frame_id!r}, {camera}: the teacher's features are not finite in float16")
    # One entry: safetensors writes several in an order of chance, and a frame that is encoded again is to be the same.
    about = json.dumps({"broken": dict(broken), "teacher": teacher_digest}, sort_keys=True)
    _write(file, save(tensors, {_ABOUT: about}), storage)


def read_entry(path: Path, frame_id: str, storage: Storage | None = None) -> FrameEntry:
    """What a frame's file says about itself, without its features, which stay in the object store if they are there.

    Raises:
        DataError: the file is missing or damaged.
        StorageError: the object store cannot be reached or refuses.
    """
    file = frame_file(path, frame_id)
    if storage is not None and storage.remote is not None and not file.exists():
        with storage.remote.opened(storage.name(file)) as stream:
            return _remote_entry(file, stream)
    with _opened(file) as handle:
        return _entry(file, handle.metadata(), tuple(handle.keys()))


def stored_frames(path: Path, storage: Storage | None = None) -> list[str]:
    """Ids of all frames that have a file, valid or not, in order; in the object store, if there is one.

    Raises:
        DataError: the folder cannot be read.
        StorageError: the object store cannot be reached or refuses.
    """
    folder = path / "frames"
    try:
        names = [entry.name for entry in os.scandir(folder)] if storage is None else storage.names(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder of frames ({error.strerror})") from error
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX) and not name.startswith("."))


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers left aside. Only for the holder of the store's lock."""
    for folder in (path, path / "frames"):
        for aside in folder.glob(".*.part"):
            aside.unlink(missing_ok=True)


def check_teacher(path: Path, frame_id: str, entry: FrameEntry, teacher_digest: str) -> None:
    """Refuse a frame that another teacher made.

    Raises:
        DataError: it is one.
    """
    _check_teacher(frame_file(path, frame_id), entry, teacher_digest)


def _check_teacher(file: Path, entry: FrameEntry, teacher_digest: str) -> None:
    if entry.teacher != teacher_digest:
        raise DataError(
            f"{file}: store from another teacher: its features are of {entry.teacher}, expected {teacher_digest}; "
            "extract again into another folder"
        )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="np") as handle:
            yield handle
    except FileNotFoundError as error:
        raise DataError(f"{file}: the frame is not in the feature store; run the extract stage") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: damaged frame of the feature store ({' '.join(str(error).split())})") from error


def _entry(file: Path, metadata: dict[str, str] | None, cameras: tuple[str, ...] = ()) -> FrameEntry:
    try:
        values = json.loads((metadata or {})[_ABOUT])
        broken = {str(camera): str(reason) for camera, reason in values["broken"].items()}
        return FrameEntry(str(values["teacher"]), cameras, broken)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: damaged frame of the feature store (no teacher and broken images in its metadata)"
        ) from error


def _remote_entry(file: Path, stream: Any) -> FrameEntry:
    """Of the first bytes of a safetensors file: the length of a JSON header, and the header."""
    try:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        metadata = header.pop("__metadata__", None)
        return _entry(file, metadata, tuple(header))
    except (ValueError, AttributeError, MemoryError) as error:
        raise DataError(f"{file}: damaged frame of the feature store (its header is none)") from error


def _write(file: Path, data: bytes, storage: Storage | None) -> None:
    """Write aside, then rename: a reader sees the whole file or none."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(data)
            if storage is not None:
                storage.keep(aside, file)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror}); nothing half-written was left") from error
