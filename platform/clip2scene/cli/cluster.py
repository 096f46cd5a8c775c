"""The commands of clusters: ``up``, ``submit``, ``list``, ``status``, ``logs``, ``stop``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import datetime
from typing import Any

from clip2scene.cli.options import Commands, add_dashboard, add_submission, folder_to_write
from clip2scene.cli.session import TRACKING_URI
from clip2scene.cluster.jobs import API_ADDRESS, DASHBOARD_PORT, DEFAULT_ADDRESS, RAY_ADDRESS
from clip2scene.errors import ConfigError
from clip2scene.tracking.server import DEFAULT_PORT

_DASHBOARD = f"Ray's dashboard (default: {API_ADDRESS}, {RAY_ADDRESS}, else {DEFAULT_ADDRESS})"


def register(commands: Commands) -> None:
    """Add the commands."""
    up = commands.add_parser(
        "up",
        help="start Ray nodes and an MLflow server on this machine",
        description="Start a Ray cluster of several nodes and an MLflow server on this machine, for this machine only, "
        "with a token and a password. Ctrl-C ends both.",
        example="clip2scene up --nodes 3",
    )
    up.add_argument("--nodes", metavar="N", type=int, default=1, help="number of Ray nodes (default: %(default)s)")
    up.add_argument(
        "--cpus-per-node",
        metavar="N",
        type=int,
        help="CPUs Ray may use per node (default: this machine's divided by the nodes, at least 2)",
    )
    up.add_argument(
        "--storage",
        metavar="FOLDER",
        type=folder_to_write,
        default="cluster-output",
        help="folder for runs and secrets (default: %(default)s)",
    )
    up.add_argument(
        "--port", metavar="N", type=int, default=DASHBOARD_PORT, help="port of Ray's dashboard (default: %(default)s)"
    )
    up.add_argument(
        "--tracking-port", metavar="N", type=int, default=DEFAULT_PORT, help="port of MLflow (default: %(default)s)"
    )
    up.set_defaults(verb=_up)

    submit = commands.add_parser(
        "submit",
        help="run a job, a table or a sweep on a Ray cluster",
        description="Run a job, a table or a sweep on a Ray cluster and follow its log; Ctrl-C leaves it running, and "
        "the exit status is the job's. If the same one already runs there, its log is followed instead.",
        example="clip2scene submit jobs/demo.yaml storage=/shared/demo --dashboard http://HOST:8265 "
        "--tracking-uri http://HOST:5000",
    )
    add_submission(submit)
    submit.add_argument(
        "--tracking-uri", metavar="URL", help=f"MLflow server, as the cluster reaches it (default: {TRACKING_URI})"
    )
    submit.add_argument(
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="environment variable for the job and its workers, such as AWS_ENDPOINT_URL; NAME alone copies its "
        "value from this shell; secrets are refused; repeatable",
    )
    submit.add_argument("--detach", action="store_true", help="do not follow the log")
    submit.add_argument("--again", action="store_true", help="start a new job even if the same one is running")
    add_dashboard(submit, _DASHBOARD)
    submit.set_defaults(verb=_submit)

    listing = commands.add_parser(
        "list",
        help="list the jobs of a cluster",
        description="List the jobs of a Ray cluster, oldest first: state, start and ID.",
        example="clip2scene list --dashboard http://HOST:8265",
    )
    add_dashboard(listing, _DASHBOARD)
    listing.set_defaults(verb=_list)

    _add_job_command(
        commands,
        "status",
        _status,
        help="print the state of a job",
        description="Print the state of a job of a Ray cluster, its command, message, user and MLflow server.",
    )
    logs = _add_job_command(
        commands,
        "logs",
        _logs,
        help="print what a job has printed",
        description="Print what a job of a Ray cluster has printed so far.",
    )
    logs.add_argument(
        "--follow", action="store_true", help="keep printing until the job ends; the exit status is the job's"
    )
    _add_job_command(
        commands,
        "stop",
        _stop,
        help="end a job",
        description="End a job of a Ray cluster with SIGTERM, and wait until it has ended.",
    )


def _add_job_command(
    commands: Commands, name: str, verb: Callable[[argparse.Namespace], int], *, help: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=help, description=description, example=f"clip2scene {name} clip2scene-demo-0123456789abcdef"
    )
    parser.add_argument("id", metavar="ID", help="the job, as `clip2scene list` shows it")
    add_dashboard(parser, _DASHBOARD)
    parser.set_defaults(verb=verb)
    return parser


def _up(options: argparse.Namespace) -> int:
    from clip2scene.cluster.up import serve

    serve(options.storage, options.nodes, options.cpus_per_node, options.port, options.tracking_port)
    return 0


def _submit(options: argparse.Namespace) -> int:
    tracking_uri = options.tracking_uri or os.environ.get(TRACKING_URI)
    if not tracking_uri:
        raise ConfigError(
            f"submit: give --tracking-uri or set {TRACKING_URI}: an MLflow server that the cluster reaches"
        )
    from clip2scene.cluster.jobs import Jobs
    from clip2scene.cluster.submit import read_submission, submit, variables

    environment = variables(options.env)
    submission = read_submission(options.file, options.overrides, options.job)
    jobs = Jobs(options.dashboard)
    job_id, sent = submit(submission, jobs, tracking_uri, environment=environment, again=options.again)
    print(f"{job_id}: {'submitted to' if sent else 'is already running at'} {jobs.address}", flush=True)
    if options.detach:
        print(jobs.come_back(job_id))
        return 0
    return jobs.follow(job_id)


def _list(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    for job in Jobs(options.dashboard).all():
        print(_line(job))
    return 0


def _status(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    job = Jobs(options.dashboard).one(options.id)
    print(_line(job))
    print(f"command: {job.entrypoint}\nmessage: {job.message}")
    for key, value in (job.metadata or {}).items():
        print(f"{key}: {value}")
    return 0


def _logs(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    jobs = Jobs(options.dashboard)
    if options.follow:
        jobs.one(options.id)
        return jobs.follow(options.id)
    print(jobs.log(options.id), end="")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from clip2scene.cluster.jobs import Jobs

    was_running = Jobs(options.dashboard).stop(options.id)
    print(f"{options.id}: {'stopped' if was_running else 'had already ended'}")
    return 0


def _line(job: Any) -> str:
    started = datetime.fromtimestamp((job.start_time or 0) / 1000).strftime("%Y-%m-%d %H:%M:%S")
    return f"{job.status.value:9} {started}  {job.submission_id}"
