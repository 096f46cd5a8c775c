"""A job from raw files to scores: its stages in order, each a child run in MLflow, and the report at the end."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip2scene.config import STAGES, TEXT_FREE, Job
from clip2scene.progress import console
from clip2scene.stages import Stages, Trained, needs_teacher
from clip2scene.tracking import figures
from clip2scene.tracking.overview import frame_figure, readable_images
from clip2scene.tracking.table_record import ALL_POINTS
from clip2scene.tracking.tracker import Run, Tracker
from clip2scene.training.evaluate import Scores, example_frame
from clip2scene.training.fit import Metrics
from clip2scene.training.launch import crew
from clip2scene.training.metrics import accuracy, iou, mean_iou
from clip2scene.training.samples import num_clouds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Pipeline:
    """Runs a job's stages under one parent run and keeps what the report says.

    A brief one, of the many of a table, keeps everything in the one run: no child a stage, and of the pictures only
    the numbers they are drawn from (``example.npz``: ``points``, ``truth`` and a label array per method).
    """

    def __init__(self, job: Job, *, brief: bool = False):
        self.job = job
        self.brief = brief
        self.stages = Stages(job)
        self.seconds: dict[str, float] = {}
        self.report: dict[str, Any] = {"name": job.name, "stage": job.stage, "seed": job.seed}
        self.scores: dict[str, float] = {}
        """The last ones, called as in MLflow (``miou/student_3d``)."""
        self.example: dict[str, np.ndarray] = {}

    def run(
        self,
        tracker: Tracker,
        *,
        parent: Run | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run every stage up to the job's; returns the report, which is also an artifact of the run.

        Args:
            tracker: where the runs are kept.
            parent: the run that the pipeline's is listed below.
            name: of the pipeline's run; the job's name and seed when not given.
            tags: more tags of that run.

        Raises:
            ConfigError, DataError, StorageError, TrainingError, TrackingError: one sentence each.
        """
        job, stages = self.job, self.stages
        self.tracker = tracker
        own_tags = {
            "stage": "pipeline",
            "dataset": job.dataset.kind,
            "protocol": self._protocol(),
            "vocabulary": stages.prompts_digest,
            "job_digest": job.digest(),
        }
        with self.tracker.run(
            name or f"{job.name}-seed{job.seed}",
            parent=parent,
            tags=own_tags | dict(tags or {}),
            params=job.model_dump(mode="json", by_alias=True),
            system_metrics=False,
        ) as run:
            self.report |= {"protocol": self._protocol(), "vocabulary": stages.prompts_digest, "run_id": run.run_id}
            self._run_stages(run)
            self.report["seconds"] = {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}
            self.report["digests"] = self._digests()
            run.log_metrics({f"seconds/{stage}": value for stage, value in self.seconds.items()})
            run.log_dict(_json_able(self.report), "report.json")
            if self.brief and self.example:
                with tempfile.TemporaryDirectory() as folder:
                    np.savez_compressed(Path(folder) / "example.npz", **self.example)
                    run.log_artifact(Path(folder) / "example.npz")
        if not self.brief:
            stages.storage.write_json(stages.storage.root / "report.json", _json_able(self.report))
        return self.report

    def _run_stages(self, run: Run) -> None:
        job, last = self.job, STAGES.index(self.job.stage)
        if job.dataset.kind == "streetworld":
            with self._stage("streetworld", run) as child:
                child.set_tags({"root": str(self.stages.root)})
        self._index(run)
        teaches, scored = needs_teacher(job), last >= STAGES.index("evaluate")
        # What is missing is told before hours of extraction.
        if scored:
            self.stages.check_labels()
        if teaches:
            if last >= STAGES.index("distill"):
                self.stages.check_images(scored=scored)
            self._extract(run)
        with crew(job.resources):
            if teaches and last >= STAGES.index("distill"):
                student = self._distill(run)
                if scored and job.distill.method not in TEXT_FREE:
                    self._evaluate(run, student)
                elif scored and not self.brief:
                    console().print(f"evaluate: left out, distill.method={job.distill.method} knows no classes yet")
            if last >= STAGES.index("finetune"):
                self._finetune(run)

    # --- stages ---

    def _index(self, parent: Run) -> None:
        with self._stage("index", parent) as run:
            index = self.stages.index
            steps = [("train", self.stages.train_frames), ("eval", self.stages.eval_frames)]
            for sentence in index.left_out:
                console().print(f"index: {sentence}", markup=False, soft_wrap=True)
            run.log_metrics(
                {"frames": len(index.frames), "left_out": len(index.left_out)}
                | {f"{name}_frames": len(fs) for name, fs in steps}
            )
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
            history = _History(run, "distill/" if self.brief else "")
            self._report_short(run)
            student = self.stages.distill(history)
            self._finish(run, history, student, "distillation")
            run.log_dataset("features", self.stages.store_digest, str(self.stages.store_path), "training")
        self.report["student_path"] = str(student.path)
        return student

    def _finish(self, run: Run, history: _History, student: Trained, title: str) -> None:
        """Say in the run what came out of a training."""
        run.set_tags({"student": student.digest, "cached": str(student.cached).lower()})
        if not self.brief:
            run.log_artifact(student.path, "student")
        if history.rows:
            self._figure(run, lambda: figures.loss_curves(history.rows, title), "figures/losses.png")

    def _report_short(self, run: Run) -> None:
        """Say how many keyframes have fewer than K sweeps (at a scene's start)."""
        wanted, frames = self.job.distill.num_sweeps, self.stages.train_frames
        clouds = [num_clouds(frame, self.job.distill) for frame in frames]
        short = sum(count < wanted for count in clouds)
        run.log_metrics({"keyframes_with_fewer_sweeps": short, "sweeps_mean": sum(clouds) / len(clouds)})
        if short:
            console().print(f"distill: {short} of {len(frames)} keyframes have fewer than {wanted} sweeps")

    def _evaluate(self, parent: Run, student: Trained) -> None:
        with self._stage("evaluate", parent) as run:
            scores = self.stages.score_annotation_free(student)
            # All on the points that an image shows; networks see the others too.
            values: dict[str, float] = {}
            for method, counts in scores.counts.items():
                values |= {f"{method}_miou": mean_iou(counts["seen"]), f"{method}_accuracy": accuracy(counts["seen"])}
            if "student_3d" in scores.counts:
                every, of_all = f"student_3d{ALL_POINTS}", scores.counts["student_3d"]["all"]
                values[f"{every}_miou"] = mean_iou(of_all)
                self._log_per_class(run, every, self._per_class(of_all))
            self._log_scores(run, scores, values, dict.fromkeys(scores.counts, "seen"))
            self._log_overview(run, scores)
        self.report |= values
        self._log_final(parent, values)

    def _finetune(self, parent: Run) -> None:
        students: dict[str, Trained] = {}
        for initialisation in self.job.finetune.initialisations:
            with self._stage(f"finetune-{initialisation}", parent, group="finetune") as run:
                history = _History(run, f"finetune-{initialisation}/" if self.brief else "")
                students[initialisation] = self.stages.finetune(initialisation, history)
                self._finish(run, history, students[initialisation], f"fine-tuning from {initialisation}")
                labelled = [frame.frame_id for frame in self.stages.labelled_frames]
                run.log_dict({"protocol": self.job.finetune.protocol, "labelled": labelled}, "labelled_frames.json")
                run.log_metrics({"labelled_frames": len(labelled)})
        with self._stage("evaluate-finetuned", parent, group="evaluate") as run:
            scores = self.stages.score_finetuned(students)
            mious = {name: mean_iou(scores.counts[name]["all"]) for name in scores.counts}
            values = {f"finetuned_{name}_miou": mious[name] for name in students} | {"majority_miou": mious["majority"]}
            self._log_scores(run, scores, values, dict.fromkeys(students, "all"), prefix="finetuned_")
        self.report["finetuned_miou"] = {name: mious[name] for name in students}
        self.report["majority_miou"] = mious["majority"]
        count = len(self.stages.labelled_frames)
        self.report |= {"label_fraction": count / len(self.stages.train_frames), "labelled_frames": count}
        self._log_final(parent, values)

    # --- tracking ---

    @contextmanager
    def _stage(self, name: str, parent: Run, group: str | None = None) -> Iterator[Run]:
        started = time.perf_counter()
        if self.brief:
            yield parent
            seconds = time.perf_counter() - started
        else:
            tags = {"stage": group or name, "protocol": self._protocol(), "vocabulary": self.stages.prompts_digest}
            with self.tracker.run(name, parent=parent, tags=tags, params=self._params(group or name)) as run:
                yield run
                seconds = time.perf_counter() - started
                run.log_metrics({"seconds": seconds})
            console().print(f"{name}: {seconds:.1f} s")
        key = group or name
        self.seconds[key] = self.seconds.get(key, 0.0) + seconds

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

    def _figure(self, run: Run, make: Callable[[], Figure], path: str) -> None:
        if not self.brief:
            run.log_figure(make(), path)

    def _log_final(self, run: Run, values: dict[str, float]) -> None:
        scores = {_grouped(name): value for name, value in values.items()}
        self.scores |= scores
        run.log_metrics(scores)

    def _log_scores(
        self, run: Run, scores: Scores, values: dict[str, float], domains: dict[str, str], prefix: str = ""
    ) -> None:
        """Scores, scores per class and figures; ``domains`` says on which points each method is scored."""
        per_class = {method: self._per_class(scores.counts[method][domain]) for method, domain in domains.items()}
        self.report.setdefault("per_class", {}).update(per_class)
        self._log_final(run, values)
        for method, ious in per_class.items():
            self._log_per_class(run, f"{prefix}{method}", ious)
        example, words = scores.example, self.stages.vocabulary
        self.example |= {"points": example["points"], "truth": example["truth"]}
        self.example |= {f"{prefix}{method}": example[method] for method in domains}
        self._figure(run, lambda: figures.class_bars(per_class, "IoU per class"), "figures/classes.png")
        for method, domain in domains.items():
            counts = scores.counts[method][domain]
            self._figure(
                run,
                functools.partial(figures.confusion_matrix, counts, words, method),
                f"figures/confusion_{method}.png",
            )
        panels = {name: example[name] for name in domains}
        self._figure(
            run,
            lambda: figures.birds_eye(example["points"], panels, example["truth"], words),
            "figures/birds_eye.png",
        )

    def _per_class(self, counts: np.ndarray) -> dict[str, float]:
        """IoU by class, NaN for one that does not occur."""
        return dict(zip(self.stages.vocabulary.classes, iou(counts).tolist(), strict=True))

    def _log_per_class(self, run: Run, method: str, ious: dict[str, float]) -> None:
        run.log_metrics({f"iou_{method}/{name}": value for name, value in ious.items() if value == value})

    def _log_overview(self, run: Run, scores: Scores) -> None:
        """The example's images with what each method says of the points on them."""
        if self.brief:
            return
        index, words, frame = self.stages.index, self.stages.vocabulary, example_frame(self.stages.eval_frames)
        images = readable_images(index, frame)
        if not images:  # none was indexed or all are quarantined: the scores are there all the same
            console().print(f"evaluate: no figure of keyframe {frame.frame_id}, which has no readable image")
            return
        for method in ("truth", *scores.counts):
            draw = functools.partial(frame_figure, index, frame, words, scores.example[method], images)
            self._figure(run, draw, f"figures/images_{method}.png")

    def _protocol(self) -> str:
        return f"{self.job.dataset.train_split}->{self.job.dataset.eval_split};{self.job.finetune.protocol}"

    def _digests(self) -> dict[str, str]:
        digests = {"job": self.job.digest(), "index": self.stages.index.digest}
        if needs_teacher(self.job):
            digests |= {"teacher": self.stages.teacher.digest, "features": self.stages.store_digest}
        return digests


class _History:
    """Hands every epoch's metrics to a run and keeps them for the loss curve."""

    def __init__(self, run: Run, prefix: str):
        self._run, self._prefix = run, prefix
        self.rows: list[Metrics] = []

    def __call__(self, epoch: int, metrics: Metrics) -> None:
        self.rows.append(metrics)
        self._run.log_metrics({f"{self._prefix}{name}": value for name, value in metrics.items()}, step=epoch)


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
