"""The CPUs that a process has, and how torch uses them where it trains or encodes."""

from __future__ import annotations

import os
from pathlib import Path

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's own switch, read when a tensor of megabytes is first made: Linux then gives 2 MiB pages, not 512 of 4 KiB."""
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def num_cpus() -> int:
    """CPUs that this process may use: of a container or a SLURM step those that it was given, not the machine's."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no container, or one of the first version of cgroups
        return mine
    return mine if quota == "max" else max(min(mine, int(quota) // int(period)), 1)


def use_threads(threads: int) -> None:
    """Compute with that many threads, but no more than there are CPUs, and take large tensors from huge pages.

    Threads that wait for each other on the same CPU make a step tens of times slower: ViT-B/16 took 7 s an image with
    four on two busy CPUs, and 0.5 s with one (2026-11-26). Huge pages (unless the environment says no): a step makes
    and drops hundreds of megabytes, and every small page costs a fault; with ViT-B/16 encoding is a tenth faster
    without them, a student's step some percent (two cores, 2026-11-25).
    """
    import torch

    os.environ.setdefault(HUGE_PAGES, "1")
    torch.set_num_threads(min(threads, num_cpus()))
