"""What a row of the table is, how a pair of runs is timed, and when a row has reached its goal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

RUNS = 5
"""Paired runs that every median is of."""


class Skipped(Exception):  # noqa: N818 (no error: the table lists it with its reason)
    """This machine or mode cannot run the row; the message says why."""


@dataclass(frozen=True)
class Goal:
    """A bound on the median of a row's ratios."""

    sense: Literal["at least", "at most"]
    value: float

    def reached_by(self, value: float) -> bool:
        return value >= self.value if self.sense == "at least" else value <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.sense == 'at least' else '<='} {self.value:g}"


@dataclass(frozen=True)
class Measured:
    """Samples of one row: run ``i`` of ours was made beside run ``i`` of the baseline."""

    work: str
    """Sizes of what was done."""
    ours: list[float]
    baseline: list[float] = field(default_factory=list)
    """Empty where the row is an absolute value."""
    unit: str = "s"
    limit: str = ""
    """What physics would allow, and what is known of the rest."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    title: str
    baseline: str
    goal: Goal | None
    compare: Literal["baseline / ours", "ours / baseline", "ours"]
    """How the ratio is formed; ``ours`` judges the value itself."""
    measure: Callable[[Any], Measured]

    def ratios(self, measured: Measured) -> list[float]:
        if self.compare == "ours":
            return measured.ours
        pairs = zip(measured.ours, measured.baseline, strict=True)
        return [b / o if self.compare == "baseline / ours" else o / b for o, b in pairs]

    def status(self, measured: Measured) -> str:
        if self.goal is None:
            return "ok"
        return "ok" if self.goal.reached_by(statistics.median(self.ratios(measured))) else "short"


ROWS: list[Row] = []
"""All rows in the order of the table; importing a module of rows adds its own."""


def row(
    name: str,
    title: str,
    *,
    baseline: str,
    goal: Goal | None,
    compare: Literal["baseline / ours", "ours / baseline", "ours"],
) -> Callable[[Callable[[Any], Measured]], Callable[[Any], Measured]]:
    """Make a function that measures into a row of the table."""

    def add(measure: Callable[[Any], Measured]) -> Callable[[Any], Measured]:
        assert name not in {known.name for known in ROWS}, name
        ROWS.append(Row(name, title, baseline, goal, compare, measure))
        return measure

    return add


def at_least(value: float) -> Goal:
    return Goal("at least", value)


def at_most(value: float) -> Goal:
    return Goal("at most", value)


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    runs: int = RUNS,
    warm: bool = True,
    before: Callable[[], Any] = lambda: None,
) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn (A B A B ...) in this process; ``before`` each, outside of the clock."""
    if warm:
        ours()
        baseline()
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for work, kept in zip((ours, baseline), samples, strict=True):
            before()
            kept.append(seconds(work))
    return samples
