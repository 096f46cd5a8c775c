"""Several Ray nodes on this machine, listening on 127.0.0.1 only: ``python -m clip2scene.cluster.nodes``.

:mod:`clip2scene.cluster.up` runs it under the watchdog, with the token and the users' passwords in its environment. It
prints one line of JSON when all nodes are there, and lives until SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
ONLY_THIS_MACHINE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}
"""The first is Ray's switch for laptops, against questions of their firewalls: a node's address is 127.0.0.1, and with
that Ray's servers listen nowhere else. Without it they listen on every interface, whatever address they are given. The
second closes the ports for Prometheus, the only ones that answer everybody."""
_OBJECT_STORE_SHARE = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the nodes, say so, and wait."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--cpus-per-node", type=int, required=True)
    parser.add_argument("--dashboard-port", type=int, required=True)
    parser.add_argument("--folder", required=True)
    options = parser.parse_args(arguments)
    os.environ |= ONLY_THIS_MACHINE
    os.environ["RAY_TMPDIR"] = options.folder  # where Cluster notes its address, for nobody but its own jobs
    (Path(options.folder) / "ray").mkdir(exist_ok=True)
    cluster = _start(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray's own would wait for jobs to end
    try:
        signal.pause()
    finally:
        cluster.shutdown()
    return 0


def _start(options: argparse.Namespace) -> Any:
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
            "num_gpus": torch.cuda.device_count(),  # a GPU can be on one node only, or Ray would lend it twice
            "include_dashboard": True,
            "dashboard_host": HOST,
            "dashboard_port": options.dashboard_port,
            "dashboard_agent_listen_port": None,  # any, or a second cluster here could not start jobs
        },
    )
    for folder in folders[1:]:
        cluster.add_node(**node, temp_dir=folder)  # nodes that share a folder delete the code of each other's jobs
    for folder in folders:
        write_ray_address(cluster.address, folder)  # else a job is sent to whichever Ray runs on this machine
    print(json.dumps({"address": cluster.address, "dashboard": f"http://{cluster.webui_url}"}), flush=True)
    return cluster


if __name__ == "__main__":
    sys.exit(main())
