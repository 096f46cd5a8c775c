"""A cluster on this machine: several Ray nodes and an MLflow server, on 127.0.0.1, all with authentication."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip2scene.cluster.auth import AUTH_MODE, AUTH_TOKEN, AUTH_TOKEN_PATH, secret_file, write_private
from clip2scene.cluster.jobs import API_ADDRESS, RAY_ADDRESS
from clip2scene.cluster.nodes import ONLY_THIS_MACHINE
from clip2scene.errors import ClusterError, ConfigError
from clip2scene.machine import num_cpus
from clip2scene.paths import from_home
from clip2scene.tracking.server import Login, check_port, embedded_server, telling_line, until_interrupted
from clip2scene.tracking.watchdog import watched

USER = "clip2scene"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
MAX_NODES, MAX_CPUS = 16, 1024
MIN_CPUS = 2
"""A node has at least that many, even on a smaller machine: a small machine should run slowly rather than refuse."""


@dataclass(frozen=True)
class LocalCluster:
    """The addresses and files of a running cluster."""

    nodes: int
    cpus_per_node: int
    dashboard: str
    """Ray's dashboard and jobs, ``http://127.0.0.1:PORT``."""
    address: str
    """For ``clip2scene run --address``."""
    tracking_uri: str
    """MLflow."""
    environment: Path
    """File of mode 600 with the environment for a shell, secrets included."""
    token: Path
    process: subprocess.Popen[str]
    """The one that runs the nodes."""


@contextlib.contextmanager
def local_cluster(
    storage: str | Path, nodes: int, cpus_per_node: int | None, dashboard_port: int, tracking_port: int
) -> Iterator[LocalCluster]:
    """Run a cluster for the duration of the block; none of its processes outlives this one, however that ends.

    ``storage`` gets ``mlflow/`` with the runs (``clip2scene ui --storage`` shows them later), and ``cluster/`` with the
    token, MLflow's password and the log of Ray's start.

    Raises:
        ConfigError: a number is not allowed, a port is busy, or others can read a secret.
        ClusterError: Ray did not start.
        TrackingError: MLflow did not start.
    """
    _check_count("--nodes", nodes, MAX_NODES)
    cpus = max(MIN_CPUS, num_cpus() // nodes) if cpus_per_node is None else cpus_per_node
    _check_count("--cpus-per-node", cpus, MAX_CPUS)
    check_port(dashboard_port)
    root = from_home(storage).resolve()
    folder = root / "cluster"
    token, password = folder / "token", folder / "mlflow_password"
    secret_file(token)
    client = {
        AUTH_MODE: "token",
        AUTH_TOKEN_PATH: str(token),
        "MLFLOW_TRACKING_USERNAME": USER,
        "MLFLOW_TRACKING_PASSWORD": secret_file(password),
        **ONLY_THIS_MACHINE,
    }
    login = Login(USER, client["MLFLOW_TRACKING_PASSWORD"], folder / "mlflow_users")
    with contextlib.ExitStack() as stack:
        tracking_uri = stack.enter_context(embedded_server(root / "mlflow", tracking_port, login))
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="clip2scene-", ignore_cleanup_errors=True))
        command = ["--nodes", str(nodes), "--cpus-per-node", str(cpus)]
        command += ["--dashboard-port", str(dashboard_port), "--folder", temporary]
        process = stack.enter_context(_nodes(command, _environment(client), folder / "ray.log"))
        started = _wait_until_started(process, folder / "ray.log")
        client |= {API_ADDRESS: started["dashboard"], "MLFLOW_TRACKING_URI": tracking_uri}
        environment = folder / "environment"
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in client.items()]
        write_private(environment, "".join(lines))
        yield LocalCluster(
            nodes, cpus, started["dashboard"], started["address"], tracking_uri, environment, token, process
        )


def serve(storage: str, nodes: int, cpus_per_node: int | None, dashboard_port: int, tracking_port: int) -> None:
    """Run a cluster until Ctrl-C (or SIGTERM), and print its addresses; ``clip2scene up``.

    Raises:
        ClusterError: it ended by itself, or see :func:`local_cluster`.
    """
    with until_interrupted(), local_cluster(storage, nodes, cpus_per_node, dashboard_port, tracking_port) as cluster:
        print(
            f"Ray:     {cluster.dashboard} (dashboard, jobs), {cluster.address} (clip2scene run --address); "
            f"{cluster.nodes} nodes of {cluster.cpus_per_node} CPUs\n"
            f"MLflow:  {cluster.tracking_uri}\n"
            f"token:   {cluster.token} (mode 600)\n"
            f"In another shell:  . {shlex.quote(str(cluster.environment))}\n"
            "then, for example:  clip2scene submit jobs/demo.yaml\n"
            "Ctrl-C ends it.",
            flush=True,
        )
        cluster.process.wait()
        raise ClusterError(f"Ray ended ({telling_line(cluster.token.parent / 'ray.log')})")


def _check_count(option: str, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ConfigError(f"{option} {count}: not possible; allowed: 1 to {most}")


def _environment(client: dict[str, str]) -> dict[str, str]:
    """The environment of the nodes, and so of every job on them."""
    ours = {name: value for name, value in os.environ.items() if name not in (AUTH_TOKEN, API_ADDRESS, RAY_ADDRESS)}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**ours, **client, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def _nodes(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """The nodes' process under the watchdog; after the block none of its children is left."""
    import psutil

    command = [sys.executable, "-m", "clip2scene.cluster.nodes", *arguments]
    with log.open("wb") as output:
        process = watched(command, stdout=subprocess.PIPE, stderr=output, env=environment, text=True)
    try:
        yield process
    finally:
        family = _family(process.pid)
        assert process.stdin is not None
        process.stdin.close()  # the watchdog ends the nodes; their workers and jobs end with them
        _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def _family(pid: int) -> list[Any]:
    import psutil

    try:
        process = psutil.Process(pid)
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def _wait_until_started(process: subprocess.Popen[str], log: Path) -> dict[str, str]:
    assert process.stdout is not None
    answers, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
    line = process.stdout.readline() if answers else ""  # empty too when the process has ended
    if not line:
        raise ClusterError(f"Ray did not start: {telling_line(log)} (log: {log})")
    started: dict[str, str] = json.loads(line)
    return started
