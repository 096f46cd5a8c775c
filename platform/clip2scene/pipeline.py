"""A job from raw files to scores: its stages in order, and what is logged of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from clip2scene.config import Initialisation, Job
from clip2scene.predictions import predict
from clip2scene.run_log import BriefRunLog, RunLog, comparable
from clip2scene.scores import Counted, annotation_free_scores, finetuned_scores, is_scored_annotation_free
from clip2scene.stages import Stages, Trained
from clip2scene.tracking.run import Run
from clip2scene.tracking.tracker import Tracker
from clip2scene.training.evaluate import Scores
from clip2scene.training.launch import worker_group
from clip2scene.training.metrics import accuracy, mean_iou
from clip2scene.training.samples import num_clouds

_MEASURES = {"miou": mean_iou, "accuracy": accuracy}
"""By the end of a score's name."""


class Pipeline:
    """Runs a job's stages under one run in MLflow; a brief one, of the many of a table, logs all in that run."""

    def __init__(self, job: Job, *, brief: bool = False):
        self.job = job
        self.brief = brief
        self.stages = Stages(job)
        self.scores: Mapping[str, float] = {}
        """Of the last run, named as in MLflow (``miou/student_3d``)."""

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
        job = self.job
        own_tags = {"stage": "pipeline", "dataset": job.dataset.kind, "job_digest": job.digest()}
        with tracker.run(
            name or f"{job.name}-seed{job.seed}",
            parent=parent,
            tags=own_tags | comparable(job, self.stages.prompts_digest) | dict(tags or {}),
            params=job.model_dump(mode="json", by_alias=True),
            system_metrics=False,
        ) as run:
            log = (BriefRunLog if self.brief else RunLog)(tracker, run, self.stages)
            self._run_stages(log)
            log.finish(self._digests())
        self.scores = log.scores
        return log.report

    def _run_stages(self, log: RunLog) -> None:
        job = self.job
        if job.dataset.kind == "streetworld":
            with log.stage("streetworld") as run:
                run.set_tags({"root": str(self.stages.root)})
        self._index(log)
        distils = job.needs_teacher and job.reaches("distill")
        # What is missing is reported before hours of extraction.
        self.stages.check_labels()
        if distils:
            self.stages.check_sweeps()
            self.stages.check_images(scored=job.scores)
        if job.needs_teacher:
            self._extract(log)
        with worker_group(job.resources):
            if distils:
                student = self._distill(log)
                if is_scored_annotation_free(job):
                    self._evaluate(log, student)
                elif job.scores:
                    log.say(f"evaluate: left out, as distill.method={job.distill.method} has no classes yet")
            if job.finetunes:
                self._finetune(log)
            if job.stage == "predict":
                self._predict(log)

    def _index(self, log: RunLog) -> None:
        with log.stage("index") as run:
            indexes = self.stages.indexes.values()
            splits = {"train": self.stages.train_frames, "eval": self.stages.eval_frames}
            for sentence in self.stages.omissions:
                log.say(f"index: {sentence}")
            log.indexed(run)
            run.log_metrics(
                {
                    "frames": sum(len(index.frames) for index in indexes),
                    "left_out": sum(len(index.left_out) for index in indexes),
                }
                | {f"{name}_frames": len(frames) for name, frames in splits.items()}
            )
            for index in indexes:
                run.log_dataset(self.job.dataset.kind, index.digest, str(index.root.path), "index")
            ids = {name: [frame.frame_id for frame in frames] for name, frames in splits.items()}
            run.log_dict(ids, "splits.json")

    def _extract(self, log: RunLog) -> None:
        with log.stage("extract") as run:
            done = self.stages.extract()
            run.set_tags({"teacher": self.stages.teacher.digest, "store": self.stages.store_digest})
            counts = {
                "images_encoded": done.images_encoded,
                "images_cached": done.images_cached,
                "images_broken": len(done.broken),
            }
            run.log_metrics(counts)
            run.log_dict({"broken": [asdict(image) for image in done.broken]}, "broken.json")
            run.log_dataset("features", self.stages.store_digest, str(self.stages.store_path), "features")
        log.report |= counts

    def _distill(self, log: RunLog) -> Trained:
        with log.stage("distill") as run:
            history = log.history(run, "distill")
            self._log_short(log, run)
            student = self.stages.distill(history)
            log.student(run, history, student, "distillation")
            run.log_dataset("features", self.stages.store_digest, str(self.stages.store_path), "training")
        log.report["student_path"] = str(student.path)
        return student

    def _log_short(self, log: RunLog, run: Run) -> None:
        """Log how many keyframes have fewer than K sweeps (at the start of a scene)."""
        wanted, frames = self.job.distill.num_sweeps, self.stages.train_frames
        clouds = [num_clouds(frame, self.job.distill) for frame in frames]
        short = sum(count < wanted for count in clouds)
        run.log_metrics({"keyframes_with_fewer_sweeps": short, "sweeps_mean": sum(clouds) / len(clouds)})
        if short:
            log.say(f"distill: {short} of {len(frames)} keyframes have fewer than {wanted} sweeps")

    def _evaluate(self, log: RunLog, student: Trained) -> None:
        with log.stage("evaluate") as run:
            scores = self.stages.score_annotation_free(student)
            counted = annotation_free_scores(self.job.evaluate.methods)
            values = _values(counted, scores)
            for name, (method, domain) in counted.items():
                if domain == "all":  # not in the figures
                    log.per_class(run, name.removesuffix("_miou"), scores.counts[method][domain])
            log.evaluation(run, scores, values, dict.fromkeys(scores.counts, "seen"))
            log.overview(run, scores)
        log.report |= values

    def _finetune(self, log: RunLog) -> None:
        students: dict[Initialisation, Trained] = {}
        labelled = [frame.frame_id for frame in self.stages.labelled_frames]
        for initialisation in self.job.initialisations:
            name = f"finetune-{initialisation}"
            with log.stage(name, group="finetune") as run:
                history = log.history(run, name)
                students[initialisation] = self.stages.finetune(initialisation, history)
                log.student(run, history, students[initialisation], f"fine-tuning from {initialisation}")
                run.log_dict({"protocol": self.job.finetune.protocol, "labelled": labelled}, "labelled_frames.json")
                run.log_metrics({"labelled_frames": len(labelled)})
        log.report |= {
            "label_fraction": len(labelled) / len(self.stages.train_frames),
            "labelled_frames": len(labelled),
        }
        if self.job.scores:
            self._evaluate_finetuned(log, students)

    def _evaluate_finetuned(self, log: RunLog, students: Mapping[Initialisation, Trained]) -> None:
        with log.stage("evaluate-finetuned", group="evaluate") as run:
            scores = self.stages.score_finetuned(students)
            values = _values(finetuned_scores(students), scores)
            log.evaluation(run, scores, values, dict.fromkeys(students, "all"), prefix="finetuned_")
        log.report |= {
            "finetuned_miou": {name: values[f"finetuned_{name}_miou"] for name in students},
            "majority_miou": values["majority_miou"],
        }

    def _predict(self, log: RunLog) -> None:
        with log.stage("predict") as run:
            done = predict(self.stages)
            where = self.stages.storage.where(done.folder)
            run.set_tags({"predictions": where, "cached": str(done.cached).lower()})
            run.log_metrics(
                {"predicted_frames": done.manifest["frames"]}
                | {f"predicted_points/{name}": count for name, count in done.manifest["points"].items()}
            )
            run.log_dict(done.manifest, "predictions.json")
        log.report |= {"predictions": where, "predicted_frames": done.manifest["frames"]}

    def _digests(self) -> dict[str, str]:
        index = next(iter(self.stages.indexes.values()))  # where something is trained, that of the training split
        digests = {"job": self.job.digest(), "index": index.digest}
        if self.job.needs_teacher:
            digests |= {"teacher": self.stages.teacher.digest, "features": self.stages.store_digest}
        return digests


def _values(counted: Mapping[str, Counted], scores: Scores) -> dict[str, float]:
    return {
        name: _MEASURES[name.rpartition("_")[2]](scores.counts[method][domain])
        for name, (method, domain) in counted.items()
    }
