"""How many trials may run at once, so that none waits forever for workers that another one holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clip2scene.errors import ConfigError
from clip2scene.machine import jobs_on
from clip2scene.sweeps.space import TrialResources


def trial_slots(nodes: Iterable[Mapping[str, float]], resources: TrialResources) -> int:
    """Return how many trials fit at once.

    A trial's own process reserves no CPU if its workers do: otherwise Tune would start as many processes as there are
    CPUs, and none would be left for workers. So the number follows from the workers that fit on all nodes together.

    Args:
        nodes: ``CPU`` and ``GPU`` of each node.
        resources: what each trial gets.

    Raises:
        ConfigError: not even one fits.
    """
    nodes = [dict(node) for node in nodes]
    fit = jobs_on(nodes, resources)
    if fit < 1:
        gpus = f" and {resources.gpus_per_worker:g} GPUs" if resources.gpus_per_worker else ""
        wanted = f"{resources.num_workers} workers with 1 CPU{gpus} each"
        if resources.num_workers == 0:
            wanted = f"{resources.threads_per_worker} CPUs on one node"
        cpus, gpus_there = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise ConfigError(
            f"resources: a trial needs {wanted}, and Ray has {cpus:g} CPUs and {gpus_there:g} GPUs on "
            f"{len(nodes)} nodes; lower resources.num_workers, threads_per_worker or gpus_per_worker"
        )
    return fit
