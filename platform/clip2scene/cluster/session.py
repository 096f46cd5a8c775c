"""A Ray session for the duration of a block."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from clip2scene.cluster.auth import AUTH_TOKEN_PATH, token_for_this_process, token_wanted, use_token
from clip2scene.cluster.nodes import NO_METRICS_PORTS, ONLY_THIS_MACHINE
from clip2scene.config import Job
from clip2scene.errors import ConfigError, one_line
from clip2scene.machine import CPUS_PER_WORKER, check_room, num_cpus, ray_nodes

TRAIN_POLLING = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
"""How often Ray Train polls its workers. Its default of 2 s is lost at each start and end; at 0.1 s polling takes a
fifth of a core."""


@contextmanager
def ray_session(job: Job, address: str | None = None, *, dashboard: bool = False) -> Iterator[None]:
    """Connect to a cluster, or start an embedded Ray on this machine and stop it after the block.

    An embedded Ray listens on 127.0.0.1 only, and requires a token that only this process has.

    Args:
        job: its workers must fit; an embedded Ray is told that it has as many CPUs as they want, because a small
            machine should run slowly rather than refuse.
        address: of a cluster (``auto``, ``host:port``); None starts an embedded Ray.
        dashboard: whether an embedded Ray has one. Ray Tune needs it if trials have their own workers: without its
            State API a trial that is stopped early keeps their resources, and the next one waits for ever.

    Raises:
        ConfigError: no cluster answers at the address, it requires another token, or the workers do not fit.
    """
    os.environ.setdefault(*TRAIN_POLLING)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        token_for_this_process()
        os.environ |= ONLY_THIS_MACHINE | NO_METRICS_PORTS
    else:
        use_token()
    import ray
    from ray._private import ray_constants
    from ray.exceptions import AuthenticationError

    where = "here" if address is None else f"at {address}"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment once, perhaps before this block
            wanted = max(job.resources.num_workers, num_cpus())
            ray.init(address="local", num_cpus=wanted, include_dashboard=dashboard, **quiet)
        else:
            ray.init(address=address, **quiet)
    except AuthenticationError as error:
        raise ConfigError(token_wanted(f"Ray {where}")) from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        # Ray does not say whether its head refused the token or did not answer.
        hint = "" if address is None else f" (if it requires a token, set {AUTH_TOKEN_PATH})"
        raise ConfigError(f"Ray cannot be reached {where}: {one_line(error, 300)}{hint}") from error
    if callable(on_sigterm):  # ours; Ray has put one in its place that ends this process with status 1
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        check_workers(job, ray_nodes())
        yield
    finally:
        ray.shutdown()


def check_workers(job: Job, nodes: Sequence[Mapping[str, float]], place: str = "Ray") -> None:
    """Refuse training workers that could never be scheduled: Ray would wait for ever.

    Args:
        job: what would run.
        nodes: what each node has (``{"CPU": 8.0, "GPU": 1.0}``).
        place: where the nodes are, for the message.

    Raises:
        ConfigError: not all workers of the job fit.
    """
    if job.reaches("distill"):
        workers, gpus = job.resources.num_workers, job.resources.gpus_per_worker
        asked = f"resources.num_workers={workers} with resources.gpus_per_worker={gpus:g}"
        check_room(nodes, workers, cpus=CPUS_PER_WORKER, gpus=gpus, settings=asked, place=place)
