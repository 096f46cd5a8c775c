"""A sweep as MLflow keeps it: ``sweep.json`` of its own run says what was searched, its trials' runs hold the scores.

Nothing else is read, so a sweep can be shown wherever the MLflow server answers, also while its trials still run.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip2scene.tracking.provenance import is_gone
from clip2scene.tracking.records import Record, mean_and_deviation, read_record, search_runs, seconds_of
from clip2scene.tracking.run import client_of, flatten
from clip2scene.tracking.sweep.runs import FINAL, FORMAT, OBJECTIVES, SO_FAR

ENDED = ("finished", "stopped", "diverged")
"""States of trials that no later command goes on with."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial's run."""

    run_id: str
    number: int
    state: str
    """``running``, ``finished``, ``stopped`` (by the scheduler), ``diverged``, ``failed``, ``paused`` (the hours were
    over); or ``interrupted``, when the sweep's driver ended before it."""
    seed: int
    variant: str | None
    values: Mapping[str, Any]
    """Searched parameter to value."""
    finals: Mapping[str, float]
    """What was recorded at its end of ``miou``, ``agreement``, ``consistency``, ``label_free`` (fractions of 1),
    ``epochs`` and ``seconds``."""
    so_far: Mapping[str, float]
    """The latest scores of a trial that has not ended, and their epoch as ``epochs``; empty where there are none."""
    reason: str
    """Why it diverged or failed."""
    seconds: float

    @property
    def configuration(self) -> str:
        """A key that trials share when they differ only in their seed."""
        return json.dumps([self.variant, self.values], sort_keys=True)

    @property
    def epochs(self) -> int | None:
        """How many it ran; None where that was not recorded."""
        return int(self.finals["epochs"]) if "epochs" in self.finals else None

    def score(self, name: str) -> float | None:
        """A final score in percent; None where there is none."""
        return _percent(self.finals, name)

    def latest_score(self, name: str) -> float | None:
        """The score so far, or at the end, in percent."""
        return _percent(self.so_far or self.finals, name)


@dataclass(frozen=True)
class Configuration:
    """Trials that differ only in their seed."""

    trials: tuple[TrialRecord, ...]
    compared: tuple[TrialRecord, ...]
    """The trials that are averaged: those that ran all epochs, or where none did, those that ran the most."""

    @property
    def variant(self) -> str | None:
        """Name of the variant, where there are any."""
        return self.trials[0].variant

    @property
    def values(self) -> Mapping[str, Any]:
        """Searched parameter to value."""
        return self.trials[0].values

    @property
    def epochs(self) -> int | None:
        """Epochs of the trials that are compared."""
        return self.compared[0].epochs if self.compared else None

    def score(self, name: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over seeds, percent."""
        found = [score for trial in self.compared if (score := trial.score(name)) is not None]
        return mean_and_deviation(found)


@dataclass(frozen=True)
class SweepRecord(Record):
    """A sweep; ``about`` has its name, title, metric, parameters, variants, seeds, epochs, job, command, machine."""

    trials: tuple[TrialRecord, ...]
    """In the order of their numbers."""
    metrics: Mapping[str, float]
    """Of the sweep's own run: ``images_encoded``, ``epochs_run``, ...; none before the sweep has ended."""
    selection: str
    """What trials were selected by: ``no labels``, or the labels of which scenes."""

    @property
    def num_left(self) -> int:
        """How many trials the same command would go on with, or begin."""
        return int(self.about["num_trials"]) - sum(trial.state in ENDED for trial in self.trials)

    @property
    def metric(self) -> str:
        """The objective."""
        return str(self.about["metric"])

    @property
    def keys(self) -> tuple[str, ...]:
        """Searched parameters, dotted."""
        return tuple(parameter["key"] for parameter in self.about["parameters"])

    def is_full(self, trial: TrialRecord) -> bool:
        """Whether a trial ran all epochs."""
        return trial.state == "finished" and (trial.epochs or 0) >= self.about["epochs"]

    def order(self, trial: TrialRecord) -> tuple[int, float, int]:
        """A sort key, best first: trials that ran all epochs, then others that finished, other scores, and no score."""
        score = trial.score(self.metric)
        if score is None:
            return 3, 0.0, trial.number
        rank = 0 if self.is_full(trial) else 1 if trial.state == "finished" else 2
        return rank, -score, trial.number

    @functools.cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """All configurations, best first.

        Configurations with more seeds that ran all epochs come before those with fewer, because a mean over the
        surviving seeds is biased. Where no trial ran all epochs, those that ran longest come first.
        """
        groups: dict[str, list[TrialRecord]] = {}
        for trial in self.trials:
            groups.setdefault(trial.configuration, []).append(trial)
        found = [Configuration(tuple(trials), self._compared(trials)) for trials in groups.values()]

        def order(configuration: Configuration) -> tuple[float, ...]:
            mean, _ = configuration.score(self.metric)
            if mean is None:
                return 3, 0, 0, 0.0, configuration.trials[0].number
            rank = min(self.order(trial)[0] for trial in configuration.compared)
            epochs = 0 if rank == 0 else configuration.epochs or 0
            return rank, -epochs, -len(configuration.compared), -mean, configuration.trials[0].number

        return tuple(sorted(found, key=order))

    @property
    def best(self) -> Configuration | None:
        """The configuration with the best mean over its seeds; None where no trial ended with a score."""
        first = next(iter(self.configurations), None)
        return first if first and first.compared else None

    @property
    def best_trial(self) -> TrialRecord | None:
        """The best trial of the best configuration."""
        return min(self.best.compared, key=self.order) if self.best else None

    def curve(self, trial: TrialRecord, name: str) -> dict[int, float]:
        """A metric of a trial by epoch (from 1), as it was logged: a fraction of 1."""
        key = trial.run_id, name
        if key not in self._curves:
            history = client_of(self.uri).get_metric_history(*key)
            self._curves[key] = {point.step: point.value for point in sorted(history, key=lambda point: point.step)}
        return self._curves[key]

    @functools.cached_property
    def _curves(self) -> dict[tuple[str, str], dict[int, float]]:
        """Those that were read: text and figures ask for the same ones again."""
        return {}

    def _compared(self, trials: list[TrialRecord]) -> tuple[TrialRecord, ...]:
        scored = [trial for trial in trials if trial.score(self.metric) is not None]
        if full := [trial for trial in scored if self.is_full(trial)]:
            return tuple(full)
        finished = [trial for trial in scored if trial.state == "finished"] or scored
        most = max((trial.epochs or 0 for trial in finished), default=0)
        return tuple(trial for trial in finished if (trial.epochs or 0) == most)


def read_sweep_run(uri: str, run_id: str) -> SweepRecord:
    """The sweep of one run, also where a later sweep has its name.

    Args:
        uri: an MLflow server.
        run_id: a sweep's own run.

    Raises:
        TrackingError: it was written in another format.
    """
    return _record(uri, client_of(uri).get_run(run_id))


def _record(uri: str, parent: Any) -> SweepRecord:
    record = read_record(uri, parent, "sweep.json", FORMAT)
    below = f"tags.stage = 'trial' and tags.`mlflow.parentRunId` = '{record.run_id}'"
    runs = search_runs(record.uri, [record.experiment_id], below)
    trials = {trial.number: trial for trial in (_trial(record, run) for run in runs)}
    return SweepRecord(
        **vars(record),
        trials=tuple(trials[number] for number in sorted(trials)),
        metrics=dict(parent.data.metrics),
        selection=parent.data.tags["selection"],
    )


def _trial(record: Record, run: Any) -> TrialRecord:
    """The trial that an MLflow run holds."""
    tags, metrics = run.data.tags, run.data.metrics
    final = _below(FINAL, metrics)
    finals = final or _below(SO_FAR, metrics)
    state = tags["state"]
    if state == "running" and (run.info.status != "RUNNING" or is_gone(tags)):
        state = "interrupted"
    return TrialRecord(
        run_id=run.info.run_id,
        number=int(tags["trial"]),
        state=state,
        seed=int(tags["seed"]),
        variant=tags.get("variant"),
        values=_values(record.about["parameters"], run.data.params),
        finals=finals,
        so_far={} if final else _so_far(record.uri, run),
        reason=tags.get("reason", ""),
        seconds=finals.get("seconds", seconds_of(run) or math.nan),
    )


def _so_far(uri: str, run: Any) -> dict[str, float]:
    latest = {name: run.data.metrics[name] for name in OBJECTIVES if name in run.data.metrics}
    if not latest:
        return {}
    history = client_of(uri).get_metric_history(run.info.run_id, next(iter(latest)))
    return latest | {"epochs": max(point.step for point in history)}


def _percent(scores: Mapping[str, float], name: str) -> float | None:
    value = scores.get(name, math.nan)
    return 100 * value if math.isfinite(value) else None


def _below(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _values(parameters: list[dict[str, Any]], params: Mapping[str, str]) -> dict[str, Any]:
    """The searched settings of a trial, as the search space writes them where it lists them."""
    found = {}
    for parameter in parameters:
        key = parameter["key"]
        listed = [value for value in parameter.get("values", ()) if _holds(params, flatten({key: value}))]
        if listed:
            found[key] = max(listed, key=lambda value: len(flatten({key: value})))  # one may be part of another
        elif key in params:
            found[key] = _parsed(params[key])
    return found


def _holds(params: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return all(key in params and _parsed(params[key]) == _parsed(text) for key, text in wanted.items())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
