"""``clip2scene plan`` and ``doctor``: what to ask before a run."""

from __future__ import annotations

import argparse
import json

from clip2scene.cli.options import (
    Commands,
    add_dashboard,
    add_submission,
    non_negative_integer,
    non_negative_number,
    positive_integer,
    positive_number,
)
from clip2scene.errors import ConfigError


def register(commands: Commands) -> None:
    """Add the commands."""
    plan = commands.add_parser(
        "plan",
        help="dry run: data, steps, memory, disk and time; nothing is run",
        description="Dry run of a job, a table or a sweep: its data, steps, memory, disk and time. Nothing is run; the "
        "exit status is 1 if the job could not run there.",
        example="clip2scene plan jobs/nuscenes.yaml --gpus 8",
    )
    add_submission(plan)
    where = plan.add_argument_group("where it would run (default: this machine)")
    add_dashboard(where, "the Ray cluster with this dashboard")
    where.add_argument("--cpus", type=positive_integer, metavar="N", help="a machine with that many cores")
    where.add_argument("--gpus", type=non_negative_integer, metavar="N", help="a machine with that many GPUs")
    plan.add_argument(
        "--frames",
        type=positive_integer,
        metavar="N",
        help="plan for that many training keyframes, and other splits in proportion",
    )
    rates = plan.add_argument_group("speeds and prices")
    rates.add_argument(
        "--rates", metavar="FILE", help="JSON file of measured rates, like clip2scene/cluster/rates.json"
    )
    rates.add_argument("--images-per-second", type=positive_number, metavar="X", help="speed of one extraction actor")
    rates.add_argument("--steps-per-second", type=positive_number, metavar="X", help="distillation speed of one worker")
    rates.add_argument("--price-per-gpu-hour", type=non_negative_number, metavar="X", help="also print the cost")
    plan.add_argument("--json", action="store_true", help="print JSON instead of text")
    plan.set_defaults(verb=_plan)

    doctor = commands.add_parser(
        "doctor",
        help="check this machine: versions, cores, memory, GPUs, disk",
        description="Check this machine: versions, cores, memory, GPUs and disk, a sparse convolution and the shipped "
        "CLIP. The exit status is 1 if a check fails.",
    )
    doctor.set_defaults(verb=_doctor)


def _plan(options: argparse.Namespace) -> int:
    if options.dashboard is not None and (options.cpus, options.gpus) != (None, None):
        raise ConfigError("--dashboard cannot be combined with --cpus or --gpus: the cluster reports its own resources")
    from clip2scene.cluster.plan import plan
    from clip2scene.cluster.plan_machine import cluster_at, machine_of, this_machine
    from clip2scene.cluster.plan_report import plan_json, plan_text
    from clip2scene.cluster.rates import read_rates

    if options.dashboard is not None:
        machine = cluster_at(options.dashboard)
    elif options.cpus is not None or options.gpus is not None:
        machine = machine_of(options.cpus, options.gpus)
    else:
        machine = this_machine()
    rates = read_rates(options.rates).with_given(options.images_per_second, options.steps_per_second)
    made = plan(options.file, options.overrides, options.job, machine, rates, options.frames)
    if options.json:
        print(json.dumps(plan_json(made, options.price_per_gpu_hour), indent=1))
    else:
        print(plan_text(made, options.price_per_gpu_hour))
    if made.problems:
        raise ConfigError(made.refusal)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from clip2scene.doctor import check

    return check()
