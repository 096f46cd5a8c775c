"""The thin wrapper around MLflow: experiments, nested runs, and handles that any process can write through.

Only ``MlflowClient`` is used, never the fluent API's global state, so that threads, several runs at once and Ray
workers are all alike. A :class:`Run` is two strings: it pickles, and each process makes its own client. mlflow is
imported when it is first needed, because importing it takes seconds.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip2scene.config import ConfigError
from clip2scene.tracking.errors import TrackingError
from clip2scene.tracking.provenance import git_revision, origin_tags
from clip2scene.tracking.server import healthy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "Tracker", "connect", "flatten", "git_revision"]

SYSTEM_METRICS_INTERVAL_S = 5.0
MAX_PARAM_CHARACTERS = 6000
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else the UI opens on its pages for language models
    "mlflow.note.content": "CLIP2Scene: a LiDAR network taught by CLIP without labels. "
    "A run per pipeline, one below it per stage; the scores are in the pipeline's run.",
}


@dataclass(frozen=True)
class Run:
    """Handle of one MLflow run; picklable, and safe to write through from several processes and threads at once."""

    uri: str
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep the values of one step (an epoch) in one request.

        NaN is kept as such (an absent class). MLflow would draw an infinity as 1.8e308 and flatten the chart, so it is
        kept as NaN too.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entries = [
            Metric(name, float(value) if math.isfinite(value) else math.nan, now_ms, step)
            for name, value in metrics.items()
        ]
        for start in range(0, len(entries), _METRICS_A_BATCH):
            client_of(self.uri).log_batch(self.run_id, metrics=entries[start : start + _METRICS_A_BATCH])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep parameters, flat or nested (see :func:`flatten`), each once.

        A parameter never changes in MLflow. Where a resumed run brings another value, the first stays and the new one
        becomes the tag ``resumed.KEY``.

        Raises:
            ConfigError: a value is too long for MLflow, which would cut it silently.
        """
        from mlflow.entities import Param

        flat = flatten(params)
        for key, value in flat.items():
            if len(value) > MAX_PARAM_CHARACTERS:
                raise ConfigError(
                    f"{key}: {len(value)} characters; MLflow keeps at most {MAX_PARAM_CHARACTERS} of a value"
                )
        known = client_of(self.uri).get_run(self.run_id).data.params
        entries = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(entries), _PARAMS_A_BATCH):
            client_of(self.uri).log_batch(self.run_id, params=entries[start : start + _PARAMS_A_BATCH])
        self.set_tags({f"resumed.{key}": value for key, value in flat.items() if known.get(key, value) != value})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        from mlflow.entities import RunTag

        entries = [RunTag(key, str(value)) for key, value in tags.items()]
        for start in range(0, len(entries), _PARAMS_A_BATCH):
            client_of(self.uri).log_batch(self.run_id, tags=entries[start : start + _PARAMS_A_BATCH])

    def log_figure(self, figure: Figure, path: str) -> None:
        """Keep a matplotlib figure as the artifact ``path`` (``figures/birds_eye.png``)."""
        client_of(self.uri).log_figure(self.run_id, figure, path)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a local file, below the artifact folder ``folder`` when given."""
        client_of(self.uri).log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, path: str) -> None:
        """Keep a text as the artifact ``path``."""
        client_of(self.uri).log_text(self.run_id, text, path)

    def log_dict(self, values: Mapping[str, Any], path: str) -> None:
        """Keep a mapping as the artifact ``path``, JSON or YAML by its ending."""
        client_of(self.uri).log_dict(self.run_id, dict(values), path)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Say which data the run read.

        Args:
            name: For people (``nuscenes v1.0-mini``).
            digest: Hash of the contents, at most 36 characters.
            source: Folder or URI it lies at.
            context: What for (``teacher features``, ``training``, ``evaluation``).
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        where = json.dumps({"uri": str(source)})
        dataset = Dataset(name=name, digest=digest, source_type="local", source=where)
        tags = [InputTag("mlflow.data.context", context)]
        client_of(self.uri).log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])


@dataclass(frozen=True)
class Tracker:
    """One experiment on one MLflow server; picklable."""

    uri: str
    experiment_id: str

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
        """Open a run for the length of a block: FINISHED at its end, FAILED on an exception, KILLED on Ctrl-C.

        Args:
            name: Shown in the UI.
            parent: The run that this one is listed below.
            run_id: Continue that run, with its parameters and metrics.
            tags: Searchable words about the run; ``mlflow.note.content`` is its description in the UI (Markdown).
            params: Settings, flat or nested.
            system_metrics: Keep the CPU, memory and GPU use of this machine meanwhile.

        Raises:
            TrackingError: ``run_id`` is not a run of this experiment.
            ConfigError: a parameter is too long.
        """
        client = client_of(self.uri)
        if run_id is None:
            given = {**origin_tags(), **(tags or {})}
            if parent is not None:
                given["mlflow.parentRunId"] = parent.run_id
            run_id = client.create_run(self.experiment_id, run_name=name, tags=given).info.run_id
        else:
            self._reopen(run_id)
            Run(self.uri, run_id).set_tags(tags or {})
        run = Run(self.uri, run_id)
        status, monitor = "FAILED", None
        try:
            if params:
                run.log_params(params)
            monitor = _start_monitor(run) if system_metrics else None
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except BaseException as error:
            with suppress(Exception):  # the first error is the one to tell
                run.set_tags({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]})
            raise
        finally:
            if monitor is not None:
                monitor.finish()
            try:
                client.set_terminated(run_id, status)
            except Exception as error:
                if status == "FINISHED":
                    raise TrackingError(
                        f"MLflow at {self.uri} did not take the end of run {name!r} ({error})"
                    ) from error

    def find_run(self, tags: Mapping[str, str]) -> str | None:
        """Id of the latest run that carries all these tags, or None; how a stage finds the run that it continues.

        Values are digests and names, without quotation marks.
        """
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        order = ["attributes.start_time DESC"]
        runs = client_of(self.uri).search_runs([self.experiment_id], text, max_results=1, order_by=order)
        return runs[0].info.run_id if runs else None

    def url(self, run: Run | None = None) -> str:
        """Address of the experiment, or of one of its runs, in the UI."""
        page = f"{self.uri}/#/experiments/{self.experiment_id}/runs"
        page = page if run is None else f"{page}/{run.run_id}"
        return f"{page}?workflowType=machine_learning"  # else the UI shows its menus for language models

    def _reopen(self, run_id: str) -> None:
        from mlflow.exceptions import MlflowException

        client = client_of(self.uri)
        try:
            known = client.get_run(run_id)
        except MlflowException as error:
            raise TrackingError(f"MLflow at {self.uri} knows no run {run_id!r}") from error
        if known.info.experiment_id != self.experiment_id or known.info.lifecycle_stage != "active":
            raise TrackingError(f"run {run_id!r} was deleted or belongs to another experiment; it cannot be continued")
        client.update_run(run_id, status="RUNNING")
        if "error" in known.data.tags:
            client.delete_tag(run_id, "error")


def connect(uri: str, experiment: str) -> Tracker:
    """The tracker of an experiment, which is made when it does not exist; safe when many processes do so at once.

    Raises:
        ConfigError: ``uri`` is no server's address, or the experiment was deleted.
        TrackingError: nothing answers there.
    """
    if not uri.startswith(("http://", "https://")):
        raise ConfigError(f"tracking URI {uri!r}: must be the address of an MLflow server, http://HOST:PORT")
    uri = uri.rstrip("/")
    if not healthy(uri):
        raise TrackingError(f"no MLflow server answers at {uri}")
    from mlflow.exceptions import MlflowException

    client = client_of(uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            try:
                return Tracker(uri, client.create_experiment(experiment, tags=_EXPERIMENT_TAGS))
            except MlflowException as error:  # another process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(experiment)
    except MlflowException as error:
        reason = " ".join(str(error).split())[:200]
        raise TrackingError(f"MLflow at {uri} refuses the experiment {experiment!r} ({reason})") from error
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"the experiment {experiment!r} was deleted from MLflow; restore it there or choose another name"
        )
    return Tracker(uri, found.experiment_id)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted parameters: ``{"stcr": {"grid_size_m": 0.5}}`` to ``{"stcr.grid_size_m": "0.5"}``.

    Strings stay as they are; everything else is JSON (``true``, ``null``, ``[1, 2]``).
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


@functools.cache
def client_of(uri: str) -> Any:
    """MLflow's client of a server, one a process."""
    # MLflow's own retries, but a minute or so in all instead of many; the user's settings win.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _start_monitor(run: Run) -> Any:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)
    monitor = SystemMetricsMonitor(
        run.run_id, sampling_interval=SYSTEM_METRICS_INTERVAL_S, resume_logging=True, tracking_uri=run.uri
    )
    monitor.start()
    return monitor
