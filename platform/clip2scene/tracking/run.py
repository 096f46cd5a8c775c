"""A handle that any process can write to an MLflow run with, and MLflow's client behind it."""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clip2scene.config import Job
from clip2scene.errors import ConfigError
from clip2scene.tracking.outbox import send

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PARAM_CHARACTERS = 6000
PATIENCE_S = 60.0
_GROUPS = {
    "streetworld": ("dataset",),
    "index": ("dataset",),
    "extract": ("dataset", "teacher", "extract"),
    "distill": ("dataset", "teacher", "prompts", "student", "distill", "resources"),
    "evaluate": ("dataset", "prompts", "student", "distill"),
    "finetune": ("dataset", "student", "finetune", "resources"),
    "predict": ("dataset", "prompts", "student", "predict"),
}


@dataclass(frozen=True)
class Run:
    """Handle of one MLflow run; picklable, and safe to write through from several processes and threads at once.

    A write waits for a server that is away, and goes to the outbox when the server stays away; without an outbox it
    raises :class:`TrackingError`.
    """

    uri: str
    run_id: str
    outbox: Path | None = None
    """Folder that keeps what the server does not take; see :mod:`clip2scene.tracking.outbox`."""
    patience_s: float = PATIENCE_S
    """How long a write waits for the server."""
    name: str = ""
    """As in the UI."""

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Keep the values of one step (an epoch), in one request.

        NaN is kept (an absent class). Infinity is kept as NaN too, because MLflow would draw it as 1.8e308 and flatten
        the chart.
        """
        rows = [
            (name, float(value) if math.isfinite(value) else math.nan, _now_ms(), int(step))
            for name, value in metrics.items()
        ]
        self._send({"do": "metrics", "rows": rows})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Keep parameters, flat or nested (see :func:`flatten`), each once.

        A parameter never changes in MLflow: when a resumed run has another value, the first stays and the new one
        becomes the tag ``resumed.KEY``.

        Raises:
            ConfigError: a value is too long for MLflow, which would cut it silently.
        """
        flat = flatten(params)
        for key, value in flat.items():
            if len(value) > MAX_PARAM_CHARACTERS:
                raise ConfigError(
                    f"{key}: {len(value)} characters; MLflow keeps at most {MAX_PARAM_CHARACTERS} of a value"
                )
        self._send({"do": "params", "params": flat})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._send({"do": "tags", "tags": {key: str(value) for key, value in tags.items()}})

    def log_figure(self, figure: Figure, path: str) -> None:
        """Keep a matplotlib figure as the artifact ``path`` (``figures/birds_eye.png``)."""
        with self._artifact(path) as file:
            figure.savefig(file)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a local file, below the artifact folder ``folder`` when given."""
        self._send({"do": "artifact", "file": str(path), "folder": folder})

    def log_text(self, text: str, path: str) -> None:
        """Keep a text as the artifact ``path``."""
        with self._artifact(path) as file:
            file.write_text(text, encoding="utf-8")

    def log_dict(self, values: Mapping[str, Any], path: str) -> None:
        """Keep a mapping as the artifact ``path``, as JSON."""
        self.log_text(json.dumps(dict(values), indent=2, default=str), path)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record which data the run read.

        Args:
            name: a readable name (``nuscenes v1.0-mini``).
            digest: hash of the contents, at most 36 characters.
            source: folder or URI of the data.
            context: its use (``teacher features``, ``training``, ``evaluation``).
        """
        self._send({"do": "dataset", "name": name, "digest": digest, "source": str(source), "context": context})

    @contextmanager
    def _artifact(self, path: str) -> Iterator[Path]:
        """A file to write, which then becomes the artifact ``path``."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            yield file
            parent = Path(path).parent.as_posix()
            self.log_artifact(file, None if parent == "." else parent)

    def end(self, status: str) -> None:
        """Close the run as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._send({"do": "end", "status": status, "time_ms": _now_ms()})

    def _send(self, call: dict[str, Any]) -> None:
        send(self.uri, client_of(self.uri), self.run_id, call, self.outbox, self.patience_s)


def params_of(job: Job, stage: str) -> dict[str, Any]:
    """The seed and the groups of settings that a stage depends on, so that its runs compare side by side."""
    settings = job.model_dump(mode="json", by_alias=True)
    return {"seed": job.seed} | {group: settings[group] for group in _GROUPS[stage]}


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
    """MLflow's client of a server, one per process."""
    # MLflow's own retries, but for about a minute in all instead of many; the user's settings win.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _now_ms() -> int:
    return int(time.time() * 1000)
