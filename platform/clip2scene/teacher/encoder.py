"""The actor that encodes: a process that holds the teacher and gets rows of ids and paths from :mod:`.extract`.

Legend: B images of a frame.
"""

from __future__ import annotations

import functools
import json
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip2scene.config import ExtractSettings, TeacherSettings
from clip2scene.data.clouds import read_image
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Frame
from clip2scene.errors import ConfigError, DataError, StorageError, one_line
from clip2scene.machine import use_threads
from clip2scene.storage import LOCK, Storage, appears
from clip2scene.teacher import store
from clip2scene.teacher.clip import DenseClip, load_teacher

_IMAGES_AT_ONCE = 32
"""A ScanNet scene has hundreds of images: too many for a GPU's memory at once, or to be all read ahead."""


def frame_row(frame: Frame) -> dict[str, str]:
    """What an actor gets of a frame: ``frame_id`` and ``images`` (JSON), no pixels."""
    images = [{"camera": c.name, "path": c.image_path, "width": c.width, "height": c.height} for c in frame.cameras]
    return {"frame_id": frame.frame_id, "images": json.dumps(images)}


class Encoder:
    """Loads the teacher once, then writes frames into the store and returns a status row for each.

    Args:
        teacher_settings: the teacher, with absolute paths.
        settings: threads and device.
        root: the dataset's folder.
        store_path: the feature store.
        digest: of the teacher that the driver loaded; another one here is refused.
        storage: the storage that the store is part of; an object store gets every frame as soon as it is encoded.
    """

    def __init__(
        self,
        teacher_settings: TeacherSettings,
        settings: ExtractSettings,
        root: DataRoot,
        store_path: Path,
        digest: str,
        storage: Storage,
    ) -> None:
        use_threads(settings.threads_per_actor)
        self._device = torch.device("cuda" if settings.gpus_per_actor else "cpu")
        # With a GPU, images are prefetched while frames are encoded; on CPUs both want the same cores, and prefetching
        # is a quarter slower.
        self._readers = ThreadPoolExecutor(settings.threads_per_actor) if settings.gpus_per_actor else None
        self._map_writes: Any = ThreadPoolExecutor(1).map if settings.gpus_per_actor else map
        self._root, self._store, self._storage = root, store_path, storage
        self._teacher: DenseClip | None = None
        self._failure = ""
        # Reported as a status: an exception here would make Ray print its own pages about the actor.
        if storage.remote is None and not appears(store_path / LOCK):
            self._failure = (
                f"{store_path}: the actor on {platform.node()} does not see this folder of the driver's; give a "
                "storage that all nodes share"
            )
            return
        try:
            teacher = load_teacher(teacher_settings)
            if teacher.digest != digest:
                raise ConfigError(f"the weights of {teacher_settings.model} are {teacher.digest} there, not {digest}")
            self._teacher = teacher.to(self._device)
        except (ConfigError, RuntimeError, AssertionError) as error:  # the latter two are torch's, about GPUs
            self._failure = f"an actor on {platform.node()} cannot load the teacher: {error}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Encode and store the frames of a batch.

        Args:
            batch: rows of :func:`frame_row`.

        Returns:
            ``frame_id``, and ``status`` as JSON: ``cameras`` and ``broken``, or ``error`` if the store cannot be
            written, the teacher was not loaded, or the GPU cannot take the images.
        """
        frame_ids = batch["frame_id"].tolist()
        if self._teacher is None:
            statuses: list[dict[str, Any]] = [{"error": self._failure}] * len(frame_ids)
        else:
            frames = zip(frame_ids, map(json.loads, batch["images"]), strict=True)
            try:
                statuses = self._encode_all(self._teacher, list(frames))
            except RuntimeError as error:  # torch's, as of a GPU whose memory others fill
                failure = f"an actor on {platform.node()} cannot encode images: {one_line(error)}"
                statuses = [{"error": failure}] * len(frame_ids)
        return {"frame_id": frame_ids, "status": [json.dumps(status) for status in statuses]}

    def _encode_all(self, teacher: DenseClip, frames: list[tuple[str, Any]]) -> list[dict[str, Any]]:
        """Encode and store frames, given by id and images; returns their statuses."""
        # All frames' images in one go, so that those of the next frame are read while this one is encoded.
        pixels = self._read_all(teacher, (image for _, images in frames for image in images))
        encoded = ((id_, *self._encode(teacher, images, pixels)) for id_, images in frames)
        return list(self._map_writes(functools.partial(self._write, teacher), encoded))

    def _read(self, teacher: DenseClip, image: dict[str, Any]) -> Tensor | str:
        """Preprocessed pixels, or why there are none."""
        try:
            file = self._root.path_of(image["path"])
            return teacher.preprocess(read_image(file, image["width"], image["height"]))
        except DataError as error:
            return str(error)

    def _read_all(self, teacher: DenseClip, images: Iterable[dict[str, Any]]) -> Iterator[Tensor | str]:
        """As :meth:`_read` of each image; with a GPU in threads, a bounded number of images ahead of their use."""
        if self._readers is None:
            yield from (self._read(teacher, image) for image in images)
            return
        ahead: deque[Future[Tensor | str]] = deque()
        for image in images:
            ahead.append(self._readers.submit(self._read, teacher, image))
            if len(ahead) > _IMAGES_AT_ONCE:
                yield ahead.popleft().result()
        yield from (read.result() for read in ahead)

    def _encode(
        self, teacher: DenseClip, images: Sequence[dict[str, Any]], pixels: Iterator[Tensor | str]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Features of a frame's cameras, and why some have none; takes the frame's images from ``pixels``."""
        features: dict[str, np.ndarray] = {}
        broken: dict[str, str] = {}
        # Sub-batches of one frame: which frames share a batch, as after a restart, has no influence on the features.
        for start in range(0, len(images), _IMAGES_AT_ONCE):
            read = {image["camera"]: next(pixels) for image in images[start : start + _IMAGES_AT_ONCE]}
            broken |= {camera: reason for camera, reason in read.items() if isinstance(reason, str)}
            whole = {camera: image for camera, image in read.items() if isinstance(image, Tensor)}
            if whole:
                pixels_B3HW = torch.stack(list(whole.values())).to(self._device)
                features |= zip(whole, teacher(pixels_B3HW).cpu().numpy(), strict=True)
        return features, broken

    def _write(self, teacher: DenseClip, frame: tuple[str, dict[str, np.ndarray], dict[str, str]]) -> dict[str, Any]:
        """Store a frame; returns its status."""
        frame_id, features, broken = frame
        try:
            store.write_frame(self._store, frame_id, features, broken, teacher.digest, self._storage)
        except (DataError, StorageError, OSError) as error:
            return {"error": str(error)}
        return {"cameras": list(features), "broken": broken}
