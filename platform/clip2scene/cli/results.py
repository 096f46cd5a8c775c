"""``clip2scene ui`` and ``report``: what was run, in MLflow's pages or as tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from clip2scene.cli.options import Commands, file_to_write
from clip2scene.cli.session import TRACKING_URI
from clip2scene.errors import ConfigError
from clip2scene.tracking.server import DEFAULT_PORT


def register(commands: Commands) -> None:
    """Add the commands."""
    ui = commands.add_parser(
        "ui",
        help="serve MLflow's pages for the runs of a storage folder",
        description="Serve MLflow's pages for the runs of a storage folder, on this machine only, until Ctrl-C.",
        example="clip2scene ui --storage demo-output",
    )
    ui.add_argument("--storage", metavar="FOLDER", required=True, help="a job's storage: a folder, or s3://BUCKET/...")
    ui.add_argument(
        "--port", metavar="N", type=int, default=DEFAULT_PORT, help="port to serve on (default: %(default)s)"
    )
    ui.set_defaults(verb=_ui)

    report = commands.add_parser(
        "report",
        help="print the scores of the last job, a table or a sweep",
        description="Print a table or a sweep by its NAME, rebuilt from MLflow alone; without NAME, the scores of the "
        "last job in a storage folder.",
        example="clip2scene report table3 --storage tables-output --html table3.html",
    )
    report.add_argument("name", nargs="?", metavar="NAME", help="name of a table or a sweep, such as table3")
    report.add_argument("--storage", metavar="FOLDER", help="storage folder that holds the runs")
    report.add_argument(
        "--tracking-uri", metavar="URL", help=f"MLflow server that holds the runs (default: {TRACKING_URI})"
    )
    report.add_argument(
        "--html", metavar="FILE", type=file_to_write, help="with NAME: also write it with its figures as one HTML file"
    )
    report.set_defaults(verb=_report)


def _ui(options: argparse.Namespace) -> int:
    from clip2scene.tracking.server import serve_ui

    serve_ui(_folder_of_runs(options.storage), options.port)
    return 0


def _folder_of_runs(storage: str) -> Path:
    """The embedded server's folder; with an object store, it lies in the store's cache on this machine."""
    from clip2scene.storage import folder_of

    folder = folder_of(storage) / "mlflow"
    if not folder.is_dir():
        raise ConfigError(f"--storage {storage}: no runs there (no folder {folder}); run a job first")
    return folder


def _report(options: argparse.Namespace) -> int:
    if options.name is not None:
        return _report_from_mlflow(options)
    if options.storage is None or options.html is not None or options.tracking_uri is not None:
        raise ConfigError("report: without a NAME, --storage is required, and --html and --tracking-uri do not apply")
    from clip2scene.remote import is_remote
    from clip2scene.storage import Storage, folder_of
    from clip2scene.tracking.report import summary_text

    root = folder_of(options.storage)
    path = root / "report.json"
    # Their folders tell without a server; a table's is named as its run in MLflow.
    names = ", ".join(sorted(each.name for kind in ("sweeps", "tables") for each in (root / kind).glob("*")))
    if is_remote(options.storage):
        Storage(options.storage).fetch(path, refresh=True)
    try:
        text = summary_text(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        advice = f"give the NAME of a sweep or table there: {names}" if names else "run a job first"
        raise ConfigError(f"--storage {options.storage}: no readable report there ({path}); {advice}") from error
    print(text)
    if names:
        command = shlex.join(["clip2scene", "report", "NAME", "--storage", options.storage])
        print(f"sweeps and tables here: {names} ({command})")
    return 0


def _report_from_mlflow(options: argparse.Namespace) -> int:
    given_uri = options.tracking_uri or os.environ.get(TRACKING_URI, "")
    if (options.storage is not None and options.tracking_uri is not None) or not (options.storage or given_uri):
        raise ConfigError(f"report {options.name}: give either --storage FOLDER or --tracking-uri URL")
    from clip2scene.storage import writing
    from clip2scene.tracking.records import reading
    from clip2scene.tracking.server import UI_PAGES, embedded_server

    with contextlib.ExitStack() as stack:
        if options.storage is not None:
            uri = stack.enter_context(embedded_server(_folder_of_runs(options.storage)))
        else:
            uri = given_uri
        stack.enter_context(reading(uri))
        text, page = _text_and_page(uri, options.name, UI_PAGES if options.storage is not None else None)
        if options.html:
            with writing(Path(options.html)) as aside:
                aside.write_text(page(), encoding="utf-8")
    print(text)
    if options.html:
        print(f"page: {options.html}")
    return 0


def _text_and_page(uri: str, name: str, pages_at: str | None) -> tuple[str, Callable[[], str]]:
    """A table or a sweep as text, and a function that makes its HTML page."""
    from clip2scene.progress import say
    from clip2scene.tracking.records import find_named

    latest, *others = find_named(uri, name)
    if others:
        kinds = " and ".join(sorted({f"{run.data.tags['stage']}s" for run in (latest, *others)}))
        shown = f"the one that ran last is shown ({latest.info.run_name}, MLflow run {latest.info.run_id})"
        say(f"{1 + len(others)} {kinds} are named {name!r}; {shown}")
    if latest.data.tags["stage"] == "sweep":
        from clip2scene.tracking.sweep.page import sweep_html
        from clip2scene.tracking.sweep.record import read_sweep_run
        from clip2scene.tracking.sweep.text import sweep_text

        sweep = read_sweep_run(uri, latest.info.run_id)
        return sweep_text(sweep), lambda: sweep_html(sweep, pages_at)
    from clip2scene.tracking.table.page import table_html
    from clip2scene.tracking.table.record import read_table_run
    from clip2scene.tracking.table.text import table_text

    table = read_table_run(uri, latest.info.run_id)
    return table_text(table), lambda: table_html(table, pages_at)
