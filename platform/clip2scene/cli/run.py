"""``clip2scene run``: a job or a table."""

from __future__ import annotations

import argparse
import shlex
import sys

from clip2scene.cli.options import Commands, add_overrides
from clip2scene.cli.session import add_session, report_command, session
from clip2scene.errors import ConfigError
from clip2scene.jobfile import kind_of, load_job


def register(commands: Commands) -> None:
    """Add the command."""
    run = commands.add_parser(
        "run",
        help="run a job or a table; what is finished is not run again",
        description="Run a job or a table. A job runs all stages up to its own; what its storage already has is found "
        "there and not made again.",
        example="clip2scene run jobs/demo.yaml seed=1 distill.epochs=5",
    )
    run.add_argument("file", metavar="FILE", help="job or table, such as jobs/demo.yaml or jobs/table3_ablation.yaml")
    add_overrides(run, "settings to change, such as distill.epochs=5; `clip2scene settings` lists all")
    add_session(run)
    run.set_defaults(verb=_run)


def _run(options: argparse.Namespace) -> int:
    kind = kind_of(options.file)
    if kind == "sweep":
        raise ConfigError(
            f"{options.file}: a search space, not a job; `clip2scene sweep {options.file} --job JOB.yaml` runs it"
        )
    if kind == "table":
        return _run_table(options)
    job = load_job(options.file, options.overrides)
    from clip2scene.storage import Storage
    from clip2scene.tracking.report import summary_text

    storage = Storage(job.storage)
    with session(options, storage.root, job.experiment, job) as tracker:
        from clip2scene.pipeline import Pipeline  # takes seconds, in which MLflow starts

        report = Pipeline(job).run(tracker())
    print(summary_text(report))
    print(f"report: {storage.where(storage.root / 'report.json')}")
    print(f"runs:   {options.tracking_uri or shlex.join(['clip2scene', 'ui', '--storage', job.storage])}")
    return 0


def _run_table(options: argparse.Namespace) -> int:
    from clip2scene.tables.spec import expand, load_table

    table = load_table(options.file, options.overrides)
    from clip2scene.storage import Storage
    from clip2scene.tracking.server import UI_PAGES
    from clip2scene.tracking.table.text import failures, table_text

    command = shlex.join(["clip2scene", "run", options.file, *options.overrides])
    root, job = Storage(table.storage).root, expand(table, options.file)[0].job
    with session(options, root, table.experiment, job) as tracker:
        from clip2scene.tables.runner import run_table, unscored  # takes seconds, in which MLflow starts

        pages_at = None if options.tracking_uri else UI_PAGES
        record = run_table(table, tracker(), options.file, command, pages_at)
    print(table_text(record))
    print(f"report: {report_command(table.table, table.storage, options.tracking_uri)}")
    for sentence in (lacking := unscored(record)):
        print(f"clip2scene: {sentence}", file=sys.stderr)
    if failures(record):
        print("clip2scene: some jobs failed; the same command tries those again", file=sys.stderr)
    return 1 if lacking or failures(record) else 0
