"""The feature store: the frozen teacher's features, computed once and kept in one file per frame.

``STORE/frames/<frame_id>.safetensors`` holds the dense features of each camera at the teacher's patch grid, and as
metadata the teacher's digest and the images that could not be read. ``STORE/manifest.json`` is written last: a store
that has one is finished. With an object store as storage the folder here is its cache: every frame is uploaded when it
is written, and downloaded when it is read, so that no machine needs the whole store.

Legend: h x w patches, D channels.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors.numpy import save

from clip2scene.data.clouds import read_image
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Frame
from clip2scene.errors import DataError, one_line
from clip2scene.storage import Storage

FORMAT = "clip2scene-features-2"
MANIFEST = "manifest.json"
_SUFFIX = ".safetensors"
_ABOUT = "clip2scene"
"""Key in a file's metadata."""
_FLOAT16 = "F16"
"""Safetensors' name of the type."""
_FRAME_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


@dataclass(frozen=True)
class FrameEntry:
    """What a frame's file says about itself."""

    teacher: str
    """Digest of the teacher that made it."""
    cameras: tuple[str, ...]
    """Cameras with features."""
    broken: dict[str, str]
    """Camera to the reason why its image has no features."""


@dataclass(frozen=True)
class BrokenImage:
    """An image without features, and why."""

    frame_id: str
    camera: str
    reason: str


class _Array(NamedTuple):
    """Where a camera's features are, in bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class FeatureStore:
    """Random access to a finished store by frame; small, and cheap to send to a worker."""

    path: Path
    manifest: dict[str, Any]
    """See :func:`read_manifest`."""
    storage: Storage
    """Fetches frames that are not on this machine yet."""

    @classmethod
    def open(cls, path: str | Path, storage: Storage, *, teacher_digest: str | None = None) -> FeatureStore:
        """Open a finished store, if its features are of the expected teacher.

        Raises:
            DataError: there is no finished store, or it is of another teacher than ``teacher_digest``.
            StorageError: the object store cannot be reached or refuses.
        """
        path = Path(path).absolute()
        storage.fetch(path / MANIFEST)
        manifest = read_manifest(path)
        if teacher_digest is not None:
            check_teacher(path, manifest["teacher"], teacher_digest)
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
            DataError: the frame is not in the store, its file is damaged, or it is of another teacher.
            StorageError: the object store cannot be reached or refuses.
        """
        file = frame_file(self.path, frame_id)
        self.storage.fetch(file)
        with _opened(file) as (stream, entry, arrays):
            check_teacher(file, entry.teacher, self.manifest["teacher"])
            # One read, of which the arrays are views: safetensors copies each out of a mapping, a third slower.
            data_B = np.fromfile(stream, np.uint8)
        shape = (*self.grid, self.dim)
        features = {}
        for camera, array in arrays.items():
            array_B = data_B[array.start : array.end]
            if (array.dtype, array.shape, len(array_B)) != (_FLOAT16, shape, 2 * math.prod(shape)):
                raise DataError(
                    f"{file}: features of {camera} are {array.dtype} {array.shape} of {len(array_B)} bytes, those of "
                    f"this store {_FLOAT16} {shape}"
                )
            features[camera] = array_B.view(np.float16).reshape(shape)
        return features


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read the manifest of a finished store.

    Returns:
        ``format``, ``teacher`` (digest), ``grid`` [h, w] and ``dim``; for people also ``frames``, ``images``
        (counts, without the quarantined images) and ``broken`` [{``frame_id``, ``camera``, ``reason``}].

    Raises:
        DataError: there is no manifest (the store is missing or not finished), or it is damaged or of another format.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no finished feature store there ({MANIFEST} is missing); run the extract stage"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable manifest ({one_line(error)})") from error
    required = {"teacher", "grid", "dim", "frames", "images", "broken"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not required <= set(manifest):
        raise DataError(f"{file}: not the manifest of a feature store of this version (format {FORMAT!r})")
    return manifest


def write_manifest(path: Path, manifest: Mapping[str, Any], storage: Storage) -> None:
    """Mark a store as finished.

    Raises:
        StorageError: the folder cannot be written, or the object store cannot be reached or refuses.
    """
    storage.write_json(path / MANIFEST, {"format": FORMAT, **manifest})


def frame_file(path: Path, frame_id: str) -> Path:
    """The file of a frame.

    Raises:
        DataError: the id is not a plain file name.
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
    storage: Storage,
) -> None:
    """Write one frame, completely or not at all.

    Args:
        path: the store.
        frame_id: a plain file name.
        features: camera to (h, w, D), stored as float16.
        broken: camera to the reason why it has no features.
        teacher_digest: of the teacher that made the features.
        storage: its object store, if it has one, gets the frame too.

    Raises:
        DataError: the id is not a file name, or the features do not fit into float16.
        StorageError: the folder cannot be written, or the object store cannot be reached or refuses.
    """
    file = frame_file(path, frame_id)
    tensors = {}
    for camera, features_hwD in features.items():
        with np.errstate(over="ignore"):
            tensors[camera] = np.ascontiguousarray(features_hwD, dtype=np.float16)
        if not np.isfinite(tensors[camera]).all():
            raise DataError(f"frame {frame_id!r}, {camera}: the teacher's features are not finite in float16")
    # A single entry, as safetensors writes several in random order; encoding a frame again must give the same bytes.
    about = json.dumps({"broken": dict(broken), "teacher": teacher_digest}, sort_keys=True)
    with storage.writing(file) as aside:
        aside.write_bytes(save(tensors, {_ABOUT: about}))


def read_entry(path: Path, frame_id: str, storage: Storage) -> FrameEntry:
    """What a frame's file says about itself. Features that lie in the object store are not downloaded.

    Raises:
        DataError: the file is missing or damaged.
        StorageError: the object store cannot be reached or refuses.
    """
    file = frame_file(path, frame_id)
    if storage.remote is not None and not file.exists():
        with storage.remote.opened(storage.name(file)) as stream:
            return _header(file, stream)[0]
    with _opened(file) as (_, entry, _):
        return entry


def stored_frames(path: Path, storage: Storage) -> list[str]:
    """Ids of all frames that have a file, valid or not, in order; in the object store, if there is one.

    Raises:
        DataError: the folder cannot be read.
        StorageError: the object store cannot be reached or refuses.
    """
    folder = path / "frames"
    try:
        names = storage.names(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder of frames ({error.strerror})") from error
    return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX) and not name.startswith("."))


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files of killed writers. Only for the holder of the store's lock."""
    for aside in (*path.glob(f".{MANIFEST}.*"), *(path / "frames").glob(".*")):
        aside.unlink(missing_ok=True)


def is_current(root: DataRoot, frame: Frame, cameras: Collection[str], broken: Collection[str]) -> bool:
    """Whether a stored frame has an entry for each of its images, and no broken one was repaired since.

    Args:
        root: the dataset's folder.
        frame: from the index.
        cameras: that the stored frame has values of.
        broken: cameras with images that could not be read.
    """
    if {camera.name for camera in frame.cameras} != {*cameras, *broken}:
        return False
    for camera in frame.cameras:
        if camera.name in broken:
            with contextlib.suppress(DataError):
                read_image(root.path_of(camera.image_path), camera.width, camera.height)
                return False
    return True


def check_teacher(source: Path, found: str, expected: str) -> None:
    """Refuse features of another teacher.

    Args:
        source: the store or the frame's file, for the message.
        found: digest of the teacher that made the features.
        expected: digest of the teacher that they must be of.

    Raises:
        DataError: the digests differ.
    """
    if found != expected:
        raise DataError(
            f"{source}: store from another teacher: its features are of {found}, expected {expected}; "
            "extract again into another folder"
        )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, FrameEntry, dict[str, _Array]]]:
    """A frame's file, whole and read up to the end of its header, with what the header says."""
    try:
        with file.open("rb") as stream:
            entry, arrays = _header(file, stream)
            expected = stream.tell() + max((array.end for array in arrays.values()), default=0)
            if (found := os.fstat(stream.fileno()).st_size) != expected:
                raise DataError(f"{file}: damaged frame of the feature store ({found} bytes instead of {expected})")
            yield stream, entry, arrays
    except FileNotFoundError as error:
        raise DataError(f"{file}: the frame is not in the feature store; run the extract stage") from error
    except OSError as error:
        raise DataError(f"{file}: damaged frame of the feature store ({one_line(error)})") from error


def _header(file: Path, stream: BinaryIO) -> tuple[FrameEntry, dict[str, _Array]]:
    """Read the beginning of a safetensors file: the length of a JSON header, and the header."""
    try:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        about = json.loads(header.pop("__metadata__")[_ABOUT])
        broken = {str(camera): str(reason) for camera, reason in about["broken"].items()}
        arrays = {
            camera: _Array(str(array["dtype"]), tuple(array["shape"]), *map(int, array["data_offsets"]))
            for camera, array in header.items()
        }
        return FrameEntry(str(about["teacher"]), tuple(arrays), broken), arrays
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DataError(f"{file}: damaged frame of the feature store (its header cannot be read)") from error
