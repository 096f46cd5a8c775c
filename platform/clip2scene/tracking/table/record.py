"""A table as MLflow keeps it: ``table.json`` of its own run says which jobs a cell reads, their runs hold the scores.

Nothing else is read, so a table can be rebuilt wherever the MLflow server answers, also while its jobs still run.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clip2scene.tracking.records import (
    Record,
    download,
    mean_and_deviation,
    parent_run,
    read_record,
    search_runs,
    seconds_of,
)
from clip2scene.tracking.run import Run, client_of
from clip2scene.tracking.tracker import Tracker

FORMAT = "clip2scene-table-1"
ALL_POINTS = "_all_points"
"""End of a score's name where all raw points are scored, not only those that an image shows."""
_PRINTED = 0.05
"""Percentage points below which a difference is printed as 0.0."""


@dataclass(frozen=True)
class JobRun:
    """A finished run of one job."""

    run_id: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    seconds: float

    @property
    def digest(self) -> str:
        """Digest of the job."""
        return self.tags.get("job_digest", "")


@dataclass(frozen=True)
class TableCell:
    """A row in a column, over seeds."""

    group: str
    row: str
    column: str
    score: str
    """Metric that is shown (``miou/student_3d``)."""
    paper: float | None
    """The paper's mIoU, percent."""
    runs: Mapping[int, JobRun] = field(default_factory=dict)
    """Finished runs by seed."""
    failures: tuple[str, ...] = ()
    """Errors of the seeds that failed."""

    @property
    def method(self) -> str:
        """The method that is scored (``student_3d``), as named in the metrics per class."""
        return self.score.removeprefix("miou/")

    @property
    def array(self) -> str:
        """The name of the method's labels in the example."""
        return self.method.removesuffix(ALL_POINTS)

    @property
    def values(self) -> dict[int, float]:
        """Scores in percent, by seed; seeds without a score are left out."""
        scores = {seed: run.metrics.get(self.score, math.nan) for seed, run in self.runs.items()}
        return {seed: 100 * score for seed, score in scores.items() if math.isfinite(score)}

    def iou_per_class(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard deviation over seeds in percent, by class; classes without a score are left out."""
        prefix = f"iou_{self.method}/"
        values: dict[str, list[float]] = {}
        for run in self.runs.values():
            for name, value in run.metrics.items():
                if name.startswith(prefix) and math.isfinite(value):
                    values.setdefault(name.removeprefix(prefix), []).append(100 * value)
        return {name: mean_and_deviation(scores) for name, scores in values.items()}  # type: ignore[misc]


@dataclass(frozen=True)
class TableRecord(Record):
    """A table; ``about`` has its name, title, dataset, seeds, reference row, columns, command, machine."""

    cells: tuple[TableCell, ...]

    def column(self, name: str) -> tuple[TableCell, ...]:
        """The rows of a column."""
        return tuple(cell for cell in self.cells if cell.column == name)

    def reference(self, column: str) -> TableCell:
        """The row that the others of a column are compared with."""
        return next(cell for cell in self.column(column) if cell.row == self.about["reference"])

    def example(self, cell: TableCell) -> dict[str, np.ndarray] | None:
        """Points, truth and labels of the frame that the run of the first seed kept; None where there is none."""
        for seed in self.about["seeds"]:
            if seed in cell.runs:
                return _example(self.uri, cell.runs[seed].run_id)
        return None


def difference(cell: TableCell, reference: TableCell) -> tuple[float | None, float | None]:
    """Mean and standard deviation of row minus reference in percentage points, over the seeds that both have."""
    ours, theirs = cell.values, reference.values
    return mean_and_deviation([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def direction(cell: TableCell, reference: TableCell) -> str:
    """Whether our score moves the way the paper's does, from the reference row to this one.

    Returns:
        ``same`` or ``opposite``; ``unclear`` when our difference is below its standard deviation over seeds, is of one
        seed, which has none, or is printed as 0.0; a dash where either has no difference.
    """
    mean, deviation = difference(cell, reference)
    if mean is None or cell.paper is None or reference.paper is None or cell.paper == reference.paper:
        return "–"
    if deviation is None or abs(mean) <= max(deviation, _PRINTED):
        return "unclear"
    return "same" if (mean > 0) == (cell.paper > reference.paper) else "opposite"


def finished_jobs(tracker: Tracker, table: str) -> dict[str, JobRun]:
    """The latest finished run of every job of a table, by the digest of the job."""
    return _by_digest(tracker.uri, [tracker.experiment_id], table)


def metrics_of(tracker: Tracker, run: Run) -> dict[str, float]:
    """The metrics that a run holds so far, also those of earlier attempts."""
    with tracker.reachable("look into the table's run") as client:
        return dict(client.get_run(run.run_id).data.metrics)


def table_run(tracker: Tracker, table: str, dataset: str, digest: str) -> AbstractContextManager[Run]:
    """The parent run of a table; see :func:`parent_run`."""
    identity = {"stage": "table", "table": table, "table_dataset": dataset, "table_digest": digest}
    return parent_run(tracker, f"{table}-{dataset}", identity)


def read_table_run(uri: str, run_id: str) -> TableRecord:
    """The table of one run, also where a later table has its name.

    Args:
        uri: an MLflow server.
        run_id: a table's own run.

    Raises:
        TrackingError: it was written in another format.
    """
    return _record(uri, client_of(uri).get_run(run_id))


def _record(uri: str, parent: Any) -> TableRecord:
    record = read_record(uri, parent, "table.json", FORMAT)
    about = dict(record.about)
    runs = _by_digest(record.uri, [record.experiment_id], about["table"])
    failures = about.get("failures", {})
    cells = []
    for values in about.pop("cells"):
        jobs = {int(seed): digest for seed, digest in values.pop("jobs").items()}
        found = {seed: runs[digest] for seed, digest in jobs.items() if digest in runs}
        reasons = [
            f"seed {seed}: {failures[digest]}"
            for seed, digest in jobs.items()
            if seed not in found and digest in failures
        ]
        cells.append(TableCell(**values, runs=found, failures=tuple(reasons)))
    return TableRecord(**vars(record) | {"about": about}, cells=tuple(cells))


def _by_digest(uri: str, experiments: list[str], table: str) -> dict[str, JobRun]:
    found = {}
    for run in search_runs(uri, experiments, f"tags.table = '{table}' and attributes.status = 'FINISHED'"):
        if "job_digest" in run.data.tags:
            job = JobRun(run.info.run_id, dict(run.data.metrics), dict(run.data.tags), seconds_of(run))
            found[job.digest] = job
    return found


def _example(uri: str, run_id: str) -> dict[str, np.ndarray] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = download(uri, run_id, "example.npz", folder)
        if path is None:
            return None
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
