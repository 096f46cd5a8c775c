"""The stages index -> extract -> distill -> evaluate -> finetune -> evaluate, each from artifacts to artifacts.

``predict`` is in :mod:`clip2scene.predictions`.

A stage requests what it needs, so running a later stage runs the missing earlier ones; finished artifacts are found by
their digest and not made again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from clip2scene.artifacts import Artifacts
from clip2scene.config import TEXT_FREE, Initialisation, digest_of
from clip2scene.data.datasets import ego_half_edge_m
from clip2scene.data.index import Frame
from clip2scene.errors import DataError
from clip2scene.paths import absolute
from clip2scene.progress import progress
from clip2scene.storage import locked
from clip2scene.student.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from clip2scene.training.distill import Distillation
from clip2scene.training.evaluate import Scores, evaluate, label_counts
from clip2scene.training.finetune import Finetuning, choose_labelled
from clip2scene.training.fit import Fitted, Metrics, Training, fit
from clip2scene.training.methods import (
    ConstantMethod,
    EnsembleMethod,
    Method,
    PointClipMethod,
    StudentMethod,
    TeacherMethod,
)
from clip2scene.training.samples import SampleSource, check_window
from clip2scene.training.validation import COMPARED_SWEEPS, Validation

OnEpoch = Callable[[int, Metrics], None]


@dataclass(frozen=True)
class Trained:
    """A student on disk."""

    path: Path
    digest: str
    checkpoint: Checkpoint
    cached: bool
    """Whether it was there already."""


class Stages(Artifacts):
    """A job's students and scores, in addition to the artifacts that they are made from."""

    # --- training ---

    def distill(self, on_epoch: OnEpoch) -> Trained:
        """Pre-train a student on the training split, unless it is there already."""
        training = self.distillation()
        about = {"method": self.job.distill.method, "teacher": self.teacher.text_digest}
        return self._train(training, "distill", self.distill_digest, on_epoch, about)

    def check_sweeps(self) -> None:
        """Refuse to distil without the sweeps that the settings ask for.

        Raises:
            ConfigError: the window of the sweeps reaches further back than the index.
        """
        check_window(self.train_frames, self.job.distill, self.job.dataset.max_sweeps)

    def check_images(self, *, scored: bool = False) -> None:
        """Refuse to distil from a split without any image: the student would learn nothing, and yet be stored.

        Args:
            scored: whether the student is then scored, which needs images of the evaluation split too.

        Raises:
            DataError: no keyframe of a split has an image, and the method needs images.
        """
        if self.job.distill.method in TEXT_FREE:
            return
        splits = {"train_split": self.train_frames} | ({"eval_split": self.eval_frames} if scored else {})
        for key, frames in splits.items():
            if not any(frame.cameras for frame in frames):
                raise DataError(
                    f"dataset.{key}={getattr(self.job.dataset, key)!r}: none of its {len(frames)} keyframes has an "
                    "image, and distillation needs them; without images, fine-tune from finetune.checkpoint or scratch"
                )

    def check_labels(self) -> None:
        """Refuse a job that lacks labels for its scores or its fine-tuning, if it does either.

        Raises:
            DataError: a keyframe has no label file.
        """
        splits = {"eval_split": self.eval_frames} if self.job.scores else {}
        if self.job.finetunes:
            splits["train_split"] = self.labelled_frames
        for key, frames in splits.items():
            unlabelled = next((frame for frame in frames if frame.label_path is None), None)
            if unlabelled is not None:
                raise DataError(
                    f"dataset.{key}={getattr(self.job.dataset, key)!r}: frame {unlabelled.frame_id} has no label file, "
                    f"which {'scoring' if key == 'eval_split' else 'fine-tuning'} needs (nuScenes: lidarseg)"
                )

    def distillation(self) -> Distillation:
        """The pre-training of the settings."""
        self.check_sweeps()
        self.check_images()
        job = self.job
        return Distillation(
            seed=job.seed,
            frames=self.distilled_frames,
            source=SampleSource(
                self.index.root,
                self.store,
                job.distill.num_sweeps,
                job.distill.sweep_window_s,
                job.distill.sweep_choice,
                job.distill.merge_sweeps,
                self.make_superpixels() if job.distill.method == "slidr" else None,
                ego_half_edge_m(job.dataset.kind),
            ),
            resources=job.resources,
            student=job.student,
            settings=job.distill,
            text_CD=self.text(self.prompt_vocabulary, job.prompts.templates),
        )

    @property
    def labels_for_scores(self) -> bool:
        """Whether every keyframe of the evaluation split has a label file."""
        return all(frame.label_path is not None for frame in self.eval_frames)

    def validation(self, every_epochs: int, *, labels: bool) -> Validation:
        """Scores of the student on the evaluation split during training; ``labels``: whether its labels may be read."""
        job, words = self.job, self.vocabulary if labels else None
        return Validation(
            frames=self.eval_frames,
            source=SampleSource(
                self.index.root,
                self.store,
                num_sweeps=COMPARED_SWEEPS,
                ego_half_edge_m=ego_half_edge_m(job.dataset.kind),
                label_vocabulary=words,
            ),
            text_CD=self.text(self.vocabulary, job.prompts.templates),
            every_epochs=every_epochs,
            cached_frames=job.resources.cached_frames,
        )

    @property
    def distill_digest(self) -> str:
        """Digest of the distilled student."""
        job = self.job
        return digest_of(
            "distill",
            self.index.digests.unlabelled,
            self.store_digest,
            self.teacher.text_digest,
            self.prompt_vocabulary.digest,
            job.prompts.templates,
            [frame.frame_id for frame in self.distilled_frames],
            *self.quarantined(self.distilled_frames),
            job.student.digest(),
            job.distill.digest(),
            ego_half_edge_m(job.dataset.kind),
            job.seed,
            job.resources.num_workers,
        )

    @functools.cached_property
    def labelled_frames(self) -> tuple[Frame, ...]:
        """Training keyframes with labels that fine-tuning may read."""
        return choose_labelled(self.train_frames, self.job.finetune)

    def finetune(self, initialisation: Initialisation, on_epoch: OnEpoch) -> Trained:
        """Train a ``pretrained`` or ``scratch`` student on :attr:`labelled_frames`, unless it is there already."""
        job = self.job
        start: Checkpoint | None = None
        origin = "scratch"
        if initialisation == "pretrained":
            trained = self.pretrained(lambda epoch, metrics: None)
            start, origin = trained.checkpoint, trained.digest
        frames = self.labelled_frames
        labelled = [frame.frame_id for frame in frames]
        digest = digest_of(
            "finetune",
            origin,
            self.index.digest,
            labelled,
            self.vocabulary.digest,
            job.student.digest(),
            job.finetune.model_copy(update={"initialisations": (), "checkpoint": None}).model_dump(mode="json"),
            job.seed,
            job.resources.num_workers,
        )
        training = Finetuning(
            seed=job.seed,
            frames=frames,
            source=self._labelled_source(),
            resources=job.resources,
            student=job.student,
            settings=job.finetune,
            num_classes=len(self.vocabulary.classes),
            pretrained=None if start is None else start.weights,
        )
        return self._train(training, f"finetune-{initialisation}", digest, on_epoch)

    def pretrained(self, on_epoch: OnEpoch) -> Trained:
        """The student that fine-tuning starts from: ``finetune.checkpoint`` if it is set, else the distilled one."""
        given = self.job.finetune.checkpoint
        if given is None:
            return self.distill(on_epoch)
        path = Path(absolute(given))
        checkpoint = load_checkpoint(path, self.job.student)
        return Trained(path, str(checkpoint.about.get("digest")), checkpoint, cached=True)

    def student_path(self, digest: str) -> Path:
        """Where a trained student lies or will lie."""
        return self.storage.path("students", f"{digest}.safetensors")

    def _train(
        self,
        training: Training,
        stage: str,
        digest: str,
        on_epoch: OnEpoch,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> Trained:
        path = self.student_path(digest)
        with self.alone(path, "trains this") as cached:
            if not cached:
                name, folder = f"{stage}-{digest}", self.storage.root / "train"
                with progress(stage, training.steps, unit="steps") as advance:
                    fitted: Fitted = fit(training, name=name, folder=folder, on_epoch=on_epoch, on_steps=advance)
                with self.storage.writing(path) as aside:
                    made = {"digest": digest, "stage": stage, "history": fitted.history, **about}
                    save_checkpoint(aside, fitted.weights, self.job.student, made)
                shutil.rmtree(folder / name, ignore_errors=True)  # checkpoints, twice the size of the student and more
        checkpoint = load_checkpoint(path, self.job.student)
        if cached:
            for metrics in checkpoint.about["history"]:
                on_epoch(int(metrics["epoch"]), {key: value for key, value in metrics.items() if key != "epoch"})
        return Trained(path, digest, checkpoint, cached)

    @contextlib.contextmanager
    def alone(self, path: Path, doing: str) -> Iterator[bool]:
        """Whether the storage has an artifact; if not, the block is the only one to make it on this machine."""
        if self.storage.fetch(path):
            yield True
            return
        with locked(path.parent, doing, name=f".{path.stem}.lock"):
            yield self.storage.fetch(path)

    # --- scores ---

    def score_annotation_free(self, student: Trained) -> Scores:
        """Scores of the job's annotation-free methods on the evaluation split."""
        job = self.job
        text_CD = self.text(self.vocabulary, job.prompts.templates)
        weights = student.checkpoint.weights
        known: dict[str, Callable[[], Method]] = {
            "teacher_2d": lambda: TeacherMethod(text_CD),
            "student_3d": lambda: StudentMethod(job.student, weights, text_CD, len(text_CD)),
            "ensemble": lambda: EnsembleMethod(job.student, weights, text_CD),
            "pointclip": lambda: PointClipMethod(
                self.teacher.settings, self.text(self.vocabulary, "depth_map"), job.dataset.kind == "scannet"
            ),
        }
        methods: dict[str, Callable[[], Method]] = {name: known[name] for name in job.evaluate.methods}
        made_of = [student.digest, self.prompts_digest, self.store_digest, self.teacher.text_digest]
        return self._score("annotation-free", methods, [*made_of, *self.quarantined(self.eval_frames)])

    def score_finetuned(self, students: Mapping[Initialisation, Trained]) -> Scores:
        """Scores of the fine-tuned students by initialisation, and of the majority class of the labelled keyframes."""
        num_classes = len(self.vocabulary.classes)

        def student(name: Initialisation) -> Method:
            return StudentMethod(self.job.student, students[name].checkpoint.weights, None, num_classes)

        def majority() -> Method:
            counts_C = label_counts(self.labelled_frames, self._labelled_source(), num_classes)
            return ConstantMethod(int(np.argmax(counts_C)))

        methods = {name: functools.partial(student, name) for name in students} | {"majority": majority}
        return self._score("finetuned", methods, [trained.digest for trained in students.values()])

    def _score(self, kind: str, methods: Mapping[str, Callable[[], Method]], made_of: Sequence[Any]) -> Scores:
        """Scores of the methods, which are built only if the scores are not there yet."""
        frames = self.eval_frames
        self.check_labels()
        ids = [frame.frame_id for frame in frames]
        digest = digest_of("scores", kind, list(methods), self.index.digest, made_of, ids)
        path = self.storage.path("scores", f"{digest}.npz")
        with self.alone(path, "computes these scores") as cached:
            if cached:
                return _read_scores(path)
            store = self.store if kind == "annotation-free" else None
            source = SampleSource(self.index.root, store, label_vocabulary=self.vocabulary)
            with progress(f"evaluate {kind}", len(frames), unit="frames") as advance:
                scores = evaluate(
                    frames,
                    source,
                    {name: make() for name, make in methods.items()},
                    num_classes=len(self.vocabulary.classes),
                    name=f"evaluate-{digest}",
                    folder=self.storage.root / "train",
                    resources=self.job.resources,
                    on_frames=advance,
                )
            with self.storage.writing(path) as aside:
                _write_scores(aside, scores)
            return scores

    def _labelled_source(self) -> SampleSource:
        return SampleSource(self.index.root, label_vocabulary=self.vocabulary)


def _write_scores(path: Path, scores: Scores) -> None:
    arrays = {f"counts/{m}/{d}": counts for m, domains in scores.counts.items() for d, counts in domains.items()}
    arrays |= {f"example/{name}": values for name, values in scores.example.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, about=json.dumps({"format": "clip2scene-scores-1"}), **arrays)


def _read_scores(path: Path) -> Scores:
    counts: dict[str, dict[str, np.ndarray]] = {}
    example = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays.files:
            kind, *rest = key.split("/")
            if kind == "counts":
                counts.setdefault(rest[0], {})[rest[1]] = arrays[key]
            elif kind == "example":
                example[rest[0]] = arrays[key]
    return Scores(counts, example)
