"""The command line: one verb per line of ``clip2scene --help``. No logic of its own, and nothing heavy at import."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from clip2scene import __version__
from clip2scene.cli import cluster, plan, settings, sweep
from clip2scene.cli.session import TRACKING_URI, add_session, session
from clip2scene.config import Clip2sceneError, ConfigError, Job
from clip2scene.jobfile import kind_of, load_job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a mistake of the user's is one sentence on stderr and exit status 1 (2: of the command's words)."""
    options = _parsed(arguments)
    try:
        status: int = options.verb(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("clip2scene: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    except Clip2sceneError as error:
        print(f"clip2scene: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); what is left of it would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"clip2scene: the disk is full ({error}); free some space and run the same command again", file=sys.stderr
        )
        return 1
    return status


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The words, with ``key=value`` allowed after options too, which argparse alone does not."""
    parser = _parser()
    options, left = parser.parse_known_args(arguments)
    if left and ("overrides" not in options or any(word.startswith("-") for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}{_as_setting(left) if 'overrides' in options else ''}")
    if left:
        options.overrides = [*options.overrides, *left]
    return options


def _as_setting(left: Sequence[str]) -> str:
    """How the first unknown option is given that is called like a key of a job."""
    for option, following in zip(left, (*left[1:], "VALUE"), strict=True):
        key, _, value = option.removeprefix("--").partition("=")
        if option.startswith("--") and key.partition(".")[0] in Job.model_fields:
            return f" (a setting is given without dashes: {key}={value or following})"
    return ""


def _run(options: argparse.Namespace) -> int:
    kind = kind_of(options.job)
    if kind == "sweep":
        raise ConfigError(
            f"{options.job}: a search space, not a job; `clip2scene sweep {options.job} --job JOB.yaml` runs it"
        )
    if kind == "table":
        return _run_table(options)
    job = load_job(options.job, options.overrides)
    if job.stage == "streetworld_clip":
        from clip2scene.progress import progress
        from clip2scene.streetworld.clip_training import train

        settings = job.streetworld_clip
        total = len(settings.world_seeds) * settings.scenes_per_world + settings.steps
        with progress("streetworld_clip", total) as advance:
            train(settings, job.seed, Path(settings.output), advance)
        return 0
    from clip2scene.pipeline import Pipeline
    from clip2scene.tracking.report import summary_text

    pipeline = Pipeline(job)
    with session(options, pipeline.stages.storage.root, job.experiment, job) as tracker:
        report = pipeline.run(tracker)
    print(summary_text(report))
    storage = pipeline.stages.storage
    print(f"report: {storage.where(storage.root / 'report.json')}")
    print(_how_to_look(job, options.tracking_uri))
    return 0


def _run_table(options: argparse.Namespace) -> int:
    from clip2scene.tables.spec import expand, load_table

    table = load_table(options.job, options.overrides)
    from clip2scene.storage import Storage
    from clip2scene.tables.runner import run_table
    from clip2scene.tracking.server import UI_PAGES
    from clip2scene.tracking.table_report import failures, table_text

    command = shlex.join(["clip2scene", "run", options.job, *options.overrides])
    root, job = Storage(table.storage).root, expand(table, options.job)[0].job
    with session(options, root, table.experiment, job) as tracker:
        pages_at = None if options.tracking_uri else UI_PAGES
        record = run_table(table, tracker, options.job, command, pages_at)
    print(table_text(record))
    where = f"--tracking-uri {options.tracking_uri}" if options.tracking_uri else f"--storage {table.storage}"
    print(f"report: clip2scene report {table.table} {where} --html {table.table}.html")
    if failures(record):
        print("clip2scene: some jobs failed; the same command tries those again", file=sys.stderr)
        return 1
    return 0


def _how_to_look(job: Job, tracking_uri: str | None) -> str:
    return f"runs:   {tracking_uri}" if tracking_uri else f"runs:   clip2scene ui --storage {job.storage}"


def _index(options: argparse.Namespace) -> int:
    from clip2scene.data.datasets import build_index
    from clip2scene.data.index import write_index

    index = build_index(
        options.dataset,
        Path(options.root),
        version=options.version,
        max_sweeps=options.max_sweeps,
        images_per_scene=options.images_per_scene,
    )
    write_index(index, options.output)
    for sentence in index.left_out:
        print(sentence)
    print(f"{options.output}: {len(index.frames)} keyframes of {len({f.scene for f in index.frames})} scenes")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from clip2scene.data.index import read_index
    from clip2scene.data.vocabulary import vocabulary, vocabulary_of
    from clip2scene.inspection import format_table, inspect_frame

    index = read_index(options.index, options.root)
    words = vocabulary(options.vocabulary) if options.vocabulary else vocabulary_of(index.dataset)
    frames = (index.frame(options.frame),) if options.frame else index.frames
    rows = [inspect_frame(index, frame, words) for frame in frames]
    print(json.dumps({"frames": rows}, indent=2) if options.json else format_table(rows))
    if options.figure:
        from clip2scene.storage import writing
        from clip2scene.tracking.overview import frame_figure

        with writing(Path(options.figure)) as aside:
            frame_figure(index, frames[0], words).savefig(aside, format="png", dpi=100)
    return 0


def _ui(options: argparse.Namespace) -> int:
    from clip2scene.tracking.server import serve_ui

    serve_ui(_runs_of(options.storage), options.port)
    return 0


def _runs_of(storage: str) -> Path:
    """Folder of the embedded server's runs: those of an object store lie in its cache on this machine."""
    from clip2scene.storage import folder_of

    folder = folder_of(storage) / "mlflow"
    if not folder.is_dir():
        raise ConfigError(f"--storage {storage}: no runs there (no folder {folder}); run a job first")
    return folder


def _report(options: argparse.Namespace) -> int:
    if options.table is not None:
        return _report_table(options)
    if options.storage is None or options.html is not None or options.tracking_uri is not None:
        raise ConfigError("report: without a NAME, --storage is required and --html and --tracking-uri are not known")
    from clip2scene.storage import Storage, folder_of, is_remote
    from clip2scene.tracking.report import summary_text

    path = folder_of(options.storage) / "report.json"
    if is_remote(options.storage):
        Storage(options.storage).fetch(path, refresh=True)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--storage {options.storage}: no readable report there ({path}); run a job first") from error
    print(summary_text(report))
    return 0


def _report_table(options: argparse.Namespace) -> int:
    given_uri = options.tracking_uri or os.environ.get(TRACKING_URI, "")
    if (options.storage is not None and options.tracking_uri is not None) or not (options.storage or given_uri):
        raise ConfigError(f"report {options.table}: give either --storage DIR or --tracking-uri URI")
    from clip2scene.storage import writing
    from clip2scene.tracking.server import UI_PAGES, embedded_server

    with contextlib.ExitStack() as stack:
        if options.storage is not None:
            uri = stack.enter_context(embedded_server(_runs_of(options.storage)))
        else:
            uri = given_uri
        text, page = _text_and_page(uri, options.table, UI_PAGES if options.storage is not None else None)
        if options.html:
            with writing(Path(options.html)) as aside:
                aside.write_text(page(), encoding="utf-8")
    print(text)
    if options.html:
        print(f"page: {options.html}")
    return 0


def _text_and_page(uri: str, name: str, pages_at: str | None) -> tuple[str, Callable[[], str]]:
    """A table or a sweep as text, and what makes its page."""
    from clip2scene.tracking.sweep_runs import is_sweep

    if is_sweep(uri, name):
        from clip2scene.tracking.sweep_html import sweep_html
        from clip2scene.tracking.sweep_record import read_sweep
        from clip2scene.tracking.sweep_report import sweep_text

        sweep = read_sweep(uri, name)
        return sweep_text(sweep), lambda: sweep_html(sweep, pages_at)
    from clip2scene.tracking.table_html import table_html
    from clip2scene.tracking.table_record import read_table
    from clip2scene.tracking.table_report import table_text

    table = read_table(uri, name)
    return table_text(table), lambda: table_html(table, pages_at)


def _doctor(options: argparse.Namespace) -> int:
    from clip2scene.doctor import check

    return check()


def _file_to_write(text: str) -> str:
    """Of an option: refused before any work is done."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; a file is needed")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip2scene", description="Teach a 3D network what CLIP knows, and fine-tune it with very few labels."
    )
    parser.add_argument("--version", action="version", version=f"clip2scene {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    run = verbs.add_parser(
        "run", help="run a job or a table: all stages up to the job's, finished ones are found, not repeated"
    )
    run.add_argument("job", help="job or table file, such as jobs/demo.yaml or jobs/table3_ablation.yaml")
    run.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings to change, such as distill.epochs=5; `clip2scene settings` lists all",
    )
    add_session(run)
    run.set_defaults(verb=_run)

    sweep.register(verbs)
    plan.register(verbs)
    settings.register(verbs)
    cluster.register(verbs)

    index = verbs.add_parser("index", help="build the index of a dataset")
    index.add_argument("dataset", choices=["nuscenes", "semantickitti", "scannet"])
    index.add_argument("--root", required=True, help="the dataset's folder")
    index.add_argument("--version", help="nuScenes: folder of tables, such as v1.0-mini")
    index.add_argument("--output", required=True, type=_file_to_write, help="Parquet file to write")
    index.add_argument("--max-sweeps", type=int, default=10, help="earlier sweeps a keyframe (0: keyframes only)")
    index.add_argument("--images-per-scene", type=int, help="ScanNet: at most so many images a scene (default: all)")
    index.set_defaults(verb=_index)

    inspect = verbs.add_parser("inspect", help="points, pairs, sweeps and labels of an index's keyframes")
    inspect.add_argument("index", help="Parquet file of `clip2scene index`")
    inspect.add_argument("--root", help="the dataset's folder, if it has moved")
    inspect.add_argument("--frame", metavar="ID", help="only this keyframe")
    inspect.add_argument("--vocabulary", help="names of the labels' classes; the data set's own when not given")
    inspect.add_argument("--json", action="store_true")
    inspect.add_argument(
        "--figure", metavar="PNG", type=_file_to_write, help="draw the (first) keyframe's points on its images"
    )
    inspect.set_defaults(verb=_inspect)

    ui = verbs.add_parser("ui", help="open MLflow on the runs of a storage folder")
    ui.add_argument("--storage", required=True)
    ui.add_argument("--port", type=int, default=5000)
    ui.set_defaults(verb=_ui)

    report = verbs.add_parser(
        "report", help="a table or a sweep, rebuilt from MLflow; without NAME the last job's scores"
    )
    report.add_argument("table", nargs="?", metavar="NAME", help="of a table or a sweep, such as table3")
    report.add_argument("--storage", help="storage folder whose runs to read")
    report.add_argument("--tracking-uri", help=f"MLflow server to read instead; {TRACKING_URI} without both")
    report.add_argument(
        "--html", metavar="FILE", type=_file_to_write, help="write the table with its figures as one HTML file too"
    )
    report.set_defaults(verb=_report)

    doctor = verbs.add_parser("doctor", help="check this machine: versions, cores, memory, GPU, disk")
    doctor.set_defaults(verb=_doctor)
    return parser
