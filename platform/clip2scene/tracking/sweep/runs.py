"""A sweep's runs in MLflow while it runs: its own, and below it one per trial; a resumed sweep continues them.

Only the driver writes them, from Ray Tune's callbacks: a trial's process needs no MLflow, and no run has two writers.
What a run already holds is read once, when it is continued.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import get_args

from clip2scene.config import Job, Score
from clip2scene.tracking.records import parent_run
from clip2scene.tracking.run import Run, params_of
from clip2scene.tracking.tracker import Tracker

FORMAT = "clip2scene-sweep-1"
OBJECTIVES: tuple[str, ...] = get_args(Score)
_TRAIN = "train/"
FINAL, SO_FAR = "final/", "so_far/"
"""Prefixes of the metrics at a trial's end, and where a later command continues it."""
_WILL_CONTINUE = ("failed", "paused")


def sweep_run(tracker: Tracker, name: str, sweep_id: str, tags: Mapping[str, str]) -> AbstractContextManager[Run]:
    """The parent run of a sweep; see :func:`parent_run`."""
    return parent_run(tracker, name, _identity(name, sweep_id), tags)


def is_known(tracker: Tracker, name: str, sweep_id: str) -> bool:
    """Whether the server has the sweep's run."""
    return tracker.find_run(_identity(name, sweep_id)) is not None


def is_complete(tracker: Tracker, run: Run) -> bool:
    """Whether a sweep's run says that no trial is left to run."""
    with tracker.reachable("look into the sweep's run") as client:
        return client.get_run(run.run_id).data.metrics.get("trials_left") == 0


class TrialRun:
    """One trial's run: opened or continued when the trial starts, closed when it ends."""

    def __init__(self, tracker: Tracker, parent: Run, sweep: str, number: int, job: Job, variant: str | None):
        identity = {"mlflow.parentRunId": parent.run_id, "stage": "trial", "sweep": sweep, "trial": str(number)}
        known = tracker.find_run(identity)
        self.epoch = 0
        """The last epoch that is kept."""
        self._has_ended, self._has_reason = self._continued(tracker, known) if known else (False, False)
        tags = {**identity, "seed": str(job.seed), "state": "running"} | ({"variant": variant} if variant else {})
        self._tracker = tracker
        self.run = tracker.open_run(f"trial {number:02d}", parent, known, tags)
        self.run.log_params(params_of(job, "distill"))

    def _continued(self, tracker: Tracker, run_id: str) -> tuple[bool, bool]:
        """Whether an earlier attempt kept metrics of an end, and a reason.

        The metrics tell, not the state: a driver that is killed as a trial ends may have kept one without the other.
        """
        with tracker.reachable("read what a trial's run holds") as client:
            history = client.get_metric_history(run_id, f"{_TRAIN}loss")
            self.epoch = max((metric.step for metric in history), default=0)
            data = client.get_run(run_id).data
        return any(name.startswith(FINAL) for name in data.metrics), bool(data.tags.get("reason"))

    def log_epoch(self, epoch: int, scores: Mapping[str, float], metrics: Mapping[str, float]) -> None:
        """Keep an epoch, once: a trial that continues from a checkpoint reports its first epochs again.

        Args:
            epoch: from 1.
            scores: those of :data:`OBJECTIVES` that the epoch has.
            metrics: of the training.
        """
        if epoch <= self.epoch:
            return
        self.run.log_metrics({**scores, **{_TRAIN + name: value for name, value in metrics.items()}}, step=epoch)
        self.epoch = epoch

    def end(self, state: str, finals: Mapping[str, float], reason: str = "") -> None:
        """Close the run.

        Args:
            state: ``finished``, ``stopped`` (by the scheduler), ``diverged``, ``failed`` or ``paused`` (as the sweep's
                hours were over).
            finals: scores, ``epochs`` and ``seconds`` at the end; kept once, except for those of a failure or a pause.
            reason: a sentence, where it did not end well.
        """
        if state in _WILL_CONTINUE or not self._has_ended:
            prefix = SO_FAR if state in _WILL_CONTINUE else FINAL
            self.run.log_metrics({prefix + name: value for name, value in finals.items()})
        # Also replaces the reason of an earlier attempt.
        self.run.set_tags({"state": state} | ({"reason": reason[:500]} if reason or self._has_reason else {}))
        if state == "failed":
            self._tracker.close_run(self.run, "FAILED", f"RuntimeError: {reason}")
        elif state == "paused":
            self.abandon()
        else:
            self._tracker.close_run(self.run)

    def abandon(self) -> None:
        """Close the run of a trial that will be continued later."""
        self._tracker.close_run(self.run, "KILLED")


def _identity(name: str, sweep_id: str) -> dict[str, str]:
    return {"stage": "sweep", "sweep": name, "sweep_id": sweep_id}
