"""Trials of a sweep as MLflow keeps them: one run each, and what belongs together because only its seed differs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clip2scene.tracking.sweep_runs import FAILED, FINAL
from clip2scene.tracking.table_record import mean_and_deviation
from clip2scene.tracking.tracker import flatten


@dataclass(frozen=True)
class TrialRecord:
    """One trial's run."""

    run_id: str
    number: int
    state: str
    """``running``, ``finished``, ``stopped`` (by the scheduler), ``diverged``, ``failed``; or ``interrupted``, when it
    was running as the sweep was ended."""
    seed: int
    variant: str | None
    values: Mapping[str, Any]
    """Searched parameter to value."""
    finals: Mapping[str, float]
    """``miou``, ``agreement``, ``consistency`` and ``label_free`` (fractions of 1), ``epochs``, ``seconds``; those that
    were kept when it ended."""
    reason: str
    """Why it diverged or failed."""
    seconds: float

    @property
    def configuration(self) -> str:
        """The same for trials that differ in their seed only."""
        return json.dumps([self.variant, self.values], sort_keys=True)

    @property
    def epochs(self) -> int | None:
        """How many it ran; None where that was not kept."""
        return int(self.finals["epochs"]) if "epochs" in self.finals else None

    def score(self, name: str) -> float | None:
        """A final score in percent; None where there is none."""
        value = self.finals.get(name, math.nan)
        return 100 * value if math.isfinite(value) else None


@dataclass(frozen=True)
class Configuration:
    """Trials that differ in their seed only."""

    trials: tuple[TrialRecord, ...]
    compared: tuple[TrialRecord, ...]
    """Those whose scores are averaged: the ones that ran all epochs; where none did, those that ran the most."""

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
        """Of the trials that are compared."""
        return self.compared[0].epochs if self.compared else None

    def score(self, name: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over seeds, percent."""
        found = [score for trial in self.compared if (score := trial.score(name)) is not None]
        return mean_and_deviation(found)


def trial_of(run: Any, parameters: list[dict[str, Any]]) -> TrialRecord:
    """The trial that a run of MLflow's holds.

    Args:
        run: mlflow's run, with its data.
        parameters: of the sweep's ``sweep.json``.
    """
    tags, metrics = run.data.tags, run.data.metrics
    finals = _below(FINAL, metrics) or _below(FAILED, metrics)
    state = tags["state"]
    if state == "running" and run.info.status != "RUNNING":
        state = "interrupted"
    ran_s = ((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000
    return TrialRecord(
        run_id=run.info.run_id,
        number=int(tags["trial"]),
        state=state,
        seed=int(tags["seed"]),
        variant=tags.get("variant"),
        values=_values(parameters, run.data.params),
        finals=finals,
        reason=tags.get("reason", ""),
        seconds=finals.get("seconds", ran_s),
    )


def _below(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def _values(parameters: list[dict[str, Any]], params: Mapping[str, str]) -> dict[str, Any]:
    """The searched settings of a trial; as the search space writes them, where it lists them."""
    found = {}
    for parameter in parameters:
        key = parameter["key"]
        listed = [value for value in parameter.get("values", ()) if _holds(params, flatten({key: value}))]
        if listed:
            found[key] = max(listed, key=lambda value: len(flatten({key: value})))  # one may be a part of another
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
