"""What a table is: a base job per dataset, columns and named rows that change its settings, and the paper's numbers.

A table file is YAML with the key ``table``. Every cell (row, column, seed) is one job; cells with equal jobs share one
run and show different scores of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator, model_validator

from clip2scene.config import DatasetKind, Job, Settings, digest_of
from clip2scene.errors import ConfigError
from clip2scene.jobfile import TABLE_KEYS, did_you_mean, parse, put, read_values
from clip2scene.scores import class_scores_of, mean_scores_of

PAPER_OF: dict[DatasetKind, DatasetKind] = {"streetworld": "nuscenes"}
"""The dataset that the paper's numbers are taken from where the paper does not have ours."""


class Column(Settings):
    """One column of scores, such as a label fraction."""

    name: str = Field(min_length=1)
    """Heading of the column."""
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Dotted keys of the base job and their values."""

    model_config = ConfigDict(populate_by_name=True)


class Row(Settings):
    """One named variant."""

    group: str = Field(min_length=1)
    """The group that it belongs to (``baseline``, ``prompts``, ...)."""
    name: str = Field(min_length=1)
    """Name of the row, which no other has."""
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Dotted keys of the base job and their values; they override those of the column."""
    score: str | None = None
    """Metric of the run that is shown; that of the table when not given."""
    paper: dict[DatasetKind, tuple[float | None, ...]] = Field(default_factory=dict)
    """The paper's mIoU in percent: one number, or one per column of that dataset; null where it gives none."""

    model_config = ConfigDict(populate_by_name=True)

    @field_validator("paper", mode="before")
    @classmethod
    def _one_number_is_a_list(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value if isinstance(value, list | tuple) else [value] for key, value in values.items()}


class Table(Settings):
    """A table over one dataset and some seeds."""

    table: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")
    """Name of the table for ``clip2scene report``."""
    title: str
    """Title of the report."""
    dataset: DatasetKind
    """The dataset of ``jobs`` that is run."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Every cell is run once per seed."""
    storage: str = "tables-output"
    """Folder for everything that the jobs make, and for MLflow's data when no server is given."""
    experiment: str = "clip2scene"
    """MLflow experiment of the runs."""
    score: str = "miou/student_3d"
    """Metric of a run that a cell shows."""
    reference: str
    """Name of the row that the others are compared with."""
    columns: dict[DatasetKind, tuple[Column, ...]] = Field(default_factory=dict)
    """Columns per dataset; a single column, named mIoU, where none is given."""
    jobs: dict[DatasetKind, dict[str, Any]]
    """Base job per dataset, without ``name``, ``seed``, ``storage`` and ``experiment``, which the table sets. The key
    ``base`` names a job file to start from."""
    rows: tuple[Row, ...] = Field(min_length=1)
    """Variants that are compared."""

    @model_validator(mode="after")
    def _fits_together(self) -> Table:
        if self.dataset not in self.jobs:
            raise ValueError(f"dataset={self.dataset}: no job for it; jobs has: {', '.join(self.jobs)}")
        _no_duplicates("rows", (row.name for row in self.rows))
        _no_duplicates("seeds", self.seeds)
        for dataset, columns in self.columns.items():
            _no_duplicates(f"columns.{dataset}", (column.name for column in columns))
        if self.reference not in {row.name for row in self.rows}:
            raise ValueError(f"reference={self.reference!r}: no row has this name")
        for row in self.rows:
            for dataset, numbers in row.paper.items():
                if len(numbers) != len(self.columns_of(dataset)):
                    raise ValueError(
                        f"row {row.name!r}: paper.{dataset} has {len(numbers)} numbers for "
                        f"{len(self.columns_of(dataset))} columns"
                    )
        if len(self.columns_of(self.dataset)) != len(self.columns_of(self.paper_dataset)):
            raise ValueError(f"columns.{self.dataset} must be as many as columns.{self.paper_dataset}")
        return self

    @property
    def paper_dataset(self) -> DatasetKind:
        """The dataset of the paper's numbers that ours are compared with."""
        return PAPER_OF.get(self.dataset, self.dataset)

    def columns_of(self, dataset: DatasetKind) -> tuple[Column, ...]:
        """The columns of a dataset."""
        return self.columns.get(dataset) or (Column(name="mIoU"),)

    def run_digest(self) -> str:
        """The same digest means the same table when it is run again, also with other seeds."""
        return digest_of(self.model_dump(mode="json", by_alias=True, exclude={"seeds", "title", "storage"}))


@dataclass(frozen=True)
class Cell:
    """A row in a column under one seed, and the job that gives its score."""

    row: Row
    column: Column
    seed: int
    job: Job
    score: str
    paper: float | None

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the job."""
        return self.job.digest()


def load_table(path: str | Path, overrides: Sequence[str] = ()) -> Table:
    """Read a table file and apply ``key.path=value`` overrides (``dataset=nuscenes jobs.nuscenes.dataset.root=/data``).

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong, in any row.
    """
    values = read_values(path, overrides, "table")
    for place, row in enumerate(_listed(values, "rows", str(path)), start=1):
        parse(Row, row, f"{path}: row {place} ({row.get('name')!r})")
    table = parse(Table, values, str(path))
    for override in overrides:
        group, _, rest = override.partition("=")[0].partition(".")
        if group == "jobs" and (of := rest.partition(".")[0]) != table.dataset:
            raise ConfigError(
                f"override {override!r}: changes nothing with dataset={table.dataset}; give dataset={of} too"
            )
    expand(table, str(path))
    return table


def expand(table: Table, source: str) -> tuple[Cell, ...]:
    """Every cell, rows first, then columns, then seeds.

    Raises:
        ConfigError: settings that are not a valid job, or a score that the job does not write; the sentence names the
            row.
    """
    cells = []
    for row in table.rows:
        numbers = row.paper.get(table.paper_dataset)
        for place, column in enumerate(table.columns_of(table.dataset)):
            for seed in table.seeds:
                where = f"{source}: row {row.name!r}" + (f", column {column.name!r}" if column.set_ else "")
                job = _job(table, {**column.set_, **row.set_}, seed, where)
                _check_score(row.score or table.score, job, where if row.score else f"{where} (score of the table)")
                paper = None if numbers is None else numbers[place]
                cells.append(Cell(row, column, seed, job, row.score or table.score, paper))
    return tuple(cells)


def jobs_of(cells: Iterable[Cell]) -> dict[str, Job]:
    """The different jobs of cells by digest, in order."""
    return {cell.digest: cell.job for cell in cells}


def _job(table: Table, changes: dict[str, Any], seed: int, where: str) -> Job:
    values = copy.deepcopy(table.jobs[table.dataset])
    for key in TABLE_KEYS:
        if key in changes or key in values:
            raise ConfigError(f"{where}: {key}: the table sets it; give it at the top of the table")
    for key, value in changes.items():
        put(values, key, value, where)
    values |= {
        "name": f"{table.table}-{table.dataset}",
        "seed": seed,
        "storage": table.storage,
        "experiment": table.experiment,
    }
    job = parse(Job, values, where)
    if job.dataset.kind != table.dataset:
        raise ConfigError(f"{where}: dataset.kind={job.dataset.kind}: jobs.{table.dataset} must be of {table.dataset}")
    return job


def _check_score(score: str, job: Job, where: str) -> None:
    scores, per_class = mean_scores_of(job), class_scores_of(job)
    if score in scores or score in per_class:
        return
    allowed = f"{', '.join(scores)}, and iou_METHOD/CLASS, such as {per_class[0]}" if scores else "none"
    because = f"stage={job.stage}, distill.method={job.distill.method}, evaluate.methods={list(job.evaluate.methods)}"
    raise ConfigError(
        f"{where}: score={score}: a job with {because} writes no such score; allowed: {allowed}"
        f"{did_you_mean(score, [*scores, *per_class])}"
    )


def _listed(values: dict[str, Any], key: str, path: str) -> list[dict[str, Any]]:
    rows = values.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{path}: {key}: a list of mappings, one per row, is required")
    return rows


def _no_duplicates(key: str, names: Iterable[Any]) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{key}: {name!r} is there twice; every name may be used once")
        seen.add(name)
