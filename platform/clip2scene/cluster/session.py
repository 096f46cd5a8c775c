"""A Ray session for the length of a block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from clip2scene.config import ConfigError, Job


@contextmanager
def ray_session(job: Job, address: str | None = None) -> Iterator[None]:
    """Connect to a cluster, or start Ray in this process's machine alone and stop it afterwards.

    Args:
        job: whose workers must fit; an embedded Ray is told that it has as many CPUs as they want, because a small
            machine is better slow than refused.
        address: of a cluster (``auto``, ``host:port``, ``ray://host:port``); None starts an embedded Ray.

    Raises:
        ConfigError: no cluster answers at the address.
    """
    # Without this a report() of a training worker waits one to two seconds for the controller's next look.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            wanted = max(job.resources.num_workers, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=wanted, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "here" if address is None else f"at {address}"
        raise ConfigError(f"Ray cannot be reached {where}: {' '.join(str(error).split())[:300]}") from error
    try:
        _check_gpus(job, ray.cluster_resources().get("GPU", 0))
        yield
    finally:
        ray.shutdown()


def _check_gpus(job: Job, available: float) -> None:
    """Refuse what could never be scheduled: Ray would wait for it for ever."""
    wanted = job.resources.num_workers * job.resources.gpus_per_worker
    if wanted > available:
        raise ConfigError(
            f"resources.gpus_per_worker={job.resources.gpus_per_worker:g} with num_workers={job.resources.num_workers} "
            f"needs {wanted:g} GPUs and Ray has {available:g}; lower either, or set gpus_per_worker=0 for CPUs"
        )
