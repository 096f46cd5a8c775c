"""Superpixels for SLidR (Sautier et al., CVPR 2022): SLIC segments of every image, computed once, one file per frame.

``STORE/frames/<frame_id>.npz`` holds, per camera, the segment of every pixel of the image at the teacher's input size.
``STORE/manifest.json`` is written last: a store that has one is finished. Frames in the store are never computed again,
so a killed run continues where it stopped.

Legend: M images, H x W pixels of the teacher's input, P point-pixel pairs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from PIL import Image

from clip2scene.config import ContrastSettings, digest_of
from clip2scene.data.clouds import read_image
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Camera, Frame, Index
from clip2scene.errors import DataError, StorageError, one_line
from clip2scene.progress import progress
from clip2scene.storage import Storage, locked
from clip2scene.teacher import store

FORMAT = "clip2scene-superpixels-1"
_SIGMA = 3.0 / 900
"""SLidR blurs by 3 pixels at nuScenes' 900 rows; at any other size it is the same share of the height."""
_ABOUT = "about"
_FRAMES_AT_A_TIME = 16
"""Stored frames checked at once: each is a download where the storage is an object store."""
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile)
_Job = tuple[Path, Storage, DataRoot, str, tuple[Camera, ...], dict[str, Any]]
_Done = tuple[str, str]
"""Frame id, and why the frame could not be written (empty if it was)."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuperpixelStore:
    """Random access to finished superpixels by frame; small, and cheap to send to a worker."""

    path: Path
    height: int
    width: int
    storage: Storage
    """Fetches frames that are not on this machine yet."""

    @classmethod
    def open(cls, path: str | Path, storage: Storage) -> SuperpixelStore:
        """Open a finished store.

        Raises:
            DataError: there is none, or its manifest is damaged or of another format.
            StorageError: the object store cannot be reached or refuses.
        """
        path = Path(path).absolute()
        file = path / store.MANIFEST
        storage.fetch(file)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']!r}, expected {FORMAT!r}")
            return cls(path, int(manifest["height"]), int(manifest["width"]), storage)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no finished superpixels there ({store.MANIFEST} is missing)") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not the manifest of superpixels ({one_line(error)})") from error

    def read(self, frame_id: str) -> dict[str, np.ndarray]:
        """Superpixels of one frame.

        Returns:
            Camera name to (H, W) uint16 segments, contiguous from 0 in every image. Broken images are left out.

        Raises:
            DataError: the frame is not in the store, or its file is damaged.
            StorageError: the object store cannot be reached or refuses.
        """
        file = _file(self.path, frame_id)
        self.storage.fetch(file)
        with _opened(file) as arrays:
            maps = {camera: arrays[camera] for camera in arrays.files if camera != _ABOUT}
        for camera, map_HW in maps.items():
            if map_HW.shape != (self.height, self.width) or map_HW.dtype != np.uint16:
                raise DataError(
                    f"{file}: superpixels of {camera} are {map_HW.dtype} {map_HW.shape}, the manifest says uint16 "
                    f"{(self.height, self.width)}"
                )
        return maps


def superpixel_digest(images_digest: str, settings: ContrastSettings, height: int, width: int) -> str:
    """Address of the superpixels: hash of the images, the SLIC settings, the image size and scikit-image's version."""
    return digest_of(FORMAT, images_digest, _how(settings, height, width))


def segment_images(
    index: Index,
    frames: Sequence[Frame],
    settings: ContrastSettings,
    height: int,
    width: int,
    store_path: str | Path,
    num_workers: int,
    *,
    storage: Storage,
) -> None:
    """Segment every image of the frames that the store does not hold yet, as Ray tasks. Ray must be initialised.

    Images that cannot be read have no superpixels, until they are repaired and this is called again.

    Args:
        index: the dataset of the frames.
        frames: what to segment; other frames in the store stay there.
        settings: SLIC's settings.
        height: H, of the teacher's input.
        width: W.
        store_path: folder of the superpixels.
        num_workers: how many tasks run at once, with one CPU each; 0: in this process, without Ray.
        storage: the storage that the store is part of.

    Raises:
        DataError: the store is of other settings, a frame id is not a file name, or a frame cannot be written.
        StorageError: the folder cannot be written, or the object store cannot be reached or refuses.
    """
    path, how = Path(store_path).resolve(), _how(settings, height, width)
    for frame in frames:
        _file(path, frame.frame_id)  # refuses an id that is not a file name, before any work
    with locked(path, "fills this store"):
        store.remove_leftovers(path)
        current = _current_frames(path, storage, index, frames, how)
        pending = {frame.frame_id: frame for frame in frames if frame.frame_id not in current}
        manifest = path / store.MANIFEST
        if pending or not storage.fetch(manifest):
            storage.remove(manifest)
            total = sum(len(frame.cameras) for frame in pending.values())
            with progress("superpixels", total, unit="images") as advance:
                # Not the frame: pickling one takes the index's whole table along, 147 MB for nuScenes.
                jobs = (
                    (path, storage, index.root, frame_id, frame.cameras, how) for frame_id, frame in pending.items()
                )
                for frame_id, error in _run_all(jobs, num_workers):
                    if error:
                        raise DataError(error)
                    advance(len(pending[frame_id].cameras))
            storage.write_json(manifest, {"format": FORMAT, **how})


def segments_at(maps_MHW: torch.Tensor, image_P: torch.Tensor, position_P2: torch.Tensor) -> torch.Tensor:
    """Segment of the pixel nearest to each position.

    Args:
        maps_MHW: segments of M images, any integer type.
        image_P: (P,) int64, the image to read.
        position_P2: (P, 2), u to the right and v down, as fractions of the image's width and height.

    Returns:
        (P,) int64. Positions outside an image read its edge.
    """
    _, height, width = maps_MHW.shape
    # A pixel covers [i, i + 1), so the nearest centre is that of the pixel around the position.
    column_P = (position_P2[:, 0] * width).floor().long().clamp(0, width - 1)
    row_P = (position_P2[:, 1] * height).floor().long().clamp(0, height - 1)
    return maps_MHW[image_P, row_P, column_P].long()


def slic_segments(image_HW3: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    """SLIC segments of one image, called as SLidR does.

    Args:
        image_HW3: (H', W', 3) uint8 RGB of any size.
        how: ``height``, ``width``, ``superpixels_per_image`` and ``compactness``.

    Returns:
        (H, W) uint16, contiguous from 0.
    """
    from skimage.segmentation import slic

    size = (how["width"], how["height"])
    resized_HW3 = np.asarray(Image.fromarray(image_HW3).resize(size, Image.Resampling.BICUBIC))
    segments_HW = slic(
        resized_HW3,
        n_segments=how["superpixels_per_image"],
        compactness=how["compactness"],
        sigma=_SIGMA * how["height"],
        start_label=0,
        channel_axis=-1,
    )
    _, contiguous = np.unique(segments_HW, return_inverse=True)
    return contiguous.reshape(segments_HW.shape).astype(np.uint16)


def _how(settings: ContrastSettings, height: int, width: int) -> dict[str, Any]:
    """Everything besides the image that determines its segments, ready for JSON."""
    return {
        "superpixels_per_image": settings.superpixels_per_image,
        "compactness": settings.compactness,
        "height": height,
        "width": width,
        "scikit-image": importlib.metadata.version("scikit-image"),
    }


def _run_all(jobs: Iterable[_Job], num_workers: int) -> Iterator[_Done]:
    if num_workers == 0:
        yield from (_segment_frame(*job) for job in jobs)
        return
    task = ray.remote(num_cpus=1)(_segment_frame)
    waiting = iter(jobs)
    running: list[Any] = []
    while True:
        running += [task.remote(*job) for job in itertools.islice(waiting, num_workers - len(running))]
        if not running:
            return
        (done, *_), running = ray.wait(running)
        yield ray.get(done)


def _segment_frame(
    path: Path, storage: Storage, root: DataRoot, frame_id: str, cameras: tuple[Camera, ...], how: dict[str, Any]
) -> _Done:
    """Segment and store one frame. Runs on a worker, and returns errors instead of raising them."""
    maps: dict[str, np.ndarray] = {}
    broken: dict[str, str] = {}
    for camera in cameras:
        try:
            image_HW3 = read_image(root.path_of(camera.image_path), camera.width, camera.height)
        except DataError as error:
            broken[camera.name] = str(error)
            continue
        maps[camera.name] = slic_segments(image_HW3, how)
    about = json.dumps({"format": FORMAT, "how": how, "broken": broken})
    try:
        with storage.writing(_file(path, frame_id)) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **{_ABOUT: np.array(about)}, **maps)
    except (StorageError, OSError) as error:
        return frame_id, str(error)
    return frame_id, ""


def _current_frames(
    path: Path, storage: Storage, index: Index, frames: Sequence[Frame], how: dict[str, Any]
) -> set[str]:
    """Ids of the frames that need no work. Those of an object store are fetched."""
    stored = set(storage.names(path / "frames"))
    there = [frame for frame in frames if _file(path, frame.frame_id).name in stored]

    def needs_nothing(frame: Frame) -> bool:
        file = _file(path, frame.frame_id)
        return storage.fetch(file) and _is_intact(file, index, frame, how)

    with ThreadPoolExecutor(_FRAMES_AT_A_TIME) as readers:
        return {frame.frame_id for frame, done in zip(there, readers.map(needs_nothing, there), strict=True) if done}


def _is_intact(file: Path, index: Index, frame: Frame, how: dict[str, Any]) -> bool:
    """Whether a frame's file is intact and complete; False also if an image was repaired since."""
    try:
        with _opened(file) as arrays:
            about = json.loads(str(arrays[_ABOUT]))
            broken: dict[str, str] = about["broken"]
            cameras = set(arrays.files) - {_ABOUT}
    except DataError as error:
        _log.warning("%s; it is computed again", error)
        return False
    if about["how"] != how:
        raise DataError(f"{file}: superpixels of other settings ({about['how']}); give another folder")
    return store.is_current(index.root, frame, cameras, broken)


def _file(path: Path, frame_id: str) -> Path:
    return store.frame_file(path, frame_id).with_suffix(".npz")


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except FileNotFoundError as error:
        raise DataError(f"{file}: the frame has no superpixels in this store") from error
    except DataError:
        raise
    except _UNREADABLE as error:
        raise DataError(f"{file}: damaged superpixels ({one_line(error)})") from error
