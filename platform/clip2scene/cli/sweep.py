"""``clip2scene sweep``: begin a sweep, or go on with one."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from clip2scene.cli.session import add_session, session
from clip2scene.config import ConfigError


def register(verbs: Any) -> None:
    """Add the verb."""
    sweep = verbs.add_parser(
        "sweep", help="search settings of a job: many trainings on one extraction, compared in MLflow"
    )
    sweep.add_argument("space", nargs="?", help="search space, such as search_spaces/temperatures.yaml")
    sweep.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the space, or with job. before it of the job"
    )
    sweep.add_argument("--job", help="job file whose settings are varied")
    sweep.add_argument("--resume", metavar="NAME", help="go on with a sweep that was interrupted; no file is needed")
    sweep.add_argument(
        "--storage", help="with --resume: storage folder of the sweep; looked for in the current folder if not given"
    )
    add_session(sweep)
    sweep.set_defaults(verb=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from clip2scene.sweeps.sweep import load_sweep

    if options.resume is not None:
        if options.space is not None or options.job is not None:
            raise ConfigError(f"sweep --resume {options.resume}: takes no SPACE and no --job; it knows its own")
        from clip2scene.sweeps.runner import recall

        folder = _folder_of(options.resume, options.storage)
        sweep, command = recall(folder)
    else:
        if options.space is None or options.job is None or options.storage is not None:
            raise ConfigError("sweep: give SPACE and --job JOB to begin one, or --resume NAME [--storage DIR] to go on")
        sweep = load_sweep(options.space, options.job, options.overrides)
        from clip2scene.sweeps.runner import remember

        command = shlex.join(["clip2scene", "sweep", options.space, "--job", options.job, *options.overrides])
        sweep, folder = remember(sweep, command)
    from clip2scene.sweeps.runner import run_sweep
    from clip2scene.tracking.server import UI_PAGES
    from clip2scene.tracking.sweep.text import sweep_text

    storage = folder.parents[1]
    job = sweep.job_of(sweep.trials[0])
    dashboard = job.resources.num_workers > 0
    with session(options, storage, sweep.base.experiment, job, dashboard=dashboard) as tracker:
        record = run_sweep(sweep, tracker, folder, command, None if options.tracking_uri else UI_PAGES)
    print(sweep_text(record))
    where = f"--tracking-uri {options.tracking_uri}" if options.tracking_uri else f"--storage {storage}"
    print(f"report: clip2scene report {sweep.space.sweep} {where} --html {sweep.space.sweep}.html")
    if (folder / "best.yaml").is_file():
        print(f"best:   clip2scene run {folder / 'best.yaml'}")
    return 0


def _folder_of(name: str, storage: str | None) -> Path:
    """The sweep's folder: below the storage given, or the only one of that name below this folder."""
    if storage is not None:
        return Path(storage).resolve() / "sweeps" / name
    found = [path.parent.resolve() for path in Path().glob(f"*/sweeps/{name}/sweep.json")]
    if len(found) != 1:
        there = ", ".join(str(path) for path in found) or "none"
        raise ConfigError(f"--resume {name}: sweeps of that name below {Path().resolve()}: {there}; give --storage DIR")
    return found[0]
