"""What every verb that runs something needs: MLflow and Ray, which start beside each other."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from clip2scene.config import ConfigError, Job
from clip2scene.tracking.tracker import Tracker

TRACKING_URI = "MLFLOW_TRACKING_URI"


def add_session(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`session` reads."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="head of a Ray cluster that this machine is of, or auto; else one embedded",
    )
    parser.add_argument(
        "--tracking-uri",
        default=os.environ.get(TRACKING_URI) or None,
        help=f"MLflow server; {TRACKING_URI} when not given, and without both one embedded",
    )


@contextlib.contextmanager
def session(
    options: argparse.Namespace, storage: Path, experiment: str, job: Job, *, dashboard: bool = False
) -> Iterator[Tracker]:
    """A tracker, with Ray initialised for as long as the block lasts.

    Args:
        options: of the command line: ``address`` of a cluster and ``tracking_uri`` of a server, embedded ones if None.
        storage: folder of the embedded server's runs and of the outbox.
        experiment: its name.
        job: whose workers must fit.
        dashboard: an embedded Ray has one.

    Raises:
        ConfigError: a URL for an address; or as :func:`ray_session`.
        TrackingError: as :func:`embedded_server` and :func:`connect`.
    """
    if options.address is not None and "://" in options.address:
        raise ConfigError(
            f"--address {options.address}: HOST:PORT of a Ray cluster's head is needed, or auto; a job is sent to the "
            "URL of a dashboard by `clip2scene submit`"
        )
    from clip2scene.cluster.session import ray_session
    from clip2scene.tracking.server import starting_server
    from clip2scene.tracking.tracker import connect

    outbox = storage / "outbox"
    with contextlib.ExitStack() as stack:
        if options.tracking_uri is not None:
            tracker = connect(options.tracking_uri, experiment, outbox)
            stack.enter_context(ray_session(job, options.address, dashboard=dashboard))
        else:
            wait_for_uri = stack.enter_context(starting_server(storage / "mlflow"))
            stack.enter_context(ray_session(job, options.address, dashboard=dashboard))
            tracker = connect(wait_for_uri(), experiment, outbox)
        yield tracker
