"""The stage ``predict``: a folder of label files in the format of the data set's benchmark, ready to be submitted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.config import TEXT_FREE, digest_of
from clip2scene.data.benchmarks import LABEL_FORMATS, prediction_file, submission_files
from clip2scene.errors import DataError
from clip2scene.paths import absolute
from clip2scene.progress import progress
from clip2scene.stages import Stages
from clip2scene.storage import Storage
from clip2scene.student.checkpoint import Checkpoint, load_checkpoint
from clip2scene.training.checkpoints import file_digest
from clip2scene.training.methods import StudentMethod
from clip2scene.training.predict import write_predictions
from clip2scene.training.samples import SampleSource

_FORMAT = "clip2scene-predictions-1"
_CLASSIFIER, _TEXT_HEAD = "heads.classifier.weight", "heads.scr.weight"


@dataclass(frozen=True)
class Predictions:
    """Label files of every keyframe of the evaluation split."""

    folder: Path
    """Holds the files that are submitted, and nothing else."""
    manifest: dict[str, Any]
    """``network``, ``checkpoint``, ``split``, ``frames``, and ``points`` by class; written last, beside the folder."""
    cached: bool
    """Whether all were there already."""


def predict(stages: Stages) -> Predictions:
    """Write the predictions of the job's network, or those that an interrupted run has left to do.

    Raises:
        ConfigError, DataError: the checkpoint cannot predict this data set; it is damaged, or a cloud is.
        StorageError: a file cannot be written.
        TrainingError: the workers failed.
    """
    job, index, storage = stages.job, stages.eval_index, stages.storage
    path, checkpoint = _network(stages)
    method = _method(stages, path, checkpoint)
    split = job.dataset.eval_split
    names = {prediction_file(index.dataset, split, frame): frame for frame in stages.eval_frames}
    weights = file_digest(path)
    text = None if method.text_CD is None else method.text_CD.tolist()
    digest = digest_of(_FORMAT, index.digests.unlabelled, list(names), weights, text)
    folder, manifest_path = storage.path("predictions", digest), storage.path("predictions", f"{digest}.json")
    files = {folder / name: frame for name, frame in names.items()}
    extras = {folder / name: values for name, values in submission_files(index.dataset, split).items()}
    if storage.fetch(manifest_path) and _missing(storage, (*files, *extras)):
        storage.remove(manifest_path)  # a file was removed since
    with stages.alone(manifest_path, "predicts this") as cached:
        if not cached:
            for aside in folder.rglob(".*"):  # of killed writers
                aside.unlink(missing_ok=True)
            with progress("predict", len(files), unit="frames") as advance:
                counts_C = write_predictions(
                    files,
                    SampleSource(index.root),
                    method,
                    LABEL_FORMATS[index.dataset],
                    storage=storage,
                    name=f"predict-{digest}",
                    folder=storage.root / "train",
                    resources=job.resources,
                    on_frames=advance,
                )
            for extra, values in extras.items():
                storage.write_json(extra, values)
            manifest = {
                "network": "finetuned" if method.text_CD is None else "distilled",
                "checkpoint": weights,
                "split": split,
                "frames": len(files),
                "points": dict(zip(stages.vocabulary.classes, counts_C.tolist(), strict=True)),
            }
            storage.write_json(manifest_path, manifest)
    return Predictions(folder, json.loads(manifest_path.read_text(encoding="utf-8")), cached)


def _network(stages: Stages) -> tuple[Path, Checkpoint]:
    """The file of the network that predicts, and what it holds; trained if it is not there yet."""
    job = stages.job
    if job.predict.checkpoint is not None:
        path = Path(absolute(job.predict.checkpoint))
        return path, load_checkpoint(path, job.student)
    trained = (
        stages.finetune(job.initialisations[0], lambda epoch, metrics: None)
        if job.predict.network == "finetuned"
        else stages.distill(lambda epoch, metrics: None)
    )
    return trained.path, trained.checkpoint


def _method(stages: Stages, path: Path, checkpoint: Checkpoint) -> StudentMethod:
    """How a network predicts: by its classifier, or by the texts of the classes.

    Raises:
        DataError: it was fine-tuned on other classes, or distilled by another teacher or without one.
    """
    job, weights, num_classes = stages.job, checkpoint.weights, len(stages.vocabulary.classes)
    if _CLASSIFIER in weights:
        if (found := len(weights[_CLASSIFIER])) != num_classes:
            raise DataError(
                f"{path}: fine-tuned on {found} classes, and {stages.vocabulary.name} has {num_classes}; allowed: a "
                "network fine-tuned on this data set, or a distilled one"
            )
        return StudentMethod(job.student, weights, None, num_classes)
    method, teacher = (checkpoint.about.get(key) for key in ("method", "teacher"))
    if method in TEXT_FREE or _TEXT_HEAD not in weights:
        raise DataError(f"{path}: has no classes before it is fine-tuned (distill.method={method}); fine-tune it first")
    text_CD = stages.text(stages.vocabulary, job.prompts.templates)
    if len(weights[_TEXT_HEAD]) != text_CD.shape[1] or teacher not in (None, stages.teacher.text_digest):
        raise DataError(
            f"{path}: distilled from another teacher than this job's (teacher.model={job.teacher.model}); allowed: the "
            "teacher.model and teacher.pretrained that it was distilled with"
        )
    return StudentMethod(job.student, weights, text_CD, num_classes)


def _missing(storage: Storage, files: Iterable[Path]) -> bool:
    """Whether any of the files is neither here nor in the object store."""
    wanted = set(files)
    there = {folder / name for folder in {file.parent for file in wanted} for name in storage.names(folder)}
    return not wanted <= there
