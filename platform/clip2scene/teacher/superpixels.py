"""Superpixels for SLidR (Sautier et al., CVPR 2022): SLIC segments of every image, computed once, one file a frame.

``STORE/frames/<frame_id>.npz`` holds, per camera, the segment of every pixel of the image at the teacher's input size;
``STORE/manifest.json`` is written last: a store that has one is finished. Frames that are there are never computed
again, so a killed run continues where it stopped.

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
from clip2scene.data.clouds import read_image, resolve
from clip2scene.data.index import DataError, Frame, Index
from clip2scene.progress import Progress
from clip2scene.storage import Storage, StorageError, locked
from clip2scene.teacher import store

FORMAT = "clip2scene-superpixels-1"
_SIGMA = 3.0 / 900
"""SLidR blurs with 3 pixels at nuScenes' 900 rows; the same share of the height at any other size."""
_ABOUT = "about"
_FRAMES_AT_A_TIME = 16
"""Read to see what needs no work; they take their time from an object store."""
_DAMAGES = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuperpixelStore:
    """Random access to finished superpixels by frame; small, and cheap to send to a worker."""

    path: Path
    height: int
    width: int
    storage: Storage | None = None
    """Brings frames that are not here yet."""

    @classmethod
    def open(cls, path: str | Path, storage: Storage | None = None) -> SuperpixelStore:
        """Open a finished store.

        Raises:
            DataError: there is none, or its manifest is damaged or of another format.
            StorageError: the object store cannot be reached or refuses.
        """
        path = Path(path).absolute()
        file = path / "manifest.json"
        if storage is not None:
            storage.fetch(file)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']!r}, expected {FORMAT!r}")
            return cls(path, int(manifest["height"]), int(manifest["width"]), storage)
        except FileNotFoundError as error:
            raise DataError(f"{path}: no finished superpixels there (manifest.json is missing)") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not the manifest of superpixels ({' '.join(str(error).split())})") from error

    def read(self, frame_id: str) -> dict[str, np.ndarray]:
        """Superpixels of one frame.

        Returns:
            Camera name to (H, W) uint16 segments, contiguous from 0 in every image. Broken images are left out.

        Raises:
            DataError: the frame is not in the store, or its file is damaged.
            StorageError: the object store cannot be reached or refuses.
        """
        file = _file(self.path, frame_id)
        if self.storage is not None:
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


def superpixel_digest(index_digest: str, settings: ContrastSettings, height: int, width: int) -> str:
    """Address of the superpixels: of the images, how SLIC is called, the image size and scikit-image's version."""
    return digest_of(FORMAT, index_digest, _how(settings, height, width))


def segment_images(
    index: Index,
    frames: Sequence[Frame],
    settings: ContrastSettings,
    height: int,
    width: int,
    store_path: str | Path,
    num_workers: int,
    progress: Progress,
    *,
    storage: Storage | None = None,
) -> tuple[store.BrokenImage, ...]:
    """Segment every image of the frames that the store does not hold yet, as Ray tasks. Ray must be initialised.

    Args:
        index: the dataset that the frames are of.
        frames: what to segment; the store may hold more, and keeps it.
        settings: SLIC's settings.
        height: H, of the teacher's input.
        width: W.
        store_path: folder of the superpixels.
        num_workers: tasks at a time, one CPU each; 0: in this process, without Ray.
        progress: draws the progress bar.
        storage: that the store lies in, where that may be an object store.

    Returns:
        Images of the frames that cannot be read and have no superpixels, found now or earlier.

    Raises:
        DataError: the store is of other settings, a frame id names no file, or the store cannot be written.
        StorageError: the object store cannot be reached or refuses.
    """
    path, how = Path(store_path).resolve(), _how(settings, height, width)
    storage = storage or Storage(path)
    wanted = {frame.frame_id: frame for frame in frames}
    for frame_id in wanted:
        _file(path, frame_id)
    with locked(path, "fills this store"):
        for aside in (path / "frames").glob(".*"):
            aside.unlink(missing_ok=True)
        broken = _all_known(path, storage, index, wanted, how)
        pending = [frame for frame_id, frame in wanted.items() if frame_id not in broken]
        images = {frame.frame_id: len(frame.cameras) for frame in pending}
        if pending or not storage.fetch(path / "manifest.json"):
            storage.remove(path / "manifest.json")
            with progress("superpixels", sum(images.values()), unit="images") as advance:
                root = index.root.resolve()
                jobs = ((path, storage, root, frame.frame_id, _images(frame), how) for frame in pending)
                for frame_id, found, error in _run_all(jobs, num_workers):
                    if error:
                        raise DataError(error)
                    broken[frame_id] = found
                    advance(images[frame_id])
            _write_manifest(path, storage, how)
    return tuple(
        store.BrokenImage(frame_id, camera, why)
        for frame_id in wanted
        for camera, why in sorted(broken[frame_id].items())
    )


def segments_at(maps_MHW: torch.Tensor, image_P: torch.Tensor, position_P2: torch.Tensor) -> torch.Tensor:
    """Segment of the pixel that lies nearest to every position.

    Args:
        maps_MHW: segments of M images, any integer type.
        image_P: (P,) int64, the image to read.
        position_P2: (P, 2), u to the right and v down, as fractions of the image's width and height.

    Returns:
        (P,) int64. Positions outside an image read its edge.
    """
    _, height, width = maps_MHW.shape
    # A pixel covers [i, i + 1), so the nearest centre is that of the pixel that the position lies in.
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
    """Everything but the image that decides its segments; JSON-able."""
    return {
        "superpixels_per_image": settings.superpixels_per_image,
        "compactness": settings.compactness,
        "height": height,
        "width": width,
        "scikit-image": importlib.metadata.version("scikit-image"),
    }


_Image = tuple[str, str, int, int]
"""Camera, path below the dataset's root, width and height (pixels)."""
_Job = tuple[Path, Storage, Path, str, list[_Image], dict[str, Any]]
_Done = tuple[str, dict[str, str], str]
"""Frame id, its broken images with their reasons, and why the frame could not be written (empty: it was)."""


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


def _images(frame: Frame) -> list[_Image]:
    """What a task is told about a frame: a frame itself is sent with the index's whole table, 147 MB of nuScenes."""
    return [(camera.name, camera.image_path, camera.width, camera.height) for camera in frame.cameras]


def _segment_frame(
    path: Path, storage: Storage, root: Path, frame_id: str, images: list[_Image], how: dict[str, Any]
) -> _Done:
    """Segment and store one frame; runs on a worker, and tells of errors instead of raising them."""
    maps, broken = {}, {}
    for camera, image_path, width, height in images:
        try:
            image_HW3 = read_image(resolve(root, image_path), width, height)
        except DataError as error:
            broken[camera] = str(error)
            continue
        maps[camera] = slic_segments(image_HW3, how)
    about = json.dumps({"format": FORMAT, "how": how, "broken": broken})
    try:
        with storage.writing(_file(path, frame_id)) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **{_ABOUT: np.array(about)}, **maps)
    except (StorageError, OSError) as error:
        return frame_id, broken, str(error)
    return frame_id, broken, ""


def _all_known(
    path: Path, storage: Storage, index: Index, wanted: dict[str, Frame], how: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """:func:`_known` of the frames that need no work; the others are left out. Brings those of an object store here."""
    stored = set(storage.names(path / "frames"))
    there = [frame for frame_id, frame in wanted.items() if _file(path, frame_id).name in stored]

    def known(frame: Frame) -> dict[str, str] | None:
        storage.fetch(_file(path, frame.frame_id))
        return _known(path, index, frame, how)

    with ThreadPoolExecutor(_FRAMES_AT_A_TIME) as readers:
        found = zip(there, readers.map(known, there), strict=True)
        return {frame.frame_id: broken for frame, broken in found if broken is not None}


def _known(path: Path, index: Index, frame: Frame, how: dict[str, Any]) -> dict[str, str] | None:
    """Broken images of a frame that needs no work; None where it is missing, damaged, or an image was repaired."""
    file = _file(path, frame.frame_id)
    if not file.exists():
        return None
    try:
        with _opened(file) as arrays:
            about = json.loads(str(arrays[_ABOUT]))
            broken: dict[str, str] = about["broken"]
            cameras = {*arrays.files, *broken} - {_ABOUT}
    except DataError as error:
        _log.warning("%s; it is computed again", error)
        return None
    if about["how"] != how:
        raise DataError(f"{file}: superpixels of other settings ({about['how']}); give another folder")
    if cameras != {camera.name for camera in frame.cameras}:
        return None
    for camera in frame.cameras:
        if camera.name in broken:
            with contextlib.suppress(DataError):
                read_image(resolve(index.root, camera.image_path), camera.width, camera.height)
                return None
    return broken


def _write_manifest(path: Path, storage: Storage, how: dict[str, Any]) -> None:
    try:
        with storage.writing(path / "manifest.json") as aside:
            aside.write_text(json.dumps({"format": FORMAT, **how}, indent=1) + "\n", encoding="utf-8")
    except (StorageError, OSError) as error:
        raise DataError(str(error)) from error


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
    except _DAMAGES as error:
        raise DataError(f"{file}: damaged superpixels ({' '.join(str(error).split())})") from error
