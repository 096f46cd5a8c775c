"""Keeps on disk what a run writes while its MLflow server is away, until a later write or command delivers it.

Every write is a small dictionary (a call). :func:`send` makes it at once, or an :class:`Outbox` makes it later with the
same code and the original times. Making a call twice does no harm, because MLflow keeps one metric per key, step, time
and value, so a delivery that is killed can start over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.errors import TrackingError, one_line
from clip2scene.progress import say
from clip2scene.storage import locked
from clip2scene.tracking.server import healthy

METRICS_PER_BATCH, PARAMS_PER_BATCH = 1000, 100
"""The most that MLflow takes in one request."""
_SECONDS_BETWEEN_TRIES = 1.0
_GLANCE_S = 2.0
_CALLS = "calls.jsonl"
_IS_THERE = ("IntegrityError", "UniqueViolation")
"""Names of a database's errors, in MLflow's answer, for a row that another request has just inserted."""
_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")

Call = Mapping[str, Any]
_tried_at_s: dict[str, float] = {}
"""When this process last tried to reach the server for a run that waits (monotonic)."""


@dataclass(frozen=True)
class Outbox:
    """A folder with one subfolder per run that has calls waiting; safe for several processes at once."""

    folder: Path

    def holds(self, run_id: str) -> bool:
        """Whether calls of this run are waiting."""
        return (self.folder / run_id / _CALLS).is_file()

    def run_ids(self) -> list[str]:
        """The runs that have calls waiting."""
        return sorted(calls.parent.name for calls in self.folder.glob(f"*/{_CALLS}"))

    def append(self, run_id: str, call: Call) -> None:
        """Keep a call, with a copy of its file if it has one."""
        box = self.folder / run_id
        with locked(self.folder):
            box.mkdir(exist_ok=True)
            if call["do"] == "artifact":
                copy = Path(uuid.uuid4().hex, Path(call["file"]).name)
                (box / copy).parent.mkdir()
                shutil.copyfile(call["file"], box / copy)
                call = {**call, "file": str(copy)}
            with (box / _CALLS).open("a+b") as calls:
                # A writer that was killed may have left half a line; the next call starts a new one.
                torn = calls.tell() > 0 and os.pread(calls.fileno(), 1, calls.tell() - 1) != b"\n"
                calls.write(b"\n" * torn + json.dumps(call).encode() + b"\n")
                calls.flush()
                os.fsync(calls.fileno())

    def deliver(self, client: Any, run_id: str) -> None:
        """Make a run's calls in order, and delete them once the server has taken all."""
        box = self.folder / run_id
        with locked(self.folder):
            for call in _read(box / _CALLS):
                make(client, run_id, {**call, "file": str(box / call["file"])} if "file" in call else call)
            (box / _CALLS).unlink(missing_ok=True)  # first: without it, the other files mean nothing
            shutil.rmtree(box, ignore_errors=True)

    def deliver_all(self, client: Any, uri: str) -> None:
        """Deliver what waits to the server at ``uri`` and report it; what the server does not take stays here."""
        run_ids, left = self.run_ids(), {}
        for run_id in run_ids:
            try:
                self.deliver(client, run_id)
            except Exception as error:
                left[run_id] = one_line(error, 200)
        if delivered := len(run_ids) - len(left):
            say(f"sent the pending writes of {delivered} run{'s' * (delivered > 1)} to MLflow at {uri}")
        for run_id, reason in left.items():
            rejected = f"MLflow at {uri} rejected these writes ({reason})"
            say(f"{self.folder / run_id}: {rejected}; they stay here and the next command retries")


def send(uri: str, client: Any, run_id: str, call: Call, outbox: Path | None, patience_s: float) -> None:
    """Make a call, or keep it in the outbox when the server stays away for longer than ``patience_s``.

    While calls of the run are waiting, new ones queue behind them; all are tried again every ``patience_s`` and at the
    run's end.

    Raises:
        TrackingError: the server refuses the call, or is away and there is no outbox.
    """
    box = None if outbox is None else Outbox(outbox)
    if box is None or not box.holds(run_id):
        try:
            if answers(uri, patience_s):
                return make(client, run_id, call)
        except Exception as error:
            if not is_away(error):
                raise TrackingError(
                    f"MLflow at {uri} refuses {call['do']} of run {run_id} ({one_line(error, 300)})"
                ) from error
        if box is None:
            raise TrackingError(f"MLflow at {uri} did not take {call['do']} of run {run_id}: it does not answer")
        say(f"MLflow at {uri} does not answer; buffering run {run_id} in {box.folder}")
        _tried_at_s[run_id] = time.monotonic()
    box.append(run_id, call)
    if call["do"] == "end" or time.monotonic() >= _tried_at_s.get(run_id, -math.inf) + patience_s:
        _deliver(box, uri, client, run_id)


def _deliver(box: Outbox, uri: str, client: Any, run_id: str) -> None:
    reason = "it does not answer"
    if healthy(uri, _GLANCE_S):
        try:
            box.deliver(client, run_id)
        except Exception as error:
            reason = one_line(error, 200)
        else:
            say(f"MLflow at {uri} answers again and has what run {run_id} wrote meanwhile")
            return
    _tried_at_s[run_id] = time.monotonic()
    say(f"MLflow at {uri} did not accept what run {run_id} wrote ({reason}); it is kept in {box.folder}")


def answers(uri: str, patience_s: float) -> bool:
    """Whether a server answers at ``uri`` within ``patience_s``."""
    if healthy(uri):
        return True
    if patience_s:
        say(f"MLflow at {uri} does not answer; trying again for {patience_s:.0f} s")
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        time.sleep(_SECONDS_BETWEEN_TRIES)
        if healthy(uri):
            return True
    return False


def is_away(error: Exception) -> bool:
    """Whether a call failed because the server or its database is away, not because the call was wrong."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return error.error_code in _AWAY
    if isinstance(error, RequestException):  # raised by transfers of artifacts
        return error.response is None or error.response.status_code >= 500
    return False


def make(client: Any, run_id: str, call: Call) -> None:
    """Make one call; making it again changes nothing.

    ``do`` says which: ``metrics`` (``rows`` of key, value, time in ms, step), ``params``, ``tags``, ``artifact``
    (``file``, ``folder``), ``dataset`` (``name``, ``digest``, ``source``, ``context``), ``end`` (``status``,
    ``time_ms``).
    """
    from mlflow import entities

    if call["do"] == "metrics":
        metrics = [entities.Metric(*row) for row in call["rows"]]
        for batch in _batches(metrics, METRICS_PER_BATCH):
            client.log_batch(run_id, metrics=batch)
    elif call["do"] == "params":
        known, given = client.get_run(run_id).data.params, call["params"]
        new = [entities.Param(key, value) for key, value in given.items() if key not in known]
        for batch in _batches(new, PARAMS_PER_BATCH):
            client.log_batch(run_id, params=batch)
        other = {f"resumed.{key}": value for key, value in given.items() if known.get(key, value) != value}
        make(client, run_id, {"do": "tags", "tags": other})
    elif call["do"] == "tags":
        for batch in _batches([entities.RunTag(*tag) for tag in call["tags"].items()], PARAMS_PER_BATCH):
            client.log_batch(run_id, tags=batch)
    elif call["do"] == "artifact":
        client.log_artifact(run_id, call["file"], call["folder"])
    elif call["do"] == "dataset":
        source = json.dumps({"uri": call["source"]})
        dataset = entities.Dataset(call["name"], call["digest"], source_type="local", source=source)
        tags = [entities.InputTag("mlflow.data.context", call["context"])]
        _log_dataset(client, run_id, entities.DatasetInput(dataset, tags))
    else:
        assert call["do"] == "end", call
        client.set_terminated(run_id, call["status"], call["time_ms"])


def _log_dataset(client: Any, run_id: str, dataset: Any) -> None:
    """Log a dataset; again where another run logged it first at the same moment, and MLflow would insert it twice."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_inputs(run_id, datasets=[dataset])
    except MlflowException as error:
        if not any(name in str(error) for name in _IS_THERE):
            raise
        client.log_inputs(run_id, datasets=[dataset])


def _batches(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _read(path: Path) -> Iterator[Call]:
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError:  # half a line of a writer that was killed
            continue
