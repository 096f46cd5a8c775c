"""A sweep's trials compared after the same number of epochs, and how scores that read no label rank them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from clip2scene.tracking.sweep.record import SweepRecord, TrialRecord

_FULL_TRIALS = 4
"""This many trials that ran all epochs are enough to compare them alone."""
_RANKED_TRIALS = 3


@dataclass(frozen=True)
class Comparison:
    """Scores of trials at the same epoch."""

    trials: tuple[TrialRecord, ...]
    scores: Mapping[str, tuple[float, ...]]
    """By name, of these trials in their order, percent."""
    epoch: int
    full: bool
    """Whether that is the last epoch of a trial that is not stopped."""

    @property
    def which(self) -> str:
        """What the trials have in common, after their number."""
        return "that ran all epochs" if self.full else f"at epoch {self.epoch}, the last that all of them have"


@dataclass(frozen=True)
class Ranking:
    """How similarly two scores order trials."""

    spearman: float
    """Rank correlation, -1 to 1."""
    compared: Comparison


def compare(record: SweepRecord, *names: str) -> Comparison:
    """The trials that ended with all these scores: those that ran all epochs where there are at least four of them.

    Where there are fewer, all are compared at the last epoch at which each of them was scored: scores of different
    epochs would tell how long a trial ran. No trials where there is no such epoch.
    """
    scored = tuple(trial for trial in record.trials if all(trial.score(name) is not None for name in names))
    full = tuple(trial for trial in scored if record.is_full(trial))
    if len(full) >= _FULL_TRIALS:
        finals = {name: tuple(100 * trial.finals[name] for trial in full) for name in names}
        return Comparison(full, finals, record.about["epochs"], full=True)
    curves = {name: [_scored(record.curve(trial, name)) for trial in scored] for name in names}
    epochs = [set(curve) for of_name in curves.values() for curve in of_name]
    epoch = max(set.intersection(*epochs), default=0) if epochs else 0
    if not epoch:
        return Comparison((), dict.fromkeys(names, ()), 0, full=False)
    scores = {name: tuple(100 * curve[epoch] for curve in of_name) for name, of_name in curves.items()}
    return Comparison(scored, scores, epoch, full=epoch == record.about["epochs"])


def ranking(record: SweepRecord, name: str = "label_free") -> Ranking | None:
    """How a score that reads no label ranks the trials, against mIoU.

    None for fewer than three trials to :func:`compare`, and where all have the same score.
    """
    compared = compare(record, name, "miou")
    scores = (compared.scores[name], compared.scores["miou"])
    if len(compared.trials) < _RANKED_TRIALS or any(len(set(values)) == 1 for values in scores):
        return None
    from scipy.stats import spearmanr

    return Ranking(float(spearmanr(*scores).statistic), compared)


def _scored(curve: Mapping[int, float]) -> dict[int, float]:
    return {epoch: value for epoch, value in curve.items() if math.isfinite(value)}
