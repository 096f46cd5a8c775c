"""``clip2scene plan``: a dry run."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from clip2scene.config import ConfigError


def register(verbs: Any) -> None:
    """Add the verb."""
    plan = verbs.add_parser("plan", help="what a job, a table or a sweep would do, take, want and cost; nothing is run")
    plan.add_argument("file", help="job, table or search space, such as jobs/nuscenes.yaml")
    plan.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to change, as with run and sweep"
    )
    plan.add_argument("--job", help="with a search space: job file whose settings are varied")
    where = plan.add_argument_group("where it would run (this machine when not given)")
    where.add_argument("--address", metavar="URL", help="Ray's dashboard of a cluster")
    where.add_argument("--cpus", type=int, metavar="N", help="a machine with so many cores")
    where.add_argument("--gpus", type=int, metavar="N", help="a machine with so many GPUs")
    plan.add_argument("--frames", type=int, metavar="N", help="so many training keyframes, the others in proportion")
    plan.add_argument("--rates", metavar="FILE", help="JSON of rates that you measured, as in the package's rates.json")
    plan.add_argument("--images-per-second", type=float, metavar="X", help="of one actor, as you measured it")
    plan.add_argument("--steps-per-second", type=float, metavar="X", help="of distillation with one worker, likewise")
    plan.add_argument("--price-per-gpu-hour", type=float, metavar="X")
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(verb=_plan)


def _plan(options: argparse.Namespace) -> int:
    for name in ("cpus", "frames", "images_per_second", "steps_per_second"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be a number above 0")
    for name in ("gpus", "price_per_gpu_hour"):
        if (value := getattr(options, name)) is not None and not 0 <= value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be a number, not below 0")
    if options.address is not None and (options.cpus, options.gpus) != (None, None):
        raise ConfigError(
            "--address: a cluster says what it has; --cpus and --gpus are for machines that are not there"
        )
    from clip2scene.cluster.plan import plan
    from clip2scene.cluster.plan_machine import cluster_at, machine_of, this_machine
    from clip2scene.cluster.plan_report import plan_json, plan_text
    from clip2scene.cluster.rates import read_rates

    if options.address is not None:
        machine = cluster_at(options.address)
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
