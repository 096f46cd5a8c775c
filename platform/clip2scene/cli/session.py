"""What every command that runs something needs: MLflow and Ray, which start beside each other."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from clip2scene.config import Job
from clip2scene.errors import ConfigError
from clip2scene.tracking.tracker import Tracker

TRACKING_URI = "MLFLOW_TRACKING_URI"


def add_session(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`session` reads."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="Ray head of a running cluster that this machine belongs to (or `auto`); without it Ray starts here",
    )
    parser.add_argument(
        "--tracking-uri",
        metavar="URL",
        default=os.environ.get(TRACKING_URI) or None,
        help=f"MLflow server (default: {TRACKING_URI}, else one in the storage folder)",
    )


@contextlib.contextmanager
def session(
    options: argparse.Namespace, storage: Path, experiment: str, job: Job, *, dashboard: bool = False
) -> Iterator[Callable[[], Tracker]]:
    """Initialise Ray for the length of the block, and yield a function that waits for MLflow and returns a tracker.

    An embedded MLflow takes seconds to start, in which the caller can import what it needs.

    Args:
        options: ``address`` of a cluster and ``tracking_uri`` of a server; embedded ones where None.
        storage: folder of the embedded server's runs and of the outbox.
        experiment: name of the MLflow experiment.
        job: the job whose workers must fit.
        dashboard: whether an embedded Ray has a dashboard.

    Raises:
        ConfigError: the address is a URL; or as :func:`ray_session`.
        TrackingError: as :func:`embedded_server` and :func:`connect`; by the function if the server is embedded.
    """
    if options.address is not None and "://" in options.address:
        raise ConfigError(
            f"--address {options.address}: must be HOST:PORT of a Ray head, or auto; `clip2scene submit --dashboard "
            "URL` sends a job to a dashboard"
        )
    from clip2scene.cluster.session import ray_session
    from clip2scene.progress import say
    from clip2scene.remote import is_remote
    from clip2scene.tracking.server import starting_server
    from clip2scene.tracking.tracker import connect

    def connected(uri: str) -> Tracker:
        tracker = connect(uri, experiment, storage / "outbox")
        tracker.close_lost()
        return tracker

    with contextlib.ExitStack() as stack:
        if options.tracking_uri is None and is_remote(job.storage):
            sentence = f"storage={job.storage}: MLflow's runs stay on this machine, in {storage / 'mlflow'}"
            say(f"{sentence}; --tracking-uri URL keeps them on a server")
        if options.tracking_uri is not None:
            tracker = connected(options.tracking_uri)
            stack.enter_context(ray_session(job, options.address, dashboard=dashboard))
            yield lambda: tracker
        else:
            wait_for_uri = stack.enter_context(starting_server(storage / "mlflow"))
            stack.enter_context(ray_session(job, options.address, dashboard=dashboard))
            yield lambda: connected(wait_for_uri())


def report_command(name: str, storage: str | Path, tracking_uri: str | None) -> str:
    """The command that prints a table or a sweep again, from the MLflow server that its session used."""
    where = ["--tracking-uri", tracking_uri] if tracking_uri else ["--storage", str(storage)]
    return shlex.join(["clip2scene", "report", name, *where, "--html", f"{name}.html"])
