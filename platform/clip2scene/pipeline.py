"""A job from raw files to scores: its stages in order, each a child run in MLflow, and the report at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from clip2scene.config import STAGES, Job
from clip2scene.geometry.registration import choose_sweeps
from clip2scene.progress import console
from clip2scene.stages import Stages, Trained
from clip2scene.tracking import figures
from clip2scene.tracking.overview import frame_figure
from clip2scene.tracking.tracker import Run, Tracker
from clip2scene.training.evaluate import Scores, example_frame
from clip2scene.training.fit import Metrics
from clip2scene.training.metrics import accuracy, iou, mean_iou


class Pipeline:
    """Runs a job's stages under one parent run and keeps what the report says."""

    def __init__(self, job: Job):
        self.job = job
        self.stages = Stages(job)
        self.seconds: dict[str, float] = {}
        self.report: dict[str, Any] = {"name": job.name, "stage": job.stage, "seed": job.seed}

    def run(self, tracker: Tracker) -> dict[str, Any]:
        """Run every stage up to the job's; returns the report, which is also written to ``<storage>/report.json``.

        Raises:
            ConfigError, DataError, StorageError, TrainingError, TrackingError: one sentence each.
        """
        job, stages = self.job, self.stages
        self.tracker = tracker
        last = STAGES.index(job.stage)
        own_student = job.finetune.checkpoint is not None and job.stage == "finetune"
        tags = {
            "stage": "pipeline",
            "dataset": job.dataset.kind,
            "protocol": self._protocol(),
            "vocabulary": stages.prompts_digest,
            "job_digest": job.digest(),
        }
        with self.tracker.run(
            f"{job.name}-seed{job.seed}",
            tags=tags,
            params=job.model_dump(mode="json", by_alias=True),
            system_metrics=False,
        ) as parent:
            self.report |= {"protocol": self._protocol(), "vocabulary": stages.prompts_digest, "run_id": parent.run_id}
            if job.dataset.kind == "streetworld":
                with self._stage("streetworld", parent) as run:
                    run.set_tags({"root": str(stages.root)})
            self._index(parent)
            if last >= STAGES.index("extract") and not own_student:
                self._extract(parent)
            if last >= STAGES.index("distill") and not own_student:
                student = self._distill(parent)
                if last >= STAGES.index("evaluate"):
                    self._evaluate(parent, student)
            if last >= STAGES.index("finetune"):
                self._finetune(parent)
            self.report["seconds"] = {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}
            self.report["digests"] = self._digests()
            parent.log_metrics({f"seconds/{stage}": value for stage, value in self.seconds.items()})
            stages.storage.write_json(stages.storage.root / "report.json", _json_able(self.report))
            parent.log_artifact(stages.storage.root / "report.json")
        return self.report

    # --- stages ---

    def _index(self, parent: Run) -> None:
        with self._stage("index", parent) as run:
            index = self.stages.index
            steps = [("train", self.stages.train_frames), ("eval", self.stages.eval_frames)]
            run.log_metrics({"frames": len(index.frames)} | {f"{name}_frames": len(fs) for name, fs in steps})
            run.log_dataset(self.job.dataset.kind, index.digest, str(index.root), "index")
            run.log_dict({name: [frame.frame_id for frame in frames] for name, frames in steps}, "splits.json")

    def _extract(self, parent: Run) -> None:
        with self._stage("extract", parent) as run:
            done = self.stages.extract()
            run.set_tags({"teacher": self.stages.teacher.digest, "store": self.stages.store_digest})
            run.log_metrics(
                {
                    "images_encoded": done.images_encoded,
                    "images_cached": done.images_cached,
                    "images_broken": len(done.broken),
                }
            )
            run.log_dict({"broken": [asdict(image) for image in done.broken]}, "broken.json")
            run.log_dataset("features", self.stages.store_digest, str(self.stages.store_path), "features")
        self.report["images_encoded"] = done.images_encoded
        self.report["images_cached"] = done.images_cached
        self.report["images_broken"] = len(done.broken)

    def _distill(self, parent: Run) -> Trained:
        with self._stage("distill", parent) as run:
            history = _History(run)
            self._report_short(run)
            student = self.stages.distill(history)
            history.finish(student, "distillation")
            run.log_dataset("features", self.stages.store_digest, str(self.stages.store_path), "training")
            run.log_artifact(student.path, "student")
        return student

    def _report_short(self, run: Run) -> None:
        """Say how many keyframes have fewer than K sweeps (at a scene's start)."""
        wanted, frames = self.job.distill.num_sweeps, self.stages.train_frames
        clouds = [1 + len(choose_sweeps(frame, wanted, self.job.distill.sweep_window_s)) for frame in frames]
        short = sum(count < wanted for count in clouds)
        run.log_metrics({"keyframes_with_fewer_sweeps": short, "sweeps_mean": sum(clouds) / len(clouds)})
        if short:
            console().print(f"distill: {short} of {len(frames)} keyframes have fewer than {wanted} sweeps")

    def _evaluate(self, parent: Run, student: Trained) -> None:
        with self._stage("evaluate", parent) as run:
            scores = self.stages.score_annotation_free(student)
            teacher, learned = scores.counts["teacher_2d"]["seen"], scores.counts["student_3d"]["seen"]
            values = {
                "teacher_2d_miou": mean_iou(teacher),
                "teacher_2d_accuracy": accuracy(teacher),
                "student_3d_miou": mean_iou(learned),
                "student_3d_accuracy": accuracy(learned),
                "student_3d_all_points_miou": mean_iou(scores.counts["student_3d"]["all"]),
            }
            self._log_scores(run, scores, values, {"teacher_2d": "seen", "student_3d": "seen"})
            self._log_overview(run, scores)
        self.report |= values
        parent.log_metrics({_grouped(name): value for name, value in values.items()})

    def _finetune(self, parent: Run) -> None:
        students: dict[str, Trained] = {}
        for initialisation in self.job.finetune.initialisations:
            with self._stage(f"finetune-{initialisation}", parent, group="finetune") as run:
                history = _History(run)
                students[initialisation] = self.stages.finetune(initialisation, history)
                history.finish(students[initialisation], f"fine-tuning from {initialisation}")
                labelled = [frame.frame_id for frame in self.stages.labelled_frames]
                run.log_dict({"protocol": self.job.finetune.protocol, "labelled": labelled}, "labelled_frames.json")
                run.log_metrics({"labelled_frames": len(labelled)})
        with self._stage("evaluate-finetuned", parent, group="evaluate") as run:
            scores = self.stages.score_finetuned(students)
            mious = {name: mean_iou(scores.counts[name]["all"]) for name in scores.counts}
            values = {f"finetuned_{name}_miou": mious[name] for name in students} | {"majority_miou": mious["majority"]}
            self._log_scores(run, scores, values, dict.fromkeys(students, "all"))
        self.report["finetuned_miou"] = {name: mious[name] for name in students}
        self.report["majority_miou"] = mious["majority"]
        self.report["label_fraction"] = self.job.finetune.label_fraction
        self.report["labelled_frames"] = len(self.stages.labelled_frames)
        parent.log_metrics({_grouped(name): value for name, value in values.items()})

    # --- tracking ---

    @contextmanager
    def _stage(self, name: str, parent: Run, group: str | None = None) -> Iterator[Run]:
        started = time.perf_counter()
        tags = {"stage": group or name, "protocol": self._protocol(), "vocabulary": self.stages.prompts_digest}
        with self.tracker.run(name, parent=parent, tags=tags, params=self._params(group or name)) as run:
            yield run
            seconds = time.perf_counter() - started
            run.log_metrics({"seconds": seconds})
        key = group or name
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds
        console().print(f"{name}: {seconds:.1f} s")

    def _params(self, stage: str) -> dict[str, Any]:
        """The groups of settings that a stage depends on, so that runs of a stage compare side by side."""
        groups = {
            "streetworld": ("dataset",),
            "index": ("dataset",),
            "extract": ("dataset", "teacher", "extract"),
            "distill": ("dataset", "teacher", "prompts", "student", "distill", "resources"),
            "evaluate": ("dataset", "prompts", "student", "distill"),
            "finetune": ("dataset", "student", "finetune", "resources"),
        }
        settings = self.job.model_dump(mode="json", by_alias=True)
        return {"seed": self.job.seed} | {group: settings[group] for group in groups[stage]}

    def _log_scores(self, run: Run, scores: Scores, values: dict[str, float], domains: dict[str, str]) -> None:
        classes = self.stages.vocabulary.classes
        per_class = {
            method: dict(zip(classes, iou(scores.counts[method][domain]).tolist(), strict=True))
            for method, domain in domains.items()
        }
        self.report.setdefault("per_class", {}).update(per_class)
        run.log_metrics({_grouped(name): value for name, value in values.items()})
        run.log_metrics(
            {f"iou_{method}/{c}": v for method, ious in per_class.items() for c, v in ious.items() if v == v}
        )
        run.log_figure(figures.class_bars(per_class, "IoU per class"), "figures/classes.png")
        for method, domain in domains.items():
            matrix = figures.confusion_matrix(scores.counts[method][domain], self.stages.vocabulary, method)
            run.log_figure(matrix, f"figures/confusion_{method}.png")
        panels = {name: scores.example[name] for name in domains}
        view = figures.birds_eye(scores.example["points"], panels, scores.example["truth"], self.stages.vocabulary)
        run.log_figure(view, "figures/birds_eye.png")

    def _log_overview(self, run: Run, scores: Scores) -> None:
        """The example's images with what each method says of the points on them."""
        frame = example_frame(self.stages.eval_frames)
        for method in ("truth", "teacher_2d", "student_3d"):
            figure = frame_figure(self.stages.index, frame, self.stages.vocabulary, scores.example[method])
            run.log_figure(figure, f"figures/images_{method}.png")

    def _protocol(self) -> str:
        return f"{self.job.dataset.train_split}->{self.job.dataset.eval_split};{self.job.finetune.protocol}"

    def _digests(self) -> dict[str, str]:
        digests = {"job": self.job.digest(), "index": self.stages.index.digest}
        if STAGES.index(self.job.stage) >= STAGES.index("extract"):
            digests |= {"teacher": self.stages.teacher.digest, "features": self.stages.store_digest}
        return digests


class _History:
    """Hands every epoch's metrics to a run and keeps them for the loss curve."""

    def __init__(self, run: Run):
        self._run, self._rows = run, []  # type: Run, list[Metrics]

    def __call__(self, epoch: int, metrics: Metrics) -> None:
        self._rows.append(metrics)
        self._run.log_metrics(metrics, step=epoch)

    def finish(self, student: Trained, title: str) -> None:
        """Tag the run with what came out of it and draw its curves."""
        self._run.set_tags({"student": student.digest, "cached": str(student.cached).lower()})
        if self._rows:
            self._run.log_figure(figures.loss_curves(self._rows, title), "figures/losses.png")


def _grouped(name: str) -> str:
    """``student_3d_miou`` as ``miou/student_3d``: MLflow draws the metrics before a slash together."""
    method, _, score = name.rpartition("_")
    return f"{score}/{method}"


def _json_able(value: Any) -> Any:
    """NaN (a class that does not occur) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
