"""CPUs, threads and GPUs: what this process may use, and how many workers fit on a machine's nodes."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from clip2scene.config import ExtractSettings, WorkerSettings
from clip2scene.errors import ConfigError

HOST = "127.0.0.1"
"""Where servers for this machine alone listen."""
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's own switch, read when the first tensor of megabytes is made: Linux then gives it 2 MiB pages, not 4 KiB."""
CPUS_PER_WORKER = 1
"""What Ray reserves for a training worker, however many threads it has."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_ROUNDING = 1e-9


def num_cpus() -> int:
    """CPUs that this process may use: those that its container or SLURM step was given, not all of the machine's."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no container, or cgroups of version 1
        return mine
    return mine if quota == "max" else max(min(mine, int(quota) // int(period)), 1)


def has_nvidia_driver() -> bool:
    """Whether CUDA can run here at all. Unlike torch's question, it does not fix which GPUs this process sees."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def description() -> str:
    """This machine in a few words, for reports."""
    return f"{num_cpus()} cores, {platform.machine()}, Python {platform.python_version()}"


def use_threads(threads: int) -> None:
    """Compute with that many threads, but at most one per CPU, and allocate large tensors in huge pages.

    Threads that wait for each other on one CPU make a step tens of times slower: ViT-B/16 took 7 s per image with four
    threads on two busy CPUs, and 0.5 s with one (2026-11-26). Huge pages (unless the environment disables them): a step
    allocates and frees hundreds of megabytes, and every small page costs a fault; encoding with ViT-B/16 is a tenth
    faster without those page faults, a student's step some percent (two cores, 2026-11-25).
    """
    import torch

    os.environ.setdefault(HUGE_PAGES, "1")
    torch.set_num_threads(min(threads, num_cpus()))


def ray_nodes() -> list[dict[str, float]]:
    """What each living node of the Ray that this process is connected to has (``{"CPU": 8.0, "GPU": 1.0}``)."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def workers_on(node: Mapping[str, float], *, cpus: float = 0.0, gpus: float = 0.0) -> float:
    """How many workers fit on a node, each with that many of its CPUs and GPUs; infinite where neither is wanted.

    A worker with a fraction of a GPU gets it from one GPU, as in Ray.

    Args:
        node: what there is (``{"CPU": 8.0, "GPU": 1.0}``).
        cpus: per worker.
        gpus: per worker.
    """
    fit = [math.inf]
    if cpus:
        fit.append(math.floor(node.get("CPU", 0) / cpus + _ROUNDING))
    if 0 < gpus < 1:
        fit.append(int(node.get("GPU", 0)) * math.floor(1 / gpus + _ROUNDING))
    elif gpus:
        fit.append(math.floor(node.get("GPU", 0) / gpus))
    return min(fit)


def jobs_on(nodes: Iterable[Mapping[str, float]], resources: WorkerSettings) -> int:
    """How many jobs with these workers fit on the nodes at once; a job without workers takes its threads as CPUs."""
    if resources.num_workers == 0:
        return int(sum(workers_on(node, cpus=resources.threads_per_worker) for node in nodes))
    workers = sum(workers_on(node, cpus=CPUS_PER_WORKER, gpus=resources.gpus_per_worker) for node in nodes)
    return int(workers) // resources.num_workers


def check_room(
    nodes: Sequence[Mapping[str, float]],
    count: int,
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    settings: str,
    place: str = "Ray",
) -> None:
    """Refuse workers that could never be scheduled: Ray would wait for ever.

    Args:
        nodes: see :func:`workers_on`.
        count: workers that are wanted at the same time.
        cpus: per worker.
        gpus: per worker.
        settings: which of them ask for this, for the message.
        place: where the nodes are, for the message.

    Raises:
        ConfigError: not all of them fit.
    """
    room = sum(workers_on(node, cpus=cpus, gpus=gpus) for node in nodes)
    if room < count:
        each = " and ".join([*([f"{cpus:g} CPU"] if cpus else []), *([f"{gpus:g} GPUs"] if gpus else [])])
        there = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "none"
        raise ConfigError(
            f"{settings}: with {each} each there is room for {room:g}; lower one of them (nodes of {place}: {there})"
        )


def check_actors(
    nodes: Sequence[Mapping[str, float]], settings: ExtractSettings, actors: int, *, place: str = "Ray"
) -> None:
    """As :func:`check_room`, for that many extraction actors."""
    asked = f"extract.num_actors={settings.num_actors} with extract.gpus_per_actor={settings.gpus_per_actor:g}"
    check_room(nodes, actors, gpus=settings.gpus_per_actor, settings=asked, place=place)
