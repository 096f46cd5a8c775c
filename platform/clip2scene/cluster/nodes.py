"""Several Ray nodes on this machine, listening on 127.0.0.1 only: ``python -m clip2scene.cluster.nodes``.

:mod:`clip2scene.cluster.up` runs it under the watchdog, with the token and the users' passwords in its environment. It
answers with one line of JSON on stdout when all nodes are up, and runs until SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from clip2scene.machine import HOST

ONLY_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for laptops with firewalls: a node's address is 127.0.0.1, and Ray's servers listen only there. Without
it they listen on every interface, whatever address they are given."""
NO_METRICS_PORTS = {
    "RAY_enable_metrics_collection": "0",
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
"""Closes the metrics ports, which answer without a token. The autoscaler's and the dashboard's have no switch: with an
invalid port, each logs an error and goes on without."""
_OBJECT_STORE_SHARE = 0.3
_REAP_EVERY_S = 1.0
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the nodes, print their address, and wait."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cpus-per-node", type=int, required=True)
    parser.add_argument("--dashboard-port", type=int, required=True)
    parser.add_argument("--folder", required=True)
    options = parser.parse_args(arguments)
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray or torch print is for the log
    os.environ |= ONLY_THIS_MACHINE | NO_METRICS_PORTS
    os.environ["RAY_TMPDIR"] = options.folder  # where Cluster writes its address, for its own jobs only
    (Path(options.folder) / "ray").mkdir(exist_ok=True)
    with answer:
        answer.write(f"{json.dumps(_start(options))}\n")
    # Jobs have their own sessions and outlive their node; as subreaper, this process becomes their parent when it dies.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray's own would wait for jobs to end
    try:
        _reap_orphans()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_everything()
        shutil.rmtree(options.folder, ignore_errors=True)  # the process that made it may have been killed
    return 0


def _reap_orphans() -> NoReturn:
    """Wait for processes that become children of this one because their parent has died; Ray waits for its own."""
    import psutil

    this = psutil.Process()
    own = set(this.children())
    while True:
        time.sleep(_REAP_EVERY_S)
        for process in set(this.children()) - own:
            # A worker without its raylet would end when init becomes its parent, but here this process does.
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::"):
                    process.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def _end_everything() -> None:
    import psutil

    while family := psutil.Process().children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)


def _start(options: argparse.Namespace) -> dict[str, str]:
    """Start all nodes; returns the addresses of the cluster and its dashboard."""
    import psutil
    import torch
    from ray._private.utils import write_ray_address
    from ray.cluster_utils import Cluster

    folders = [str(Path(options.folder) / str(number)) for number in range(1, options.nodes + 1)]
    node: dict[str, Any] = {
        "node_ip_address": HOST,
        "num_cpus": options.cpus_per_node,
        "object_store_memory": int(_OBJECT_STORE_SHARE * psutil.virtual_memory().available / options.nodes),
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            **node,
            "temp_dir": folders[0],
            "num_gpus": torch.cuda.device_count(),  # on one node only, or Ray would lend each GPU twice
            "include_dashboard": True,
            "dashboard_host": HOST,
            "dashboard_port": options.dashboard_port,
            "dashboard_agent_listen_port": None,  # any free one, so that a second cluster can start jobs
        },
    )
    for folder in folders[1:]:
        cluster.add_node(**node, temp_dir=folder)  # in a shared folder, nodes delete the code of each other's jobs
    for folder in folders:
        write_ray_address(cluster.address, folder)  # else a job connects to any Ray on this machine
    return {"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}


if __name__ == "__main__":
    sys.exit(main())
