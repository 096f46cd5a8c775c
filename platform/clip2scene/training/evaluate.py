"""Scores on raw points, of annotation-free methods and fine-tuned networks alike.

Every method is scored on the same keyframes. The domain ``seen`` holds the points that at least one encoded image
shows: the same points for every method, so one that leaves out a point there gets a wrong answer counted, and no method
gains by keeping silent. ``all`` holds every point that the method itself answers: not more than ``seen`` for 2D-only.
Ignored points count nowhere; nothing is scored on voxels.

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
from clip2scene.training.launch import TrainingError, Worker, launch
from clip2scene.training.methods import (
    UNSEEN,
    ConstantMethod,
    EnsembleMethod,
    Method,
    PointClipMethod,
    StudentMethod,
    TeacherMethod,
    seen,
)
from clip2scene.training.metrics import confusion
from clip2scene.training.samples import Sample, SampleSource

__all__ = [
    "UNSEEN",
    "ConstantMethod",
    "EnsembleMethod",
    "Method",
    "PointClipMethod",
    "Scores",
    "StudentMethod",
    "TeacherMethod",
    "evaluate",
    "example_frame",
    "label_counts",
]


@dataclass(frozen=True)
class Scores:
    """Counts of one evaluation."""

    counts: dict[str, dict[str, np.ndarray]]
    """Per method and domain (``seen``, ``all``) a (C, C) int64 confusion matrix, rows the truth."""
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
        # Rank 0 reads the example even if its turn is another's, as only rank 0 is heard.
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
        if worker.world_size > 1:
            device_counts = counts.to(worker.device)
            torch.distributed.all_reduce(device_counts)
            counts = device_counts.cpu()
        worker.emit("counts", counts.numpy())


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
    """Score every method on the keyframes, spread over the workers; counts are summed over all of them.

    Args:
        frames: keyframes with label files.
        source: with a label vocabulary, and a store where a method or the domain ``seen`` needs one.
        methods: by name.
        num_classes: C.
        name: of the run.
        folder: absolute, shared by all nodes.
        resources: workers.
        on_frames: called with numbers of keyframes done.

    Raises:
        DataError: a damaged file, met in this process; a Ray worker's is a TrainingError with the same sentence.
        TrainingError: the run failed.
    """
    heard: dict[str, Any] = {}

    def on_message(kind: str, value: Any) -> None:
        if kind == "frames":
            on_frames(value)
        else:
            heard[kind] = value

    work = _Evaluation(frames, source, methods, num_classes, example_frame(frames).frame_id)
    launch(work, name=name, folder=folder, resources=resources, on_message=on_message)
    if "counts" not in heard:
        raise TrainingError(f"run {name} ended without counts")
    per_method = dict(zip(methods, heard["counts"], strict=True))
    counts = {method: {"seen": both[0], "all": both[1]} for method, both in per_method.items()}
    return Scores(counts, heard["example"])


def example_frame(frames: tuple[Frame, ...]) -> Frame:
    """The keyframe that figures show."""
    return frames[len(frames) // 2]


def label_counts(frames: tuple[Frame, ...], source: SampleSource, num_classes: int) -> np.ndarray:
    """Points per class over the keyframes' labels, (C,) int64: decides the majority class."""
    counts_C = np.zeros(num_classes + 1, dtype=np.int64)
    for frame in frames:
        counts_C += np.bincount(source.read(frame).labels_N.numpy(), minlength=num_classes + 1)
    return counts_C[1:]


def answered(classes_N: np.ndarray, truth_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes (N,) with a wrong one wherever the method gave none.

    Wrong is the class that the method gives most often in the keyframe, or its second where that one would be right: a
    class that the method never gives gets no false points from this.

    Args:
        classes_N: 0-based, :data:`UNSEEN` where there is none.
        truth_N: labels, 0 = ignore, class ``c`` is ``c + 1``.
        num_classes: C, at least 2.
    """
    often_C = np.bincount(classes_N[classes_N != UNSEEN], minlength=num_classes)
    first, second = np.argsort(-often_C, kind="stable")[:2]
    wrong_N = np.where(truth_N == first + 1, second, first)
    return np.where(classes_N == UNSEEN, wrong_N, classes_N)


def _example(sample: Sample, truth_N: np.ndarray, classes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    points = {"points": sample.points_N4[:, :3].cpu().numpy(), "truth": truth_N}
    return points | {name: (classes_N + 1).astype(np.uint8) for name, classes_N in classes.items()}
