"""Runs a table: images are encoded once for all of it, its jobs run side by side, and finished ones are found again.

What a finished job is, MLflow says: a FINISHED run with the table's name and the job's digest. So the same command goes
on where it was interrupted, and runs nothing twice.
"""

from __future__ import annotations

import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.config import Clip2sceneError, Job
from clip2scene.machine import num_cpus, use_threads
from clip2scene.pipeline import Pipeline
from clip2scene.progress import console, duration, progress, silent
from clip2scene.stages import Stages
from clip2scene.tables.spec import Cell, Table, expand, jobs_of
from clip2scene.tracking.table_html import table_figures, table_html
from clip2scene.tracking.table_record import (
    FORMAT,
    TableRecord,
    finished_jobs,
    mean_and_deviation,
    metrics_of,
    read_table_run,
    table_run,
)
from clip2scene.tracking.table_report import table_text
from clip2scene.tracking.tracker import Run, Tracker
from clip2scene.training.launch import on_this_node


@dataclass(frozen=True)
class Done:
    """How a job ended."""

    digest: str
    seconds: float
    scores: Mapping[str, float]
    """Metric to value, those that the table's cells ask for."""
    error: str | None = None


def run_table(table: Table, tracker: Tracker, source: str, command: str, pages_at: str | None = None) -> TableRecord:
    """Run what is missing of a table; Ray must be initialised.

    A job that fails leaves the others running; its cells show it as failed, and the next call tries it again.

    Args:
        table: What to run.
        tracker: Where the runs are kept.
        source: File that the table comes from, for errors.
        command: What the user typed, for the report.
        pages_at: Address that the report's links to runs go to; the tracker's when not given.

    Raises:
        ConfigError, DataError, StorageError, TrackingError: nothing can be run at all.
    """
    cells = expand(table, source)
    with table_run(tracker, table.table, table.dataset, table.run_digest()) as parent:
        about = _about(table, cells, command)
        parent.log_dict(about, "table.json")
        with tracker.present("look for finished jobs"):
            found = finished_jobs(tracker, table.table)
        missing = {digest: job for digest, job in jobs_of(cells).items() if digest not in found}
        console().print(
            f"{table.table}: {len(jobs_of(cells))} jobs for {len(cells)} cells, "
            f"{len(jobs_of(cells)) - len(missing)} of them finished before"
        )
        failed: dict[str, str] = {}
        if missing:
            failed = _prepare(missing, tracker, parent)
            ready = {digest: job for digest, job in missing.items() if digest not in failed}
            for done in _run_all(table, ready, cells, tracker, parent) if ready else ():
                if done.error is not None:
                    failed[done.digest] = done.error
        parent.log_dict(about | {"failures": failed}, "table.json")
        with tracker.told(f"read the table {table.table!r}"):
            record = read_table_run(tracker.uri, parent.run_id)
        _keep(record, parent, pages_at)
    return record


def _run_all(
    table: Table, jobs: Mapping[str, Job], cells: Sequence[Cell], tracker: Tracker, parent: Run
) -> Iterator[Done]:
    """Run the jobs and say one line for each; yields how they ended, in that order."""
    tags = {digest: _tags(table, [cell for cell in cells if cell.job.digest() == digest]) for digest in jobs}
    metrics = {digest: _metrics(digest, cells) for digest in jobs}
    side_by_side = all(job.resources.num_workers == 0 and not job.resources.gpus_per_worker for job in jobs.values())
    # A pipeline that runs in this process draws bars of its own.
    bar = progress(table.table, len(jobs), unit="jobs") if side_by_side else silent(table.table, len(jobs))
    with bar as advance:
        ended = _side_by_side if side_by_side else _one_after_another
        for done in ended(jobs, metrics, tags, tracker, parent):
            _say(table, done, tags[done.digest])
            advance(1)
            yield done


def _prepare(jobs: Mapping[str, Job], tracker: Tracker, parent: Run) -> dict[str, str]:
    """World, index, features and superpixels, once for all jobs that read the same; returns what failed, by job.

    The run is told how many images all attempts at the table encoded, and how many this one found.
    """
    failed: dict[str, str] = {}
    reasons: dict[str, str | None] = {}
    encoded, cached = metrics_of(tracker, parent).get("images_encoded", 0), 0
    for digest, job in jobs.items():
        stages = Stages(job)
        key = stages.inputs_digest
        if key not in reasons:
            reasons[key] = None
            try:
                done = stages.make_inputs()
            except Clip2sceneError as error:
                reasons[key] = str(error)
            else:
                encoded, cached = encoded + done.images_encoded, cached + done.images_cached
                # At once: an attempt that is interrupted later has encoded these all the same.
                parent.log_metrics({"images_encoded": encoded, "images_cached": cached})
        if (reason := reasons[key]) is not None:
            failed[digest] = reason
    for reason in dict.fromkeys(failed.values()):
        count = sum(told == reason for told in failed.values())
        console().print(f"cannot run, {count} of the jobs: {reason}", markup=False, soft_wrap=True)
    return failed


def _side_by_side(
    jobs: Mapping[str, Job],
    metrics: Mapping[str, tuple[str, ...]],
    tags: Mapping[str, Mapping[str, str]],
    tracker: Tracker,
    parent: Run,
) -> Iterator[Done]:
    """One Ray task for all jobs with the same pre-training, one after another in it; tasks share the cluster's CPUs.

    Of two tasks that fine-tune the same from scratch, one waits for the other (see :func:`launch`).
    """
    import ray
    from ray.util.queue import Queue

    groups: dict[str, list[str]] = {}
    for digest, job in jobs.items():
        groups.setdefault(Stages(job).distill_digest, []).append(digest)
    queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": on_this_node()})
    task = ray.remote(num_cpus=1, max_retries=0)(_work)
    open_jobs: dict[Any, list[str]] = {}
    for group in groups.values():
        work = [(digest, jobs[digest], metrics[digest], tags[digest]) for digest in group]
        open_jobs[task.remote(work, tracker, parent, queue)] = list(group)
    try:
        while open_jobs:
            ready, _ = ray.wait(list(open_jobs), num_returns=len(open_jobs), timeout=0.5)
            while not queue.empty():
                done = queue.get()
                for left in open_jobs.values():
                    if done.digest in left:
                        left.remove(done.digest)
                yield done
            for reference in ready:
                lost = "its worker ended early"
                try:
                    ray.get(reference)
                except Exception as error:
                    lost = f"its worker ended early ({type(error).__name__})"
                if queue.empty():
                    yield from (Done(digest, 0.0, {}, lost) for digest in open_jobs.pop(reference))
    finally:
        for reference in open_jobs:
            ray.cancel(reference, force=True)
        queue.shutdown(force=True)


def _work(
    work: Sequence[tuple[str, Job, tuple[str, ...], Mapping[str, str]]], tracker: Tracker, parent: Run, queue: Any
) -> None:
    for digest, job, metrics, tags in work:
        use_threads(job.resources.threads_per_worker)
        queue.put(_one(digest, job, metrics, tags, tracker, parent))


def _one_after_another(
    jobs: Mapping[str, Job],
    metrics: Mapping[str, tuple[str, ...]],
    tags: Mapping[str, Mapping[str, str]],
    tracker: Tracker,
    parent: Run,
) -> Iterator[Done]:
    for digest, job in jobs.items():
        yield _one(digest, job, metrics[digest], tags[digest], tracker, parent)


def _one(digest: str, job: Job, metrics: Sequence[str], tags: Mapping[str, str], tracker: Tracker, parent: Run) -> Done:
    """Run one job; whatever goes wrong is told, not raised, so that it ends no other job."""
    started = time.perf_counter()
    try:
        name = f"{tags['row']}, seed {job.seed}"
        pipeline = Pipeline(job, brief=True)
        pipeline.run(tracker, parent=parent, name=name, tags=tags)
    except Clip2sceneError as error:
        return Done(digest, time.perf_counter() - started, {}, str(error))
    except Exception as error:
        sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        return Done(digest, time.perf_counter() - started, {}, sentence)
    kept = {name: pipeline.scores[name] for name in metrics if name in pipeline.scores}
    return Done(digest, time.perf_counter() - started, kept)


def _say(table: Table, done: Done, tags: Mapping[str, str]) -> None:
    column = "" if tags["column"] == "mIoU" else f", {tags['column']}"
    where = f"{table.table}: {tags['row']}{column}, seed {tags['seed']}"
    if done.error is not None:
        console().print(f"{where}: failed: {done.error}", markup=False, soft_wrap=True)
        return
    scores = ", ".join(f"{name.removeprefix('miou/')} {100 * value:.1f}" for name, value in done.scores.items())
    console().print(f"{where}: {scores or 'no score'}, {duration(done.seconds)}", markup=False, soft_wrap=True)


def _tags(table: Table, cells: Sequence[Cell]) -> dict[str, str]:
    """Tags of the run that these cells share."""
    return {
        "table": table.table,
        "table_dataset": table.dataset,
        "row": " | ".join(dict.fromkeys(cell.row.name for cell in cells)),
        "column": " | ".join(dict.fromkeys(cell.column.name for cell in cells)),
        "seed": str(cells[0].seed),
    }


def _metrics(digest: str, cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(cell.score for cell in cells if cell.job.digest() == digest))


def _about(table: Table, cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """The contents of ``table.json``."""
    jobs: dict[tuple[str, str], dict[str, str]] = {}
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        place = (cell.row.name, cell.column.name)
        first.setdefault(place, cell)
        jobs.setdefault(place, {})[str(cell.seed)] = cell.job.digest()
    return {
        "format": FORMAT,
        "table": table.table,
        "title": table.title,
        "dataset": table.dataset,
        "paper_dataset": table.paper_dataset,
        "vocabulary": Stages(cells[0].job).vocabulary.name,
        "seeds": list(table.seeds),
        "reference": table.reference,
        "columns": [column.name for column in table.columns_of(table.dataset)],
        "command": command,
        "machine": f"{num_cpus()} cores, {platform.machine()}, Python {platform.python_version()}",
        "cells": [
            {
                "group": cell.row.group,
                "row": cell.row.name,
                "column": cell.column.name,
                "score": cell.score,
                "paper": cell.paper,
                "jobs": jobs[place],
            }
            for place, cell in first.items()
        ],
    }


def _keep(record: TableRecord, parent: Run, pages_at: str | None) -> None:
    """The finished table beside its runs: text, page, figures, and the means for MLflow's own comparison of runs."""
    parent.log_text(table_text(record), "table.txt")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "table.html"
        page.write_text(table_html(record, pages_at), encoding="utf-8")
        parent.log_artifact(page)
    for name, _, figure in table_figures(record):
        parent.log_figure(figure, f"figures/{name}.png")
    means = {
        f"{_word(cell.row)}/{_word(cell.column)}": mean_and_deviation(list(cell.values.values()))[0]
        for cell in record.cells
    }
    parent.log_metrics({name: mean for name, mean in means.items() if mean is not None})


def _word(name: str) -> str:
    """A name that MLflow takes as part of a metric's."""
    return re.sub(r"[^A-Za-z0-9_. -]+", " ", name).strip()
