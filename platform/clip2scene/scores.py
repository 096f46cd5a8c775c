"""The scores that a job writes, by name: the pipeline computes exactly these, and a table may show any of them."""

from __future__ import annotations

from collections.abc import Iterable

from clip2scene.config import TEXT_FREE, Job
from clip2scene.data.vocabulary import vocabulary_of
from clip2scene.tracking.table.record import ALL_POINTS

Counted = tuple[str, str]
"""The method and the domain of the counts that a score is computed from (:class:`clip2scene.training.evaluate.Scores`).
"""
_MAJORITY = "majority_miou"


def annotation_free_scores(methods: Iterable[str]) -> dict[str, Counted]:
    """Scores without labels, by name: of all methods on the points that an image shows, of the student on all too."""
    methods = tuple(methods)
    seen = {f"{method}_{measure}": (method, "seen") for method in methods for measure in ("miou", "accuracy")}
    every = {f"student_3d{ALL_POINTS}_miou": ("student_3d", "all")} if "student_3d" in methods else {}
    return seen | every


def finetuned_scores(initialisations: Iterable[str]) -> dict[str, Counted]:
    """Scores of fine-tuned students and of the majority class, by name."""
    return {f"finetuned_{name}_miou": (name, "all") for name in initialisations} | {_MAJORITY: ("majority", "all")}


def is_scored_annotation_free(job: Job) -> bool:
    """Whether a job distils a student that knows classes, and scores it."""
    return job.needs_teacher and job.scores and job.distill.method not in TEXT_FREE


def grouped(name: str) -> str:
    """``student_3d_miou`` as ``miou/student_3d``: MLflow draws the metrics before a slash together."""
    method, _, score = name.rpartition("_")
    return f"{score}/{method}"


def iou_name(method: str, class_name: str) -> str:
    """Name in MLflow of the IoU of one class."""
    return f"iou_{method}/{class_name}"


def mean_scores_of(job: Job) -> tuple[str, ...]:
    """Names in MLflow of the scores over all classes that a job writes."""
    return tuple(map(grouped, _scores_of(job)))


def class_scores_of(job: Job) -> tuple[str, ...]:
    """Names in MLflow of the IoUs per class that a job writes for the classes that occur."""
    methods = [name.removesuffix("_miou") for name in _scores_of(job) if name.endswith("_miou") and name != _MAJORITY]
    return tuple(iou_name(method, each) for method in methods for each in vocabulary_of(job.dataset.kind).classes)


def _scores_of(job: Job) -> dict[str, Counted]:
    free = annotation_free_scores(job.evaluate.methods) if is_scored_annotation_free(job) else {}
    return free | (finetuned_scores(job.initialisations) if job.finetunes and job.scores else {})
