"""Writes the predictions of a network, one file per keyframe.

Legend: N points, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip2scene.config import ResourceSettings
from clip2scene.data.benchmarks import LabelFormat
from clip2scene.data.index import Frame
from clip2scene.errors import TrainingError
from clip2scene.storage import Storage
from clip2scene.training.launch import Worker, launch
from clip2scene.training.methods import StudentMethod
from clip2scene.training.samples import SampleSource


@dataclass(frozen=True)
class _Prediction:
    files: dict[Path, Frame]
    source: SampleSource
    method: StudentMethod
    labels: LabelFormat
    storage: Storage

    @torch.inference_mode()
    def __call__(self, worker: Worker) -> None:
        predict = self.method.prepare(worker.device)
        counts_C = torch.zeros(len(self.labels.id_C), dtype=torch.int64)
        for at, (path, frame) in enumerate(self.files.items()):
            if at % worker.world_size != worker.rank:
                continue
            if self.storage.fetch(path):  # of an interrupted run
                contents = path.read_bytes()
            else:
                classes_N = predict(self.source.read(frame).to(worker.device)).cpu().numpy()
                contents = self.labels.encode(classes_N)
                with self.storage.writing(path) as aside:
                    aside.write_bytes(contents)
            counts_C += torch.from_numpy(self.labels.count(contents, str(path)))
            worker.emit("frames", min(worker.world_size, len(self.files) - at))
        worker.emit("counts", worker.total(counts_C).numpy())


def write_predictions(
    files: dict[Path, Frame],
    source: SampleSource,
    method: StudentMethod,
    labels: LabelFormat,
    *,
    storage: Storage,
    name: str,
    folder: Path,
    resources: ResourceSettings,
    on_frames: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Predict the keyframes, which the workers share, and write those files that are not there yet.

    Args:
        files: the keyframe of each file to write.
        source: without a store and without labels.
        method: the network.
        labels: how it is written.
        storage: holds the files.
        name: of the run.
        folder: absolute, shared by all nodes.
        resources: workers.
        on_frames: called with the number of keyframes done since the last call.

    Returns:
        Points per class in all files, (C,) int64.

    Raises:
        DataError: this process met a damaged file; from a Ray worker it is a TrainingError with the same message.
        StorageError: likewise, a file cannot be written.
        TrainingError: the run failed.
    """
    received: dict[str, Any] = {}

    def on_message(kind: str, value: Any) -> None:
        if kind == "frames":
            on_frames(value)
        else:
            received[kind] = value

    work = _Prediction(files, source, method, labels, storage)
    launch(work, name=name, folder=folder, resources=resources, on_message=on_message)
    if "counts" not in received:
        raise TrainingError(f"run {name} ended without counts")
    return received["counts"]
