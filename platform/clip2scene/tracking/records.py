"""What sweeps and tables have in common in MLflow: a parent run with a JSON artifact, found by name and read back."""

from __future__ import annotations

import datetime
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.errors import ConfigError, TrackingError, one_line
from clip2scene.jobfile import did_you_mean
from clip2scene.tracking.provenance import OPENED_TAG
from clip2scene.tracking.run import Run, client_of
from clip2scene.tracking.server import answering
from clip2scene.tracking.tracker import Tracker

_RUNS_PER_PAGE = 500


@dataclass(frozen=True)
class Record:
    """A sweep or a table, and where it was found."""

    about: Mapping[str, Any]
    """The JSON artifact of its own run."""
    uri: str
    """The MLflow server that was read."""
    experiment_id: str
    run_id: str
    """Its own run."""
    git_revision: str
    started_ms: int

    @property
    def day(self) -> str:
        """When it was started (``05 March 2026``, UTC)."""
        return datetime.datetime.fromtimestamp(self.started_ms / 1000, datetime.UTC).strftime("%d %B %Y")

    def url(self, run_id: str, pages_at: str | None = None) -> str:
        """A run's page in MLflow, on the server at ``pages_at`` or on the one that was read."""
        page = f"{pages_at or self.uri}/#/experiments/{self.experiment_id}/runs/{run_id}"
        return f"{page}?workflowType=machine_learning"  # else the UI shows its menus for language models


@contextmanager
def parent_run(
    tracker: Tracker, name: str, identity: Mapping[str, str], tags: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """The own run of a sweep or a table: the one with the tags of ``identity`` continues, otherwise a new one begins.

    When the block ends, no run below it stays open.
    """
    known = tracker.find_run(identity)
    with tracker.run(name, run_id=known, tags={**identity, **(tags or {})}, system_metrics=False) as run:
        try:
            yield run
        finally:
            tracker.close_below(run)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """A block that only reads from the server at ``uri``; a server that cannot be read is one sentence.

    Raises:
        ConfigError: ``uri`` is not the address of a server.
        TrackingError: nothing answers there, or it refuses a request.
    """
    uri = answering(uri)
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except (MlflowException, RequestException) as error:
        raise TrackingError(f"MLflow at {uri} cannot be read ({one_line(error, 200)})") from error


def find_named(uri: str, name: str) -> list[Any]:
    """The own runs of the sweeps and tables of that name in MLflow, at least one; first the one that ran last.

    Raises:
        ConfigError: there is none; the sentence lists the sweeps and tables that there are.
    """
    uri = uri.rstrip("/")
    experiment_ids = [experiment.experiment_id for experiment in client_of(uri).search_experiments()]
    there = {kind: search_runs(uri, experiment_ids, f"tags.stage = '{kind}'") for kind in ("sweep", "table")}
    # Names are compared in Python: a quotation mark in a name would break MLflow's condition.
    named = [run for kind, runs in there.items() for run in runs if name in (run.data.tags[kind], run.info.run_name)]
    if not named:
        known = {kind: sorted({run.info.run_name for run in runs}) for kind, runs in there.items()}
        listed = "; ".join(f"{kind}s there: {', '.join(names) or 'none'}" for kind, names in known.items())
        meant = did_you_mean(name, [one for names in known.values() for one in names])
        raise ConfigError(f"{name!r}: no sweep or table of that name in MLflow; {listed}{meant}")
    return sorted(named, key=_opened_s, reverse=True)


def read_record(uri: str, parent: Any, artifact: str, format: str) -> Record:
    """What the own run of a sweep or a table says of it.

    Args:
        uri: an MLflow server.
        parent: MLflow's run.
        artifact: name of its JSON artifact.
        format: the only value of the artifact's ``format`` that can be read.

    Raises:
        TrackingError: the artifact is missing or in another format.
    """
    uri, run_id = uri.rstrip("/"), parent.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        path = download(uri, run_id, artifact, folder)
        about = json.loads(path.read_text(encoding="utf-8")) if path else {}
    if about.get("format") != format:
        raise TrackingError(f"run {run_id}: its {artifact} is not in the format {format}")
    revision = parent.data.tags.get("git_revision", "unknown")
    return Record(about, uri, parent.info.experiment_id, run_id, revision, parent.info.start_time)


def search_runs(uri: str, experiment_ids: list[str], condition: str) -> list[Any]:
    """All runs that fulfil a condition, read page by page; the earliest first."""
    client, token = client_of(uri), None
    found: list[Any] = []
    while True:
        page = client.search_runs(
            experiment_ids,
            condition,
            max_results=_RUNS_PER_PAGE,
            page_token=token,
            order_by=["attributes.start_time ASC"],
        )
        found += page
        token = page.token
        if not token:
            return found


def download(uri: str, run_id: str, artifact: str, folder: str) -> Path | None:
    """A copy of an artifact below ``folder``; None where the run has none of that name."""
    client = client_of(uri)
    if artifact not in {item.path for item in client.list_artifacts(run_id)}:
        return None
    return Path(client.download_artifacts(run_id, artifact, folder))


def seconds_of(run: Any) -> float:
    """How long an MLflow run took; 0 while it is open."""
    return float((run.info.end_time or run.info.start_time) - run.info.start_time) / 1000


def mean_and_deviation(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n - 1); None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def _opened_s(run: Any) -> float:
    """When a run was last opened or continued; runs of earlier versions say only when they began."""
    return float(run.data.tags.get(OPENED_TAG, run.info.start_time / 1000))
