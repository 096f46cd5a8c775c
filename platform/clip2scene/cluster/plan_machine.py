"""The machine or cluster that a plan is for: this one, one that is only described, or the one at an address."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip2scene.machine import num_cpus, workers_on


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    name: str
    """For sentences."""
    nodes: tuple[dict[str, float], ...]
    """``CPU`` and ``GPU`` of each node."""
    grows: bool
    """One machine with an embedded Ray, which is told that it has as many CPUs as the workers want."""
    memory_bytes: int | None = None
    """Of a node, where it is known."""
    is_here: bool = False
    """Its disk is this machine's."""

    @property
    def cpus(self) -> float:
        """Of all nodes."""
        return sum(node.get("CPU", 0) for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Of all nodes."""
        return sum(node.get("GPU", 0) for node in self.nodes)

    def nodes_for(self, num_workers: int) -> Sequence[dict[str, float]]:
        """What Ray counts with, where so many training workers are wanted."""
        if not self.grows:
            return self.nodes
        return [{**node, "CPU": max(node.get("CPU", 0), num_workers)} for node in self.nodes]

    def at_work(self, workers: int, threads: int, gpus_per_worker: float) -> int:
        """How many of the workers find cores or a GPU at a time; all of them where there is no GPU at all to count."""
        if gpus_per_worker:
            fit = sum(workers_on(node, gpus=gpus_per_worker) for node in self.nodes)
            return int(min(workers, fit)) or workers
        return max(min(workers, int(self.cpus // threads)), 1)


def this_machine() -> Machine:
    """This machine's cores, GPUs and memory."""
    import psutil
    import torch

    node = {"CPU": float(num_cpus()), "GPU": float(torch.cuda.device_count())}
    return Machine("this machine", (node,), grows=True, memory_bytes=psutil.virtual_memory().total, is_here=True)


def machine_of(cpus: int | None, gpus: int | None) -> Machine:
    """One machine that need not be there; what is not given is this machine's."""
    here = this_machine().nodes[0]
    node = {
        "CPU": here["CPU"] if cpus is None else float(cpus),
        "GPU": here["GPU"] if gpus is None else float(gpus),
    }
    return Machine("a machine as described", (node,), grows=True)


def cluster_at(address: str) -> Machine:
    """The nodes of a running Ray cluster, as ``clip2scene submit`` asks for them.

    Args:
        address: of its dashboard, ``http://HOST:8265``.

    Raises:
        ClusterError: nothing answers there, or it wants another token.
    """
    from clip2scene.cluster.jobs import Jobs

    jobs = Jobs(address)
    nodes = tuple(dict(node.resources_total) for node in jobs.nodes())
    return Machine(jobs.address, nodes, grows=False)


def free_bytes(storage: str) -> int:
    """Of the disk that a storage folder lies or will lie on."""
    path = Path(storage).expanduser().resolve()
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(there).free
