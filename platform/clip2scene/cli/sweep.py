"""``clip2scene sweep``: start a sweep, or continue one."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from clip2scene.cli.options import Commands, add_overrides
from clip2scene.cli.session import add_session, report_command, session
from clip2scene.errors import ConfigError


def register(commands: Commands) -> None:
    """Add the command."""
    sweep = commands.add_parser(
        "sweep",
        help="search settings of a job: many trials on one extraction",
        description="Search settings of a job: many trials on the same extracted features, compared in MLflow. A sweep "
        "that was interrupted continues with --resume NAME, or with the same command. The exit status is 1 if a trial "
        "failed, or if none has a score.",
        example="clip2scene sweep search_spaces/temperatures.yaml --job jobs/streetworld.yaml",
    )
    sweep.add_argument("space", nargs="?", metavar="FILE", help="search space, such as search_spaces/temperatures.yaml")
    add_overrides(sweep, "settings of the search space to change, or of the job as job.key=value")
    sweep.add_argument("--job", metavar="FILE", help="job file whose settings are varied")
    sweep.add_argument("--resume", metavar="NAME", help="continue a sweep that was interrupted; takes no file")
    sweep.add_argument(
        "--storage",
        metavar="FOLDER",
        help="with --resume: storage folder of the sweep (default: searched for below the current folder)",
    )
    add_session(sweep)
    sweep.set_defaults(verb=_sweep)


def _sweep(options: argparse.Namespace) -> int:
    from clip2scene.sweeps.sweep import load_sweep

    if options.resume is not None:
        changes = [word for word in (options.space, *options.overrides) if word is not None and "=" in word]
        if changes and options.space in (None, *changes) and options.job is None:
            raise ConfigError(
                f"sweep --resume {options.resume}: {changes[0]}: settings of a kept sweep cannot be changed; start "
                "another one instead (clip2scene sweep FILE --job FILE sweep=NAME ...); a larger num_trials belongs to "
                "the command that began it"
            )
        if options.space is not None or options.job is not None:
            raise ConfigError(f"sweep --resume {options.resume}: takes no FILE and no --job; it has kept its own")
        from clip2scene.sweeps.runner import recall

        kept = recall(_folder_of(options.resume, options.storage))
    else:
        if options.storage is not None:
            raise ConfigError("sweep: --storage belongs to --resume; a new sweep takes job.storage=FOLDER")
        if options.space is None or options.job is None:
            raise ConfigError(
                "sweep: give FILE and --job FILE to start a sweep, or --resume NAME [--storage FOLDER] to continue one"
            )
        sweep = load_sweep(options.space, options.job, options.overrides)
        from clip2scene.sweeps.runner import remember

        command = shlex.join(["clip2scene", "sweep", options.space, "--job", options.job, *options.overrides])
        kept = remember(sweep, command, options.tracking_uri)
    from clip2scene.sweeps.runner import run_sweep
    from clip2scene.tracking.server import UI_PAGES
    from clip2scene.tracking.sweep.text import sweep_text

    sweep, storage, best = kept.sweep, kept.folder.parents[1], kept.folder / "best.yaml"
    options.tracking_uri = options.tracking_uri or kept.tracking_uri
    job = sweep.job_of(sweep.trials[0])
    dashboard = job.resources.num_workers > 0
    with session(options, storage, sweep.job.experiment, job, dashboard=dashboard) as tracker:
        record = run_sweep(kept, tracker(), None if options.tracking_uri else UI_PAGES)
    print(sweep_text(record))
    print(f"report: {report_command(sweep.space.sweep, storage, options.tracking_uri)}")
    if best.is_file():
        print(f"best:   {shlex.join(['clip2scene', 'run', str(best)])}")
    failed = any(trial.state == "failed" for trial in record.trials)
    # A sweep whose hours are over before any score has not failed.
    nothing = record.best is None and not record.num_left
    return 1 if failed or nothing else 0


def _folder_of(name: str, storage: str | None) -> Path:
    """The sweep's folder: in the given storage, or the only one of that name one level below the current folder."""
    if storage is not None:
        return Path(storage).resolve() / "sweeps" / name
    found = [path.parent.resolve() for path in Path().glob(f"*/sweeps/{name}/sweep.json")]
    if len(found) != 1:
        there = ", ".join(str(path) for path in found) or "none"
        raise ConfigError(f"--resume {name}: sweeps of that name in {Path().resolve()}: {there}; give --storage FOLDER")
    return found[0]
