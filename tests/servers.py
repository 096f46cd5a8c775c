"""Servers that a test may kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip2scene.tracking.run import client_of
from clip2scene.tracking.server import healthy
from clip2scene.tracking.tracker import Tracker
from commands import free_port, wait_until


class MlflowServer:
    """`mlflow server` on its own port; it does not outlive the tests."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._store = folder, store or f"sqlite:///{folder / 'mlflow.db'}"
        self._port = free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, unless it is running."""
        if self._process is not None and self._process.poll() is None:
            return
        command = [sys.executable, "-m", "clip2scene.tracking.watchdog", sys.executable, "-m", "mlflow", "server"]
        command += ["--backend-store-uri", self._store, "--artifacts-destination", str(self._folder / "artifacts")]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("CLIP2SCENE_TEST", None)  # the server belongs to the module, not to the test that restarts it
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        process = self._process
        wait_until(lambda: process.poll() is not None or healthy(self.uri, timeout_s=1), "MLflow answers")
        assert process.poll() is None, (self._folder / "server.log").read_text()[-2000:]

    def kill(self) -> None:
        """Send SIGKILL to all of its processes, if it is running."""
        assert self._process is not None
        if self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not healthy(self.uri, timeout_s=1), "MLflow is gone")

    def metrics(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of every row that the server keeps of a metric, in MLflow's order."""
        return [(metric.step, metric.value) for metric in client_of(self.uri).get_metric_history(run_id, key)]


def write_metrics(tracker: Tracker, writer: int, barrier: Any, names: Sequence[str], steps: int) -> None:
    """Write metrics in one of several processes that start at the same time."""
    barrier.wait(timeout=100)
    with tracker.run(f"writer {writer}", tags={"writer": str(writer)}, system_metrics=False) as run:
        run.log_params({"writer": writer})
        for step in range(steps):
            run.log_metrics(dict.fromkeys(names, writer + step / 1000), step=step)
