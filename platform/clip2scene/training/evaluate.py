"""Scores on raw points, of annotation-free methods and fine-tuned networks alike.

Two domains on the same keyframes for every method. ``seen``: points that at least one encoded image shows, the same for
all methods; no answer there counts as wrong, so abstaining never helps. ``all``: every point the method answers (for
2D-only at most ``seen``). Ignored points are not counted; nothing is scored on voxels.

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
from clip2scene.data.index import Frame
from clip2scene.errors import TrainingError
from clip2scene.training.launch import Worker, launch
from clip2scene.training.methods import UNSEEN, Method, seen
from clip2scene.training.metrics import confusion
from clip2scene.training.samples import Sample, SampleSource


@dataclass(frozen=True)
class Scores:
    """Counts of one evaluation."""

    counts: dict[str, dict[str, np.ndarray]]
    """(C, C) int64 confusion matrix per method and domain (``seen``, ``all``); rows are the truth."""
    example: dict[str, np.ndarray]
    """One keyframe for figures: ``points`` (N, 3), ``truth`` (N,) labels, and per method (N,) labels, 0 = none."""


@dataclass(frozen=True)
class _Evaluation:
    frames: tuple[Frame, ...]
    source: SampleSource
    methods: dict[str, Method]
    num_classes: int
    example_id: str

    @torch.inference_mode()
    def __call__(self, worker: Worker) -> None:
        predictors = {name: method.prepare(worker.device) for name, method in self.methods.items()}
        size = self.num_classes
        counts = torch.zeros((len(predictors), 2, size, size), dtype=torch.int64)
        # Rank 0 also reads the example when another rank owns it: only rank 0's messages reach the driver.
        for at, frame in enumerate(self.frames):
            mine = at % worker.world_size == worker.rank
            example = frame.frame_id == self.example_id and worker.rank == 0
            if not (mine or example):
                continue
            sample = self.source.read(frame).to(worker.device)
            seen_N = seen(sample).cpu().numpy()
            truth_N = sample.labels_N.cpu().numpy()
            classes = {name: predict(sample).cpu().numpy() for name, predict in predictors.items()}
            if example:
                worker.emit("example", _example(sample, truth_N, classes))
            if not mine:
                continue
            for row, classes_N in enumerate(classes.values()):
                in_seen = confusion(truth_N[seen_N], answered(classes_N, truth_N, size)[seen_N], size)
                answers_N = classes_N != UNSEEN
                in_all = confusion(truth_N[answers_N], classes_N[answers_N], size)
                counts[row] += torch.from_numpy(np.stack((in_seen, in_all)))
            worker.emit("frames", min(worker.world_size, len(self.frames) - at))
        worker.emit("counts", worker.total(counts).numpy())


def evaluate(
    frames: tuple[Frame, ...],
    source: SampleSource,
    methods: dict[str, Method],
    *,
    num_classes: int,
    name: str,
    folder: Path,
    resources: ResourceSettings,
    on_frames: Callable[[int], None] = lambda count: None,
) -> Scores:
    """Score every method on the keyframes, which the workers share; counts are summed over all of them.

    Args:
        frames: keyframes with label files.
        source: with a label vocabulary, and with a store if a method or the domain ``seen`` needs one.
        methods: by name.
        num_classes: C.
        name: of the run.
        folder: absolute, shared by all nodes.
        resources: workers.
        on_frames: called with the number of keyframes scored since the last call.

    Raises:
        DataError: this process met a damaged file; from a Ray worker it is a TrainingError with the same message.
        TrainingError: the run failed.
    """
    received: dict[str, Any] = {}

    def on_message(kind: str, value: Any) -> None:
        if kind == "frames":
            on_frames(value)
        else:
            received[kind] = value

    work = _Evaluation(frames, source, methods, num_classes, example_frame(frames).frame_id)
    launch(work, name=name, folder=folder, resources=resources, on_message=on_message)
    if "counts" not in received:
        raise TrainingError(f"run {name} ended without counts")
    per_method = dict(zip(methods, received["counts"], strict=True))
    counts = {method: {"seen": both[0], "all": both[1]} for method, both in per_method.items()}
    return Scores(counts, received["example"])


def example_frame(frames: tuple[Frame, ...]) -> Frame:
    """The keyframe that figures show."""
    return frames[len(frames) // 2]


def label_counts(frames: tuple[Frame, ...], source: SampleSource, num_classes: int) -> np.ndarray:
    """Points per class in the keyframes' labels, (C,) int64; they decide the majority class."""
    counts_C = np.zeros(num_classes + 1, dtype=np.int64)
    for frame in frames:
        counts_C += np.bincount(source.read(frame).labels_N.numpy(), minlength=num_classes + 1)
    return counts_C[1:]


def answered(classes_N: np.ndarray, truth_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes (N,) with a wrong one wherever the method gave none.

    The wrong class is the one that the method predicts most often in the keyframe, or the second most frequent where
    the first would be right. So a class that the method never predicts gets no false positives from this.

    Args:
        classes_N: 0-based, :data:`UNSEEN` where the method gave none.
        truth_N: labels, 0 = ignore, class ``c`` is ``c + 1``.
        num_classes: C, at least 2.
    """
    often_C = np.bincount(classes_N[classes_N != UNSEEN], minlength=num_classes)
    first, second = np.argsort(-often_C, kind="stable")[:2]
    wrong_N = np.where(truth_N == first + 1, second, first)
    return np.where(classes_N == UNSEEN, wrong_N, classes_N)


def _example(sample: Sample, truth_N: np.ndarray, classes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    points = {"points": sample.points_NI[:, :3].cpu().numpy(), "truth": truth_N}
    return points | {name: (classes_N + 1).astype(np.uint8) for name, classes_N in classes.items()}
