"""Scores of a student on held-out scenes during training, with and without their labels.

With labels: annotation-free mIoU. Without: ``agreement`` (mIoU of the student against its teacher's labels on the
points that an image shows), ``consistency`` (share of grid cells where the student predicts the same class in two
sweeps), and ``label_free``, their geometric mean; either can be gamed alone: agreement by copying the teacher,
consistency by predicting one class everywhere. Without sweeps ``consistency`` is NaN and ``label_free`` the agreement.

Legend: N points, C classes, D width of the teacher's space, M grid cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from clip2scene.data.index import Frame
from clip2scene.losses.stcr import grid_cells
from clip2scene.training.launch import Worker
from clip2scene.training.methods import TeacherMethod, seen
from clip2scene.training.metrics import confusion, mean_iou
from clip2scene.training.samples import Sample, SampleSource, cached_reader

SCORE_PREFIX = "verifying/"
"""Prefix of the scores' names in an epoch's metrics, where ``agreement`` is that of the training pairs."""
COMPARED_SWEEPS = 2
"""Always the keyframe and one earlier sweep, whatever ``distill.num_sweeps`` is, so that trials are comparable."""
CELL_M = 0.25
"""Edge of the cells in which two sweeps are compared."""


@dataclass(frozen=True)
class Validation:
    """Scores of a distilled student on held-out keyframes; picklable."""

    frames: tuple[Frame, ...]
    source: SampleSource
    """With :data:`COMPARED_SWEEPS` sweeps and a store, and with a label vocabulary only if labels may be read."""
    text_CD: torch.Tensor
    """Class embeddings of the scored classes, unit length."""
    every_epochs: int = 1
    cached_frames: int = 256

    def prepare(self, worker: Worker) -> Callable[[nn.Module], dict[str, float]]:
        """A function from a network to its scores, equal on every rank; each rank reads its share of the keyframes.

        It leaves the network in the mode (training or not) in which it was.
        """
        mine = self.frames[worker.rank :: worker.world_size]
        read = cached_reader(self.source, mine, self.cached_frames)
        text_CD, teacher = self.text_CD.to(worker.device), TeacherMethod(self.text_CD).prepare(worker.device)

        @torch.no_grad()
        def validate(model: nn.Module) -> dict[str, float]:
            was_training = model.training
            if worker.world_size > 1:
                # Each rank has its own batch norm statistics; rank 0's are scored, as they are in the checkpoint.
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, 0)
            model.eval()
            counts = _Counts(len(text_CD))
            for position in range(len(mine)):
                sample = read(position, None).to(worker.device)
                features_ND = model(sample.points_NI, sample.cloud_N)["scr"]
                counts.add(sample, (features_ND @ text_CD.T).argmax(1), teacher(sample))
            model.train(was_training)
            return counts.scores(worker, self.source.label_vocabulary is not None)

        return validate


class _Counts:
    """Integer counts over keyframes and ranks; the scores are computed from their sums."""

    def __init__(self, num_classes: int):
        self._size = num_classes
        self._by_truth = np.zeros((num_classes, num_classes), dtype=np.int64)
        self._by_teacher = np.zeros((num_classes, num_classes), dtype=np.int64)
        self._cells = np.zeros(2, dtype=np.int64)

    def add(self, sample: Sample, student_N: torch.Tensor, teacher_N: torch.Tensor) -> None:
        seen_N = seen(sample)
        own_N = seen_N & (sample.cloud_N == 0)
        self._by_teacher += confusion(_numpy(teacher_N[own_N] + 1), _numpy(student_N[own_N]), self._size)
        labels_N = sample.labels_N
        if len(labels_N):
            seen_N, student_of_keyframe_N = seen_N[: len(labels_N)], student_N[: len(labels_N)]
            self._by_truth += confusion(_numpy(labels_N[seen_N]), _numpy(student_of_keyframe_N[seen_N]), self._size)
        self._cells += same_in_both_sweeps(sample.points_NI[:, :3], sample.cloud_N, student_N, self._size)

    def scores(self, worker: Worker, with_labels: bool) -> dict[str, float]:
        flat = np.concatenate((self._by_truth.ravel(), self._by_teacher.ravel(), self._cells))
        flat = worker.total(torch.from_numpy(flat)).numpy()
        by_truth_CC, by_teacher_CC = flat[:-2].reshape(2, self._size, self._size)
        same, both = flat[-2:]
        agreement = mean_iou(by_teacher_CC)
        consistency = same / both if both else float("nan")
        label_free = (agreement * consistency) ** 0.5 if both else agreement
        scores = {"agreement": agreement, "consistency": float(consistency), "label_free": float(label_free)}
        if with_labels:
            scores["miou"] = mean_iou(by_truth_CC)
        return {SCORE_PREFIX + name: score for name, score in scores.items()}


def same_in_both_sweeps(
    points_N3: torch.Tensor, cloud_N: torch.Tensor, classes_N: torch.Tensor, num_classes: int
) -> np.ndarray:
    """Count the cells with the same most frequent class in the keyframe (cloud 0) and its earlier sweep (cloud 1).

    Args:
        points_N3: registered to the keyframe, metres.
        cloud_N: 0 or 1.
        classes_N: 0-based.
        num_classes: C.

    Returns:
        (2,) int64: cells that agree, and cells with points of both sweeps.
    """
    ids_M, cell_N = torch.unique(grid_cells(points_N3, torch.zeros_like(cloud_N), CELL_M), return_inverse=True)
    size = len(ids_M)
    counts = torch.bincount((cloud_N * size + cell_N) * num_classes + classes_N, minlength=2 * size * num_classes)
    counts_2MC = counts.view(2, size, num_classes)
    both_M = (counts_2MC.sum(2) > 0).all(0)
    first_M, second_M = counts_2MC.argmax(2)
    return np.array([int((both_M & (first_M == second_M)).sum()), int(both_M.sum())], dtype=np.int64)


def _numpy(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.cpu().numpy())
