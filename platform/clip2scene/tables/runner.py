"""Runs a table: its images are encoded once, its jobs run side by side, and finished jobs are not repeated.

A job is finished when MLflow has a FINISHED run with the name of the table and the digest of the job. So the same
command continues where it was interrupted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip2scene.config import Job
from clip2scene.errors import Clip2sceneError, one_line
from clip2scene.machine import description, jobs_on, ray_nodes, use_threads
from clip2scene.pipeline import Pipeline
from clip2scene.progress import duration, progress, say, silent
from clip2scene.stages import Stages
from clip2scene.storage import Storage, locked
from clip2scene.tables.spec import Cell, Table, expand
from clip2scene.tracking.run import Run
from clip2scene.tracking.table.keep import keep_table
from clip2scene.tracking.table.record import FORMAT, TableRecord, finished_jobs, metrics_of, read_table_run, table_run
from clip2scene.tracking.tracker import Tracker


@dataclass(frozen=True)
class TableJob:
    """One job of a table, for all cells that show a score of its run."""

    digest: str
    settings: Job
    scores: tuple[str, ...]
    """Metrics that the cells show."""
    tags: Mapping[str, str]
    """Tags of its run."""


@dataclass(frozen=True)
class Done:
    """How a job ended."""

    job: TableJob
    seconds: float
    scores: Mapping[str, float]
    """The job's metrics that were computed, and their values."""
    error: str | None = None


def run_table(table: Table, tracker: Tracker, source: str, command: str, pages_at: str | None = None) -> TableRecord:
    """Run what is missing of a table; Ray must be initialised.

    A job that fails does not stop the others; its cells show it as failed, and the next call tries it again. A second
    call at the same time waits for the first.

    Args:
        table: what to run.
        tracker: where the runs are kept.
        source: file that the table comes from, for errors.
        command: what the user typed, for the report.
        pages_at: MLflow server that the report's links to runs open; the tracker's when not given.

    Raises:
        ConfigError, DataError, StorageError, TrackingError: nothing can be run at all.
    """
    cells = expand(table, source)
    jobs = _jobs(table, cells)
    folder = Storage(cells[0].job.storage).path("tables", f"{table.table}-{table.dataset}")
    digest = table.run_digest()
    with locked(folder, "runs this table"), table_run(tracker, table.table, table.dataset, digest) as parent:
        about = _about(table, cells, command)
        parent.log_dict(about, "table.json")
        with tracker.reachable("look for finished jobs"):
            finished = finished_jobs(tracker, table.table)
        missing = [job for job in jobs if job.digest not in finished]
        say(
            f"{table.table}: {len(jobs)} jobs for {len(cells)} cells, "
            f"{len(jobs) - len(missing)} of them finished before"
        )
        failed = _prepare(missing, tracker, parent) if missing else {}
        if ready := [job for job in missing if job.digest not in failed]:
            for done in _run_all(table, ready, tracker, parent):
                if done.error is not None:
                    failed[done.job.digest] = done.error
        parent.log_dict(about | {"failures": failed}, "table.json")
        with tracker.synced(f"read the table {table.table!r}"):
            record = read_table_run(tracker.uri, parent.run_id)
        keep_table(record, parent, pages_at)
    return record


def unscored(record: TableRecord) -> tuple[str, ...]:
    """One sentence per row whose finished jobs lack its score, such as the IoU of a class that never occurs."""
    lacking = [(cell, sorted(cell.runs.keys() - cell.values.keys())) for cell in record.cells]
    return tuple(
        f"{record.about['table']}: {cell.row}, {cell.column}: {cell.score}: "
        f"no value in the finished job of seed {', '.join(map(str, seeds))}"
        for cell, seeds in lacking
        if seeds
    )


def _jobs(table: Table, cells: Sequence[Cell]) -> list[TableJob]:
    """The different jobs of a table's cells, in order."""
    sharing: dict[str, list[Cell]] = {}
    for cell in cells:
        sharing.setdefault(cell.digest, []).append(cell)
    return [
        TableJob(digest, same[0].job, tuple(dict.fromkeys(cell.score for cell in same)), _tags(table, same))
        for digest, same in sharing.items()
    ]


def _run_all(table: Table, jobs: Sequence[TableJob], tracker: Tracker, parent: Run) -> Iterator[Done]:
    """Run the jobs and print one line for each; yields how they ended, in that order."""
    nodes = ray_nodes()
    at_once = min(jobs_on(nodes, job.settings.resources) for job in jobs)
    # A pipeline that runs in this process draws its own bars.
    show = progress if at_once > 1 else silent
    ended = _side_by_side(jobs, tracker, parent, at_once) if at_once > 1 else _one_after_another(jobs, tracker, parent)
    with show(table.table, len(jobs), unit="jobs") as advance:
        for done in ended:
            _print_end(table, done)
            advance(1)
            yield done


def _prepare(jobs: Sequence[TableJob], tracker: Tracker, parent: Run) -> dict[str, str]:
    """World, index, features and superpixels, once for all jobs that read the same.

    What the indexes have left out is said here: the jobs themselves are brief. ``parent`` keeps how many images all
    attempts at the table encoded, and how many this one found.

    Returns:
        Why it failed, by the digests of the jobs that cannot run.
    """
    failed: dict[str, str] = {}
    reasons: dict[str, str | None] = {}
    encoded, cached = metrics_of(tracker, parent).get("images_encoded", 0), 0
    for job in jobs:
        stages = Stages(job.settings)
        key = stages.inputs_digest
        if key not in reasons:
            reasons[key] = None
            try:
                for sentence in stages.omissions:
                    say(f"index: {sentence}")
                done = stages.make_inputs()
            except Clip2sceneError as error:
                reasons[key] = str(error)
            else:
                encoded, cached = encoded + done.images_encoded, cached + done.images_cached
                # At once: they are encoded even if this attempt is interrupted later.
                parent.log_metrics({"images_encoded": encoded, "images_cached": cached})
        if (reason := reasons[key]) is not None:
            failed[job.digest] = reason
    for reason, count in Counter(failed.values()).items():
        say(f"cannot run, {count} of the jobs: {reason}")
    return failed


def _side_by_side(jobs: Sequence[TableJob], tracker: Tracker, parent: Run, at_once: int) -> Iterator[Done]:
    """One Ray task per pre-training, for all jobs that share it; that many tasks at a time.

    A task reserves no CPU if its job has workers, which reserve theirs. Where two tasks fine-tune the same from
    scratch, one waits for the other (see :class:`Stages`).
    """
    import ray

    groups: dict[str, dict[str, TableJob]] = {}
    for job in jobs:
        groups.setdefault(Stages(job.settings).distill_digest, {})[job.digest] = job
    has_workers = any(job.settings.resources.num_workers for job in jobs)
    task = ray.remote(num_cpus=0 if has_workers else 1, max_retries=0)(_run_group)
    waiting = list(groups.values())
    running: dict[Any, dict[str, TableJob]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                group = waiting.pop(0)
                running[task.remote(list(group.values()), tracker, parent)] = group
            (ends,), _ = ray.wait(list(running), num_returns=1)
            try:
                done: Done = ray.get(next(ends))
            except StopIteration:
                del running[ends]
            except ray.exceptions.RayError as error:
                lost = f"its worker ended early ({type(error).__name__})"
                yield from (Done(job, 0.0, {}, lost) for job in running.pop(ends).values())
            else:
                del running[ends][done.job.digest]
                yield done
    finally:
        for ends in running:
            ray.cancel(ends, force=True)


def _run_group(jobs: Sequence[TableJob], tracker: Tracker, parent: Run) -> Iterator[Done]:
    for job in jobs:
        use_threads(job.settings.resources.threads_per_worker)
        yield _run_job(job, tracker, parent)


def _one_after_another(jobs: Sequence[TableJob], tracker: Tracker, parent: Run) -> Iterator[Done]:
    return (_run_job(job, tracker, parent) for job in jobs)


def _run_job(job: TableJob, tracker: Tracker, parent: Run) -> Done:
    """Run one job; whatever goes wrong is returned, not raised, so that it ends no other job."""
    started_s = time.perf_counter()
    scores, reason = {}, None
    try:
        pipeline = Pipeline(job.settings, brief=True)
        pipeline.run(tracker, parent=parent, name=f"{job.tags['row']}, seed {job.settings.seed}", tags=job.tags)
        scores = {name: pipeline.scores[name] for name in job.scores if name in pipeline.scores}
    except Clip2sceneError as error:
        reason = str(error)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
    return Done(job, time.perf_counter() - started_s, scores, reason)


def _print_end(table: Table, done: Done) -> None:
    tags = done.job.tags
    column = "" if tags["column"] == "mIoU" else f", {tags['column']}"
    where = f"{table.table}: {tags['row']}{column}, seed {tags['seed']}"
    if done.error is not None:
        say(f"{where}: failed: {done.error}")
        return
    scores = ", ".join(f"{name.removeprefix('miou/')} {100 * value:.1f}" for name, value in done.scores.items())
    say(f"{where}: {scores or 'no score'}, {duration(done.seconds)}")


def _tags(table: Table, cells: Sequence[Cell]) -> dict[str, str]:
    """Tags of the run that these cells share."""
    return {
        "table": table.table,
        "table_dataset": table.dataset,
        "row": " | ".join(dict.fromkeys(cell.row.name for cell in cells)),
        "column": " | ".join(dict.fromkeys(cell.column.name for cell in cells)),
        "seed": str(cells[0].seed),
    }


def _about(table: Table, cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """The contents of ``table.json``."""
    jobs: dict[tuple[str, str], dict[str, str]] = {}
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        place = (cell.row.name, cell.column.name)
        first.setdefault(place, cell)
        jobs.setdefault(place, {})[str(cell.seed)] = cell.digest
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
        "machine": description(),
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
