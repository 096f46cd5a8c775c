"""The verbs of clusters: ``up``, ``submit``, ``list``, ``status``, ``logs``, ``stop``."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from typing import Any

from clip2scene.cli.session import TRACKING_URI
from clip2scene.config import ConfigError

_DASHBOARD_PORT, _TRACKING_PORT = 8265, 5000


def register(verbs: Any) -> None:
    """Add the verbs."""
    submit = verbs.add_parser("submit", help="run a job, a table or a sweep on a Ray cluster, and follow its log")
    submit.add_argument("file", help="job, table or search space, such as jobs/demo.yaml")
    submit.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to change, as with run and sweep"
    )
    submit.add_argument("--job", help="with a search space: job file whose settings are varied")
    submit.add_argument(
        "--tracking-uri", help="MLflow server, as the cluster reaches it; MLFLOW_TRACKING_URI when not given"
    )
    submit.add_argument("--detach", action="store_true", help="do not follow the log")
    submit.add_argument("--again", action="store_true", help="a new job, even if the same one is running")
    _add_address(submit)
    submit.set_defaults(verb=_submit)

    listing = verbs.add_parser("list", help="the jobs of a cluster")
    _add_address(listing)
    listing.set_defaults(verb=_list)

    status = verbs.add_parser("status", help="a job of a cluster")
    status.add_argument("id")
    _add_address(status)
    status.set_defaults(verb=_status)

    logs = verbs.add_parser("logs", help="what a job of a cluster has printed")
    logs.add_argument("id")
    logs.add_argument("--follow", action="store_true", help="until it ends; the exit status is the job's")
    _add_address(logs)
    logs.set_defaults(verb=_logs)

    stop = verbs.add_parser("stop", help="end a job of a cluster")
    stop.add_argument("id")
    _add_address(stop)
    stop.set_defaults(verb=_stop)

    up = verbs.add_parser("up", help="a Ray cluster of several nodes and an MLflow server on this machine")
    up.add_argument("--nodes", type=int, default=1)
    up.add_argument("--cpus-per-node", type=int, help="that Ray counts with; this machine's shared out, at least 2")
    up.add_argument("--storage", default="cluster-output", help="folder for runs and secrets (default: %(default)s)")
    up.add_argument("--port", type=int, default=_DASHBOARD_PORT, help="of Ray's dashboard (default: %(default)s)")
    up.add_argument("--tracking-port", type=int, default=_TRACKING_PORT, help="of MLflow (default: %(default)s)")
    up.set_defaults(verb=_up)


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help="Ray's dashboard; RAY_API_SERVER_ADDRESS when not given")


def _submit(options: argparse.Namespace) -> int:
    tracking_uri = options.tracking_uri or os.environ.get(TRACKING_URI)
    if not tracking_uri:
        raise ConfigError(
            f"submit: give --tracking-uri or set {TRACKING_URI}: an MLflow server that the cluster reaches"
        )
    from clip2scene.cluster.jobs import Jobs
    from clip2scene.cluster.submit import read_submission, submit

    submission = read_submission(options.file, options.overrides, options.job)
    jobs = Jobs(options.address)
    job_id, sent = submit(submission, jobs, tracking_uri, again=options.again)
    print(f"{job_id}: {'submitted to' if sent else 'is already running at'} {jobs.address}", flush=True)
    if options.detach:
        print(jobs.come_back(job_id))
        return 0
    return jobs.follow(job_id)


def _list(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    for job in Jobs(options.address).all():
        print(_line(job))
    return 0


def _status(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    job = Jobs(options.address).one(options.id)
    print(_line(job))
    print(f"command: {job.entrypoint}\nmessage: {job.message}")
    for key, value in (job.metadata or {}).items():
        print(f"{key}: {value}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    jobs = Jobs(options.address)
    if options.follow:
        jobs.one(options.id)
        return jobs.follow(options.id)
    print(jobs.log(options.id), end="")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    was_running = Jobs(options.address).stop(options.id)
    print(f"{options.id}: {'stopped' if was_running else 'had ended before'}")
    return 0


def _up(options: argparse.Namespace) -> int:
    from clip2scene.cluster.up import serve

    serve(options.storage, options.nodes, options.cpus_per_node, options.port, options.tracking_port)
    return 0


def _line(job: Any) -> str:
    started = datetime.fromtimestamp((job.start_time or 0) / 1000).strftime("%Y-%m-%d %H:%M:%S")
    return f"{job.status.value:9} {started}  {job.submission_id}"
