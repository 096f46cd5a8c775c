"""Scores on raw points: the teacher's projected labels (2D-only), students (3D-only), fine-tuned networks, majority.

Every method is scored on the same keyframes; the domain ``seen`` holds the points that at least one encoded image
shows, ``all`` every point. Ignored points count nowhere; nothing is scored on voxels.

Legend: N points, P point-pixel pairs, C classes, D width of the teacher's space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from clip2scene.config import ResourceSettings, StudentSettings
from clip2scene.data.index import Frame
from clip2scene.geometry.interpolation import bilinear
from clip2scene.student.network import Student
from clip2scene.training.launch import TrainingError, Worker, launch
from clip2scene.training.metrics import confusion
from clip2scene.training.samples import Sample, SampleSource

UNSEEN = -1
"""Class of a point that no image shows, in the teacher's prediction."""


@dataclass(frozen=True)
class TeacherMethod:
    """2D-only: a point's class is that of the mean of its pixels' features."""

    text_CD: torch.Tensor

    def prepare(self, device: torch.device) -> Callable[[Sample], torch.Tensor]:
        """A function from a keyframe to classes (N,) int64, :data:`UNSEEN` where no image shows the point."""
        text_CD = self.text_CD.to(device)

        def predict(sample: Sample) -> torch.Tensor:
            pixels_PD = normalize(bilinear(sample.features_MhwD, sample.pair_image_P, sample.pair_position_P2), dim=1)
            logits_NC = torch.zeros(len(sample.points_N4), len(text_CD), device=device)
            logits_NC.index_add_(0, sample.pair_point_P, pixels_PD @ text_CD.T)
            return torch.where(_seen(sample), logits_NC.argmax(1), UNSEEN)

        return predict


@dataclass(frozen=True)
class StudentMethod:
    """3D-only: the class whose text is nearest to the SCR head's feature, or the classifier's class."""

    student: StudentSettings
    weights: dict[str, torch.Tensor]
    text_CD: torch.Tensor | None
    """Class embeddings for a distilled student; None for a fine-tuned one."""
    num_classes: int

    def prepare(self, device: torch.device) -> Callable[[Sample], torch.Tensor]:
        """A function from a keyframe to classes (N,) int64."""
        if self.text_CD is None:
            model = Student(self.student, num_classes=self.num_classes)
        else:
            model = Student(self.student, embedding_dim=self.text_CD.shape[1])
        model.load_state_dict(self.weights)
        model.to(device).eval()
        text_CD = None if self.text_CD is None else self.text_CD.to(device)

        def predict(sample: Sample) -> torch.Tensor:
            heads = model(sample.points_N4, sample.cloud_N)
            logits_NC = heads["classifier"] if text_CD is None else heads["scr"] @ text_CD.T
            return logits_NC.argmax(1)

        return predict


@dataclass(frozen=True)
class ConstantMethod:
    """The same class everywhere: what a network must beat."""

    constant: int

    def prepare(self, device: torch.device) -> Callable[[Sample], torch.Tensor]:
        """A function from a keyframe to classes (N,) int64."""
        return lambda sample: torch.full((len(sample.points_N4),), self.constant, device=device)


Method = TeacherMethod | StudentMethod | ConstantMethod


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
        # Every rank reads the example, which costs one keyframe, so that rank 0 can emit it.
        for at, frame in enumerate(self.frames):
            mine = at % worker.world_size == worker.rank
            example = frame.frame_id == self.example_id and worker.rank == 0
            if not (mine or example):
                continue
            sample = self.source.read(frame).to(worker.device)
            seen_N = _seen(sample).cpu().numpy()
            truth_N = sample.labels_N.cpu().numpy()
            classes = {name: predict(sample).cpu().numpy() for name, predict in predictors.items()}
            if example:
                worker.emit("example", _example(sample, truth_N, classes))
            if not mine:
                continue
            for row, classes_N in enumerate(classes.values()):
                for column, domain_N in enumerate((seen_N, classes_N != UNSEEN)):
                    chosen_N = domain_N & (classes_N != UNSEEN)
                    counted = confusion(truth_N[chosen_N], classes_N[chosen_N], size)
                    counts[row, column] += torch.from_numpy(counted)
            worker.emit("frames", worker.world_size)
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
        DataError: a damaged file.
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


def _seen(sample: Sample) -> torch.Tensor:
    seen_N = torch.zeros(len(sample.points_N4), dtype=torch.bool, device=sample.points_N4.device)
    seen_N[sample.pair_point_P] = True
    return seen_N


def _example(sample: Sample, truth_N: np.ndarray, classes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    points = {"points": sample.points_N4[:, :3].cpu().numpy(), "truth": truth_N}
    return points | {name: (classes_N + 1).astype(np.uint8) for name, classes_N in classes.items()}
