"""What the records of sweeps and tables ask of MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clip2scene.config import ConfigError
from clip2scene.tracking.outbox import one_line
from clip2scene.tracking.run import client_of
from clip2scene.tracking.server import TrackingError, answering

_LATEST_FIRST = "attributes.start_time DESC"
_RUNS_PER_PAGE = 500


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


def search_runs(
    uri: str, experiment_ids: list[str], condition: str, order: str = "attributes.start_time ASC"
) -> list[Any]:
    """All runs that fulfil a condition, read page by page; the earliest first unless ``order`` says otherwise."""
    client, token, found = client_of(uri), None, []  # type: Any, Any, list[Any]
    while True:
        page = client.search_runs(
            experiment_ids, condition, max_results=_RUNS_PER_PAGE, page_token=token, order_by=[order]
        )
        found += page
        token = page.token
        if not token:
            return found


def find(uri: str, kind: str, name: str) -> Any | None:
    """The latest ``sweep`` or ``table`` of that name: its own run, or None where there is none."""
    return next((run for run in _all_of(uri, kind) if name in (run.data.tags[kind], run.info.run_name)), None)


def find_known(uri: str, kind: str, name: str) -> Any:
    """As :func:`find`.

    Raises:
        ConfigError: there is none; the sentence lists those that there are.
    """
    found = find(uri, kind, name)
    if found is None:
        known = ", ".join(sorted({run.info.run_name for run in _all_of(uri, kind)}))
        raise ConfigError(f"{kind} {name!r}: not in MLflow; known: {known or f'none, run a {kind} first'}")
    return found


def _all_of(uri: str, kind: str) -> list[Any]:
    uri = uri.rstrip("/")
    experiment_ids = [experiment.experiment_id for experiment in client_of(uri).search_experiments()]
    # Names are compared in Python: a quotation mark in a name would break MLflow's condition.
    return search_runs(uri, experiment_ids, f"tags.stage = '{kind}'", _LATEST_FIRST)
