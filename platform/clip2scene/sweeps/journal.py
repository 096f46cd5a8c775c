"""What Ray Tune reports of its trials to the driver, kept in MLflow and shown to the user."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune

from clip2scene.config import Job
from clip2scene.errors import last_line
from clip2scene.sweeps.progress import SweepProgress
from clip2scene.sweeps.sweep import Sweep
from clip2scene.sweeps.trial import trial_from_config
from clip2scene.tracking.run import Run
from clip2scene.tracking.sweep.runs import OBJECTIVES, TrialRun
from clip2scene.tracking.tracker import Tracker
from clip2scene.training.validation import SCORE_PREFIX


class HoursOverError(Exception):
    """The sweep has used up its ``budget.hours``.

    Raised in a callback, it makes Tune stop its processes but keep the trials as unfinished, as an interruption does.
    Tune's own limits would end the trials for good.
    """


class Journal:
    """Records a sweep's trials, in the driver, as they start, report and end; ``on_ended`` is called after each end."""

    def __init__(
        self, sweep: Sweep, tracker: Tracker, parent: Run, progress: SweepProgress, on_ended: Callable[[], None]
    ):
        self._sweep, self._tracker, self._parent, self._progress = sweep, tracker, parent, progress
        self._on_ended = on_ended
        hours = sweep.space.budget.hours
        self._until_s = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.num_before = 0
        """How many trials belong to earlier experiments of the sweep."""
        self._runs: dict[int, TrialRun] = {}
        self._results: dict[int, dict[str, Any]] = {}
        self._epochs: dict[int, int] = {}

    def check_hours(self) -> None:
        """Raise :class:`HoursOverError` if so."""
        if time.monotonic() > self._until_s:
            raise HoursOverError

    def started(self, number: int, config: dict[str, Any], num_ended: int) -> None:
        """A trial starts, or starts again after a failure; ``num_ended`` also counts those of earlier drivers."""
        trial = trial_from_config(self._sweep, config)
        job: Job = self._sweep.job_of(trial, f"trial {number}")
        if number not in self._runs:
            name = self._sweep.space.sweep
            self._runs[number] = TrialRun(self._tracker, self._parent, name, number, job, trial.variant)
        shown = dict(trial.values) | ({"variant": trial.variant} if trial.variant else {})
        shown |= {"seed": trial.seed} if len(self._sweep.seeds) > 1 else {}
        self._progress.started(number, shown, self._runs[number].epoch, self.num_before + num_ended)

    def reported(self, number: int, result: dict[str, Any]) -> None:
        """A trial reports an epoch, or that it diverged."""
        self._results[number] = result
        if "diverged" not in result:
            self._epochs[number] = result["epoch"]
            metrics = {name: value for name, value in result["metrics"].items() if not name.startswith(SCORE_PREFIX)}
            self._runs[number].log_epoch(result["epoch"], _scores(result), metrics)
            self._progress.reported(number, result["epoch"], result["objective"])

    def ended(self, number: int, failure: str | None = None, *, will_continue: bool = False) -> None:
        """A trial has ended, for any reason; ``failure`` is the text of its last error, if that was why."""
        result = self._results.get(number, {})
        finals = {"epochs": self._epochs.get(number, 0), "seconds": float(result.get("time_total_s", math.nan))}
        if failure is not None:
            state, reason = "failed", last_line(failure)
        elif "diverged" in result:
            state, reason = "diverged", result["diverged"]
        else:
            early = "paused" if will_continue else "stopped"
            state, reason = "finished" if finals["epochs"] == self._sweep.epochs else early, ""
            finals |= _scores(result)
        self._progress.ended(number, state, reason)
        self._runs.pop(number).end(state, finals, reason)
        self._on_ended()

    def failed(self, number: int, config: dict[str, Any], failure: str, num_ended: int) -> None:
        """A trial has failed, perhaps before its process could start."""
        if number not in self._runs:
            self.started(number, config, num_ended)
        self.ended(number, failure)

    def pause(self) -> None:
        """The hours are over before the trials that still run."""
        for number in list(self._runs):
            self.ended(number, will_continue=True)

    def abandon(self) -> None:
        """The driver ends before its trials do."""
        while self._runs:
            self._runs.popitem()[1].abandon()


_current: list[Journal] = []
"""The journal of the sweep that runs in this process. Tune pickles callbacks and uses the pickled ones when it restores
an experiment, so a callback cannot hold the address of a tracking server itself."""


class JournalCallback(tune.Callback):
    """Passes Ray Tune's events on to this process's journal."""

    def __init__(self, journal: Journal | None = None):
        if journal is not None:
            _current[:] = [journal]

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Every now and then."""
        _current[0].check_hours()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or starts again after a failure."""
        _current[0].started(_number(trial), trial.config, _num_ended(trials))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reports."""
        _current[0].reported(_number(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended by itself, or the scheduler has stopped it."""
        _current[0].ended(_number(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed and is not tried again."""
        # Tune's own methods read the error from the storage, to which it is uploaded only after this.
        failure = Path(trial.error_file).read_text(encoding="utf-8")
        _current[0].failed(_number(trial), trial.config, failure, _num_ended(trials))


def _num_ended(trials: list[Any]) -> int:
    return sum(trial.is_finished() for trial in trials)


def _number(trial: Any) -> int:
    """A trial's number in the sweep. Tune's own order of trials changes when they are restored."""
    if "trial" in trial.config:
        return int(trial.config["trial"])
    return int(trial.experiment_tag.partition("_")[0]) - 1  # the searcher's count, from 1


def _scores(result: dict[str, Any]) -> dict[str, float]:
    """The objectives among the metrics of a report; none before the first."""
    metrics = result.get("metrics", {})
    return {name: metrics[SCORE_PREFIX + name] for name in OBJECTIVES if SCORE_PREFIX + name in metrics}
