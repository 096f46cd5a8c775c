"""A sweep's progress: a live table of its trials on a terminal, one line per event everywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip2scene.progress import console, duration, say
from clip2scene.tracking.text import new_table

if TYPE_CHECKING:
    from rich.table import Table

_ROWS = 30
"""How many trials the table shows: the running ones, then the latest."""


@dataclass
class TrialProgress:
    """How far a trial has come."""

    values: Mapping[str, Any]
    state: str = "running"
    epoch: int = 0
    score: float = math.nan


class SweepProgress:
    """Shows how far a sweep has come; the driver calls it as trials start, report and end."""

    def __init__(self, name: str, metric: str, num_trials: int, epochs: int):
        self._name, self._metric, self._num_trials, self._epochs = name, metric, num_trials, epochs
        self._trials: dict[int, TrialProgress] = {}
        self._started_s = time.monotonic()
        self._epochs_seen = self._ended_before = 0
        self._live: Any = None

    def __enter__(self) -> SweepProgress:
        if console().is_interactive and sys.stderr.isatty():
            from rich.live import Live

            self._live = Live(console=console(), get_renderable=self._table, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def started(self, number: int, values: Mapping[str, Any], epoch: int, num_ended: int) -> None:
        """A trial starts or goes on after ``epoch``; ``num_ended`` counts trials of earlier attempts too."""
        self._trials[number] = TrialProgress(values, epoch=epoch)
        self._ended_before = max(self._ended_before, num_ended - self._num_ended())
        self._say(number, f"starts: {_settings(values)}")

    def reported(self, number: int, epoch: int, score: float) -> None:
        """A trial has finished an epoch, perhaps one that it had reported before a restart."""
        trial = self._trials[number]
        trial.score = score
        if epoch <= trial.epoch:
            return
        self._epochs_seen += epoch - trial.epoch
        trial.epoch = epoch
        self._say(number, f"epoch {epoch}/{self._epochs}, {self._metric} {100 * score:.1f}, {self._left()}")

    def ended(self, number: int, state: str, reason: str = "") -> None:
        """A trial has ended."""
        trial = self._trials[number]
        trial.state = state
        scored = f", {self._metric} {100 * trial.score:.1f}" if math.isfinite(trial.score) else ""
        self._say(number, f"{state} after epoch {trial.epoch}{scored}{f': {reason}' if reason else ''}")

    def _say(self, number: int, words: str) -> None:
        if self._live is None:
            say(f"{self._name}: trial {number:02d}: {words}")

    def _left(self) -> str:
        """Upper bound of the time left; which trials the scheduler will stop is not known."""
        running = [trial.epoch for trial in list(self._trials.values()) if trial.state == "running"]
        left = (self._num_trials - self._ended_before - self._num_ended()) * self._epochs - sum(running)
        elapsed_s = time.monotonic() - self._started_s
        if not self._epochs_seen:
            return "time left not known yet"
        return f"at most {duration(left * elapsed_s / self._epochs_seen)} left"

    def _num_ended(self) -> int:
        """How many trials this driver saw end."""
        return sum(trial.state != "running" for trial in list(self._trials.values()))

    def _table(self) -> Table:
        done = self._ended_before + self._num_ended()
        table = new_table(f"{self._name}: {done}/{self._num_trials} trials ended, {self._left()}")
        for heading in ("trial", "settings", "epoch", f"{self._metric}, %", "state"):
            table.add_column(heading, justify="right" if heading in ("epoch", f"{self._metric}, %") else "left")
        trials = dict(self._trials)  # rich draws in its own thread, while the driver adds trials
        running = [number for number, trial in trials.items() if trial.state == "running"]
        others = [number for number in trials if number not in running]
        for number in sorted((running + others[::-1])[:_ROWS]):
            trial = trials[number]
            score = f"{100 * trial.score:.1f}" if math.isfinite(trial.score) else "–"
            style = "bold" if trial.state == "running" else ""
            cells = (f"{number:02d}", _settings(trial.values), f"{trial.epoch}/{self._epochs}", score, trial.state)
            table.add_row(*cells, style=style)
        return table


def _settings(values: Mapping[str, Any]) -> str:
    """Settings such as ``tau 0.31, lambda 2.0``, with the last part of each key."""
    parts = [
        f"{key.rpartition('.')[2]} {f'{value:.3g}' if isinstance(value, float) else value}"
        for key, value in values.items()
    ]
    return ", ".join(parts) or "as in the job"
