"""The thin wrapper around MLflow: experiments, nested runs, and handles that any process can write through.

Only ``MlflowClient`` is used, never the fluent API's global state, so that threads, concurrent runs and Ray workers all
work alike. A :class:`Run` holds no connection: it pickles, and each process makes its own client. mlflow is imported
when it is first needed, because importing it takes seconds.
"""

from __future__ import annotations

import dataclasses
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.errors import ConfigError, TrackingError, one_line
from clip2scene.progress import say
from clip2scene.tracking.outbox import Outbox, answers, is_away
from clip2scene.tracking.provenance import HOST_TAG, is_gone, origin_tags, process_tags
from clip2scene.tracking.run import PATIENCE_S, Run, client_of
from clip2scene.tracking.server import answering, healthy

SYSTEM_METRICS_INTERVAL_S = 5.0
_OPENING_PATIENCES = 5
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # otherwise the UI opens on its pages for language models
    "mlflow.note.content": "CLIP2Scene: a LiDAR network taught by CLIP without labels. "
    "One run per pipeline, and below it one per stage; the scores are in the pipeline's run.",
}


@dataclass(frozen=True)
class Tracker:
    """One experiment on one MLflow server; picklable."""

    uri: str
    experiment_id: str
    outbox: Path | None = None
    """Folder that keeps what the server does not take of its runs."""
    patience_s: float = PATIENCE_S
    """How long a write waits for the server; opening a run waits longer, because it cannot be deferred."""

    @contextmanager
    def run(
        self,
        name: str,
        *,
        parent: Run | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        system_metrics: bool = True,
    ) -> Iterator[Run]:
        """Open a run for the length of a block: FINISHED at its end, FAILED on an exception, KILLED on Ctrl-C or exit.

        Args:
            name: shown in the UI.
            parent: the run that this one is listed below.
            run_id: continue that run, with its parameters and metrics.
            tags: searchable words about the run; ``mlflow.note.content`` is its description in the UI (Markdown).
            params: settings, flat or nested.
            system_metrics: record the use of this machine's CPU, memory and GPU. Values that cannot be delivered within
                a minute are dropped.

        Raises:
            TrackingError: ``run_id`` is not a run of this experiment, or the server is away and stays away.
            ConfigError: a parameter is too long.
        """
        run = self.open_run(name, parent, run_id, tags or {})
        status, error, monitor = "FINISHED", "", None
        try:
            if params:
                run.log_params(params)
            monitor = _start_monitor(run) if system_metrics else None
            yield run
        except (KeyboardInterrupt, SystemExit):  # the latter by Ray, whose workers get SIGTERM
            status = "KILLED"
            raise
        except BaseException as raised:
            status, error = "FAILED", f"{type(raised).__name__}: {raised}"
            raise
        finally:
            if monitor is not None and not self._holds(run):  # it would retry for minutes; it ends by itself
                monitor.finish()
            self.close_run(run, status, error)

    def open_run(self, name: str, parent: Run | None, run_id: str | None, tags: Mapping[str, str]) -> Run:
        """Open or continue a run until :meth:`close_run`; see :meth:`run`, which does both."""
        opened = self._create(name, parent, tags) if run_id is None else self._reopen(run_id)
        run = Run(self.uri, opened, self.outbox, self.patience_s, name)
        if run_id is not None:
            run.set_tags({**process_tags(), **tags})
        return run

    def close_run(self, run: Run, status: str = "FINISHED", error: str = "") -> None:
        """Close a run as ``FINISHED``, or at once, whether the server answers or not, as ``FAILED`` or ``KILLED``."""
        if status == "FINISHED":
            run.end(status)
        else:
            at_once = dataclasses.replace(run, patience_s=0.0)
            with suppress(Exception):  # what ended the run is the error to report
                if error:
                    at_once.set_tags({"error": one_line(error)})
            with suppress(Exception):
                at_once.end(status)
        if self._holds(run):
            what = f"what MLflow did not accept is kept in {self.outbox}; the next command delivers it"
            say(f"run {run.name!r}: {what}")

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run that has all these tags, or None; how a stage finds the run that it continues.

        Values must not contain quotation marks.

        Raises:
            TrackingError: the server is away and stays away.
        """
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        order = ["attributes.start_time DESC"]
        with self.reachable("look for a run") as client:
            runs = client.search_runs([self.experiment_id], text, max_results=1, order_by=order)
        return runs[0].info.run_id if runs else None

    def _holds(self, run: Run) -> bool:
        return self.outbox is not None and Outbox(self.outbox).holds(run.run_id)

    def _create(self, name: str, parent: Run | None, tags: Mapping[str, str]) -> str:
        given = {**origin_tags(), **process_tags(), **tags}
        if parent is not None:
            given["mlflow.parentRunId"] = parent.run_id
        with self.reachable(f"open the run {name!r}") as client:
            return str(client.create_run(self.experiment_id, run_name=name, tags=given).info.run_id)

    def _reopen(self, run_id: str) -> str:
        from mlflow.exceptions import MlflowException

        with self.reachable(f"continue the run {run_id!r}") as client:
            try:
                known = client.get_run(run_id)
            except MlflowException as error:
                if is_away(error):
                    raise
                raise TrackingError(f"MLflow at {self.uri} knows no run {run_id!r}") from error
            if known.info.experiment_id != self.experiment_id or known.info.lifecycle_stage != "active":
                raise TrackingError(
                    f"run {run_id!r} was deleted or belongs to another experiment; it cannot be continued"
                )
            client.update_run(run_id, status="RUNNING")
            if "error" in known.data.tags:
                client.delete_tag(run_id, "error")
        return run_id

    def close_below(self, run: Run) -> None:
        """Close the runs that are still open below a run: a process that was killed could not close its own.

        While the server is away they stay open, until the run is continued.
        """
        self._close(f"tags.`mlflow.parentRunId` = '{run.run_id}'")

    def close_lost(self) -> None:
        """Close the runs, and those below them, that this user's processes on this machine left open when they died."""
        self._close(f"tags.`{HOST_TAG}` = '{socket.gethostname()}'", is_gone)

    def _close(self, condition: str, is_left: Callable[[Mapping[str, str]], bool] = lambda tags: True) -> None:
        """Close the open runs that fulfil a condition and are left by their tags, and those below them."""
        from mlflow.exceptions import MlflowException

        if not healthy(self.uri):  # MLflow's client would retry for a minute
            return
        client = client_of(self.uri)
        open_ones = f"{condition} and attributes.status = 'RUNNING'"
        with suppress(MlflowException):  # the first error is the one to report
            for left in client.search_runs([self.experiment_id], open_ones, max_results=1000):
                if is_left(left.data.tags):
                    client.set_terminated(left.info.run_id, "KILLED")
                    self._close(f"tags.`mlflow.parentRunId` = '{left.info.run_id}'")

    @contextmanager
    def synced(self, purpose: str) -> Iterator[None]:
        """A block in which the server has all that runs wrote, the outbox included; raises as :meth:`reachable`."""
        with self.reachable(purpose) as client:
            if self.outbox is not None:
                Outbox(self.outbox).deliver_all(client, self.uri)
            yield

    @contextmanager
    def reachable(self, purpose: str) -> Iterator[Any]:
        """A block with a client for requests that cannot be deferred.

        Raises:
            TrackingError: the server is away and stays away; the sentence says that this process cannot ``purpose``.
        """
        from mlflow.exceptions import MlflowException

        away = (
            f"cannot {purpose}: MLflow at {self.uri} does not answer. Finished work is kept; run the same command to "
            "resume"
        )
        if not answers(self.uri, _OPENING_PATIENCES * self.patience_s):
            raise TrackingError(away)
        try:
            yield client_of(self.uri)
        except MlflowException as error:
            if not is_away(error):
                raise
            raise TrackingError(away) from error


def connect(uri: str, experiment: str, outbox: Path | None = None, patience_s: float = PATIENCE_S) -> Tracker:
    """The tracker of an experiment, which is created when it does not exist; safe for many processes at once.

    Args:
        uri: address of an MLflow server.
        experiment: name of the experiment.
        outbox: folder for what the server does not take. What an earlier command left there is delivered first.
        patience_s: how long a write waits for a server that is away.

    Raises:
        ConfigError: ``uri`` is not the address of a server, or the experiment was deleted.
        TrackingError: nothing answers there, or it refuses the experiment.
    """
    uri = answering(uri)
    client = client_of(uri)
    experiment_id = _experiment_id(uri, client, experiment)
    if outbox is not None:
        Outbox(outbox).deliver_all(client, uri)
    return Tracker(uri, experiment_id, outbox, patience_s)


def _experiment_id(uri: str, client: Any, experiment: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                return str(client.create_experiment(experiment, tags=_EXPERIMENT_TAGS))
            except MlflowException as error:  # another process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(experiment)
    except MlflowException as error:
        reason = one_line(error, 200)
        raise TrackingError(f"MLflow at {uri} refuses the experiment {experiment!r} ({reason})") from error
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"the experiment {experiment!r} was deleted from MLflow; restore it there or choose another name"
        )
    return str(found.experiment_id)


def _start_monitor(run: Run) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=SYSTEM_METRICS_INTERVAL_S, resume_logging=True, tracking_uri=run.uri
    )
    monitor.start()
    return monitor
