"""What a pipeline keeps of its stages in MLflow: a run per stage with scores and figures, and the report at the end."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from clip2scene.config import Job
from clip2scene.progress import say
from clip2scene.scores import grouped, iou_name
from clip2scene.stages import Stages, Trained
from clip2scene.tracking.figures import charts, labels
from clip2scene.tracking.figures.keyframe import frame_figure, readable_images
from clip2scene.tracking.run import Run, params_of
from clip2scene.tracking.tracker import Tracker
from clip2scene.training.evaluate import Scores, example_frame
from clip2scene.training.fit import Metrics
from clip2scene.training.metrics import iou

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunLog:
    """Logs a job's stages as child runs of its run, with figures, and collects the report."""

    def __init__(self, tracker: Tracker, run: Run, stages: Stages):
        job = stages.job
        self._tracker, self._stages = tracker, stages
        self.run = run
        self.seconds: dict[str, float] = {}
        self.report: dict[str, Any] = {"name": job.name, "stage": job.stage, "seed": job.seed, "run_id": run.run_id}
        self._tags = comparable(stages.job, stages.prompts_digest)
        self.report |= self._tags
        self.scores: dict[str, float] = {}
        """The last ones, named as in MLflow (``miou/student_3d``)."""

    @contextmanager
    def stage(self, name: str, group: str | None = None) -> Iterator[Run]:
        """The run of a stage, for the length of a block; ``group`` is what stages of one kind have in common."""
        tags = {"stage": group or name, **self._tags}
        params = params_of(self._stages.job, group or name)
        with self._tracker.run(name, parent=self.run, tags=tags, params=params) as run:
            started = time.perf_counter()
            yield run
            seconds = self._took(group or name, started)
            run.log_metrics({"seconds": seconds})
        self.say(f"{name}: {seconds:.1f} s")

    def indexed(self, run: Run) -> None:
        """Say in the tags of the runs that follow what the index tells: parts of splits are missing or trained on."""
        stages = self._stages
        self._tags = comparable(stages.job, stages.prompts_digest, stages.missing, stages.trained_on)
        self.report |= self._tags
        for one in dict.fromkeys((run, self.run)):
            one.set_tags(self._tags)

    def _took(self, group: str, started: float) -> float:
        seconds = time.perf_counter() - started
        self.seconds[group] = self.seconds.get(group, 0.0) + seconds
        return seconds

    def say(self, sentence: str) -> None:
        """Print what the user of a single job wants to know."""
        say(sentence)

    def history(self, run: Run, stage: str) -> History:
        """A callback that logs the metrics of each epoch of a training."""
        return History(run, "")

    def student(self, run: Run, history: History, student: Trained, title: str) -> None:
        """Log what came out of a training."""
        run.set_tags({"student": student.digest, "cached": str(student.cached).lower()})
        self._artifact(run, student.path, "student")
        if history.rows:
            self._figure(run, lambda: charts.loss_curves(history.rows, title), "figures/losses.png")

    def _artifact(self, run: Run, path: Path, folder: str) -> None:
        run.log_artifact(path, folder)

    def _figure(self, run: Run, make: Callable[[], Figure], path: str) -> None:
        run.log_figure(make(), path)

    def evaluation(
        self, run: Run, scores: Scores, values: Mapping[str, float], domains: Mapping[str, str], prefix: str = ""
    ) -> None:
        """Log scores, scores per class and figures.

        Args:
            run: of the stage; the job's run gets the scores too.
            scores: what was counted.
            values: scores by name (``student_3d_miou``).
            domains: methods to show, and the points on which each is scored.
            prefix: of the methods' names.
        """
        named = {grouped(name): value for name, value in values.items()}
        self.scores |= named
        for one in dict.fromkeys((run, self.run)):
            one.log_metrics(named)
        words, example = self._stages.vocabulary, scores.example
        counts = {method: scores.counts[method][domain] for method, domain in domains.items()}
        per_class = {name: self.per_class(run, f"{prefix}{name}", counts_CC) for name, counts_CC in counts.items()}
        self.report.setdefault("per_class", {}).update(per_class)
        panels = {method: example[method] for method in domains}
        predicted = {f"{prefix}{method}": labels_N for method, labels_N in panels.items()}
        self._keep_example({"points": example["points"], "truth": example["truth"], **predicted})
        self._figure(run, lambda: charts.class_bars(per_class, "IoU per class"), "figures/classes.png")
        for method, counts_CC in counts.items():
            draw = functools.partial(charts.confusion_matrix, counts_CC, words, method)
            self._figure(run, draw, f"figures/confusion_{method}.png")
        self._figure(
            run,
            lambda: labels.birds_eye(example["points"], panels, example["truth"], words),
            "figures/birds_eye.png",
        )

    def per_class(self, run: Run, method: str, counts_CC: np.ndarray) -> dict[str, float]:
        """Log and return the IoU by class, NaN (which is not logged) for a class that does not occur."""
        ious = dict(zip(self._stages.vocabulary.classes, iou(counts_CC).tolist(), strict=True))
        named = {iou_name(method, name): value for name, value in ious.items() if not math.isnan(value)}
        self.scores |= named
        run.log_metrics(named)
        return ious

    def _keep_example(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Do nothing: the figures show them."""

    def overview(self, run: Run, scores: Scores) -> None:
        """Draw the example's images with the labels of each method on them."""
        stages, words = self._stages, self._stages.vocabulary
        frame = example_frame(stages.eval_frames)
        images = readable_images(stages.index, frame)
        if not images:  # none was indexed or all are quarantined; there are scores all the same
            self.say(f"evaluate: no figure of keyframe {frame.frame_id}, which has no readable image")
            return
        for method in ("truth", *scores.counts):
            draw = functools.partial(frame_figure, stages.index, frame, words, scores.example[method], images)
            self._figure(run, draw, f"figures/images_{method}.png")

    def finish(self, digests: Mapping[str, str]) -> None:
        """Log the seconds of each stage and the report."""
        self.report["seconds"] = {stage: round(seconds, 2) for stage, seconds in self.seconds.items()}
        self.report["digests"] = dict(digests)
        self.run.log_metrics({f"seconds/{stage}": seconds for stage, seconds in self.seconds.items()})
        self.run.log_dict(_json_able(self.report), "report.json")
        self._keep()

    def _keep(self) -> None:
        storage = self._stages.storage
        storage.write_json(storage.root / "report.json", _json_able(self.report))


class BriefRunLog(RunLog):
    """Logs everything in the job's own run, for one job of many; no figures, only the numbers in the example's.

    ``example.npz`` has ``points``, ``truth`` and an array of labels per method.
    """

    def __init__(self, tracker: Tracker, run: Run, stages: Stages):
        super().__init__(tracker, run, stages)
        self._example: dict[str, np.ndarray] = {}

    @contextmanager
    def stage(self, name: str, group: str | None = None) -> Iterator[Run]:
        """The job's own run."""
        started = time.perf_counter()
        yield self.run
        self._took(group or name, started)

    def say(self, sentence: str) -> None:
        """Print nothing."""

    def history(self, run: Run, stage: str) -> History:
        """A callback that puts the stage's name before those of the metrics."""
        return History(run, f"{stage}/")

    def _artifact(self, run: Run, path: Path, folder: str) -> None: ...

    def _figure(self, run: Run, make: Callable[[], Figure], path: str) -> None: ...

    def _keep_example(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._example |= arrays

    def overview(self, run: Run, scores: Scores) -> None:
        """Draw nothing."""

    def _keep(self) -> None:
        if self._example:
            with tempfile.TemporaryDirectory() as folder:
                np.savez_compressed(Path(folder) / "example.npz", **self._example)
                self.run.log_artifact(Path(folder) / "example.npz")


class History:
    """Logs the metrics of each epoch in a run and keeps them for the loss curve."""

    def __init__(self, run: Run, prefix: str):
        self._run, self._prefix = run, prefix
        self.rows: list[Metrics] = []

    def __call__(self, epoch: int, metrics: Metrics) -> None:
        """Take the metrics of one epoch."""
        self.rows.append(metrics)
        self._run.log_metrics({f"{self._prefix}{name}": value for name, value in metrics.items()}, step=epoch)


def comparable(
    job: Job,
    prompts_digest: str,
    missing: Mapping[str, str] = MappingProxyType({}),
    trained_on: str | None = None,
) -> dict[str, str]:
    """Tags in which runs must agree for their scores to be comparable.

    Args:
        job: with the splits and the protocol.
        prompts_digest: of class names and templates.
        missing: splits that are on disk only in part, and how much of each is.
        trained_on: how many of the keyframes to score on are trained on too.
    """
    train, held_out = (
        f"{name} ({missing[name]})" if name in missing else name
        for name in (job.dataset.train_split, job.dataset.eval_split)
    )
    trained = f" ({trained_on} trained on)" if trained_on else ""
    return {"protocol": f"{train}->{held_out}{trained};{job.finetune.protocol}", "vocabulary": prompts_digest}


def _json_able(value: Any) -> Any:
    """NaN (a class that does not occur) as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _json_able(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
