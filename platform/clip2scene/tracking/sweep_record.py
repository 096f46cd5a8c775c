"""A sweep as MLflow keeps it: the parent run's ``sweep.json`` says what was searched, its trials' runs hold the scores.

Nothing else is read, so a sweep can be shown wherever the tracking server answers, also while its trials still run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.tracking.records import find_known, search_runs
from clip2scene.tracking.server import TrackingError
from clip2scene.tracking.sweep_runs import FORMAT
from clip2scene.tracking.sweep_trials import Configuration, TrialRecord, trial_of
from clip2scene.tracking.tracker import Run, Tracker, client_of

_FULL_TRIALS = 4
"""So many that ran all epochs are enough to rank by them alone."""
_RANKED_TRIALS = 3


@dataclass(frozen=True)
class Ranking:
    """How alike two scores order the trials."""

    spearman: float
    """Rank correlation, -1 to 1."""
    trials: tuple[TrialRecord, ...]
    """Those that were ranked."""
    full: bool
    """Whether all of them ran all epochs; else each is taken at its own last."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep and where it was found."""

    about: Mapping[str, Any]
    """``sweep.json``: name, title, metric, parameters, variants, seeds, epochs, job, command, machine."""
    trials: tuple[TrialRecord, ...]
    """By number."""
    metrics: Mapping[str, float]
    """Of the sweep's own run: ``images_encoded``, ``epochs_run``, ...; none before the sweep has ended."""
    selection: str
    """What trials were selected by: ``no labels``, or the labels of which scenes."""
    uri: str
    experiment_id: str
    run_id: str
    git_revision: str
    started_ms: int

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
        """Sorts trials: those that ran all epochs, then others that ended with a score, then the rest; best first."""
        score = trial.score(self.metric)
        if score is None:
            return 3, 0.0, trial.number
        rank = 0 if self.is_full(trial) else 1 if trial.state == "finished" else 2
        return rank, -score, trial.number

    @property
    def configurations(self) -> tuple[Configuration, ...]:
        """Best first.

        Configurations with more seeds that ran all epochs come before those with fewer, as a mean over seeds that
        survived only is no mean. Without any such trial, those that ran longest come first.
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
        """The best seed of the best configuration."""
        return min(self.best.compared, key=self.order) if self.best else None

    def ranking(self, name: str = "label_free") -> Ranking | None:
        """How a score that reads no label ranks the trials, against mIoU.

        Over the trials that ran all epochs where there are at least four of them, else over all that have both scores,
        each at its own last epoch. None below three trials, and where all have the same score.
        """
        both = [t for t in self.trials if t.score(name) is not None and t.score("miou") is not None]
        full = [trial for trial in both if self.is_full(trial)]
        chosen = full if len(full) >= _FULL_TRIALS else both
        scores = [[trial.finals[key] for trial in chosen] for key in (name, "miou")]
        if len(chosen) < _RANKED_TRIALS or any(len(set(values)) == 1 for values in scores):
            return None
        from scipy.stats import spearmanr

        return Ranking(float(spearmanr(*scores).statistic), tuple(chosen), len(chosen) == len(full))

    def curve(self, trial: TrialRecord, name: str) -> dict[int, float]:
        """A metric of a trial as it was logged, by epoch (from 1); fractions of 1."""
        history = client_of(self.uri).get_metric_history(trial.run_id, name)
        return {point.step: point.value for point in sorted(history, key=lambda point: point.step)}

    def url(self, run_id: str, pages_at: str | None = None) -> str:
        """A run's page in MLflow, of the server at ``pages_at`` or of the one that was read."""
        uri = pages_at or self.uri
        return Tracker(uri, self.experiment_id).url(Run(uri, run_id))

    def _compared(self, trials: list[TrialRecord]) -> tuple[TrialRecord, ...]:
        scored = [trial for trial in trials if trial.score(self.metric) is not None]
        if full := [trial for trial in scored if self.is_full(trial)]:
            return tuple(full)
        finished = [trial for trial in scored if trial.state == "finished"] or scored
        most = max((trial.epochs or 0 for trial in finished), default=0)
        return tuple(trial for trial in finished if (trial.epochs or 0) == most)


def read_sweep(uri: str, name: str) -> SweepRecord:
    """The latest sweep of that name, from MLflow alone.

    Args:
        uri: An MLflow server.
        name: A sweep.

    Raises:
        ConfigError: there is no such sweep; the sentence lists those that there are.
        TrackingError: it was written in another format.
    """
    return read_sweep_run(uri, find_known(uri, "sweep", name).info.run_id)


def read_sweep_run(uri: str, run_id: str) -> SweepRecord:
    """The sweep whose own run has that id, from MLflow alone.

    Raises:
        TrackingError: it was written in another format.
    """
    uri = uri.rstrip("/")
    parent = client_of(uri).get_run(run_id)
    about = _about(uri, run_id)
    trials = {}
    below = f"tags.stage = 'trial' and tags.`mlflow.parentRunId` = '{run_id}'"
    for run in search_runs(uri, [parent.info.experiment_id], below):
        trial = trial_of(run, about["parameters"])
        trials[trial.number] = trial
    return SweepRecord(
        about=about,
        trials=tuple(trials[number] for number in sorted(trials)),
        metrics=dict(parent.data.metrics),
        selection=parent.data.tags["selection"],
        uri=uri,
        experiment_id=parent.info.experiment_id,
        run_id=parent.info.run_id,
        git_revision=parent.data.tags.get("git_revision", "unknown"),
        started_ms=parent.info.start_time,
    )


def _about(uri: str, run_id: str) -> dict[str, Any]:
    client, about = client_of(uri), {}  # type: Any, dict[str, Any]
    if "sweep.json" in {item.path for item in client.list_artifacts(run_id)}:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(client.download_artifacts(run_id, "sweep.json", folder))
            about = json.loads(path.read_text(encoding="utf-8"))
    if about.get("format") != FORMAT:
        raise TrackingError(f"run {run_id}: its sweep.json is not in the format {FORMAT}")
    return about
