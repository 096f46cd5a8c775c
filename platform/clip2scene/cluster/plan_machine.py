"""The machine or cluster of a plan: this machine, one that is only described, or the cluster at an address."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from clip2scene.machine import num_cpus, workers_on
from clip2scene.storage import folder_of


@dataclass(frozen=True)
class Machine:
    """The resources of a machine or a cluster."""

    name: str
    """For messages."""
    nodes: tuple[dict[str, float], ...]
    """``CPU`` and ``GPU`` of each node."""
    grows: bool
    """Whether it runs an embedded Ray, which is told that it has as many CPUs as the workers want."""
    memory_bytes: int | None = None
    """Of a node; None if unknown."""
    gpu_memory_bytes: int | None = None
    """Of its smallest GPU; None if unknown, or without one."""
    is_here: bool = False
    """Whether its disk is this machine's."""

    @property
    def cpus(self) -> float:
        """Of all nodes."""
        return sum(node.get("CPU", 0) for node in self.nodes)

    @property
    def gpus(self) -> float:
        """Of all nodes."""
        return sum(node.get("GPU", 0) for node in self.nodes)

    def nodes_for(self, num_workers: int) -> Sequence[dict[str, float]]:
        """The nodes as Ray counts them for that many training workers."""
        if not self.grows:
            return self.nodes
        return [{**node, "CPU": max(node.get("CPU", 0), num_workers)} for node in self.nodes]

    def at_work(self, workers: int, threads: int, gpus_per_worker: float) -> int:
        """How many of the workers have cores or a GPU at a time; all of them if there is no GPU to count."""
        if gpus_per_worker:
            fit = sum(workers_on(node, gpus=gpus_per_worker) for node in self.nodes)
            return int(min(workers, fit)) or workers
        return max(min(workers, int(self.cpus // threads)), 1)


def this_machine() -> Machine:
    """This machine's cores, GPUs and memory."""
    import psutil
    import torch

    num_gpus = torch.cuda.device_count()
    return Machine(
        "this machine",
        ({"CPU": float(num_cpus()), "GPU": float(num_gpus)},),
        grows=True,
        memory_bytes=psutil.virtual_memory().total,
        gpu_memory_bytes=min(
            (torch.cuda.get_device_properties(gpu).total_memory for gpu in range(num_gpus)), default=None
        ),
        is_here=True,
    )


def machine_of(cpus: int | None, gpus: int | None) -> Machine:
    """A machine that need not exist; what is not given is as on this machine."""
    here = this_machine().nodes[0]
    node = {
        "CPU": here["CPU"] if cpus is None else float(cpus),
        "GPU": here["GPU"] if gpus is None else float(gpus),
    }
    return Machine("a machine as described", (node,), grows=True)


def cluster_at(address: str) -> Machine:
    """The nodes of a running Ray cluster, from the dashboard that ``clip2scene submit`` uses.

    Args:
        address: of its dashboard, ``http://HOST:8265``.

    Raises:
        ClusterError: nothing answers there, or it requires another token.
    """
    from clip2scene.cluster.jobs import Jobs

    jobs = Jobs(address)
    nodes = tuple(dict(node.resources_total) for node in jobs.nodes())
    return Machine(jobs.address, nodes, grows=False)


def free_bytes(storage: str) -> int:
    """Free space on the disk of a storage folder, which need not exist yet."""
    path = folder_of(storage)
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    return shutil.disk_usage(there).free
