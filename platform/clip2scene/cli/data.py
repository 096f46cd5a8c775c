"""``clip2scene index`` and ``inspect``: the index of a dataset, and a look into it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

from clip2scene.cli.options import Commands, file_to_write, non_negative_integer, positive_integer
from clip2scene.config import DatasetKind

_DATASETS = tuple(kind for kind in get_args(DatasetKind) if kind != "streetworld")  # which a job makes itself


def register(commands: Commands) -> None:
    """Add the commands."""
    index = commands.add_parser(
        "index",
        help="build the index of a dataset",
        description="Build the index of a dataset: one row per keyframe, with its cloud, earlier sweeps, images, poses "
        "and labels. A job builds its own; this one is for `clip2scene inspect`.",
        example="clip2scene index nuscenes --root /data/nuscenes --version v1.0-mini --output mini.parquet",
    )
    index.add_argument("dataset", metavar="DATASET", choices=_DATASETS, help=", ".join(_DATASETS))
    index.add_argument("--root", metavar="FOLDER", required=True, help="the dataset's folder")
    index.add_argument(
        "--version", metavar="NAME", help="nuScenes: folder of tables, such as v1.0-mini; ScanNet: scans_test"
    )
    index.add_argument("--output", metavar="FILE", required=True, type=file_to_write, help="Parquet file to write")
    index.add_argument(
        "--max-sweeps",
        metavar="N",
        type=non_negative_integer,
        default=10,
        help="earlier sweeps to list per keyframe (0: none; default: %(default)s)",
    )
    index.add_argument(
        "--images-per-scene",
        metavar="N",
        type=positive_integer,
        help="ScanNet: at most that many images per scene (default: all)",
    )
    _add_linked_folder(index)
    index.set_defaults(verb=_index)

    inspect = commands.add_parser(
        "inspect",
        help="count points, pairs, sweeps and labels of an index's keyframes",
        description="Count the points, point-pixel pairs, earlier sweeps and labels of each keyframe of an index, to "
        "check that the dataset's files, poses and calibration agree.",
        example="clip2scene inspect mini.parquet --figure frame.png",
    )
    inspect.add_argument("index", metavar="FILE", help="Parquet file of `clip2scene index`")
    inspect.add_argument("--root", metavar="FOLDER", help="the dataset's folder, if it has moved")
    _add_linked_folder(inspect)
    inspect.add_argument("--frame", metavar="ID", help="only this keyframe (default: all)")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of text")
    inspect.add_argument(
        "--figure",
        metavar="FILE",
        type=file_to_write,
        help="PNG file to write: the points of the (first) keyframe, drawn on its images",
    )
    inspect.set_defaults(verb=_inspect)


def _add_linked_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--linked-folder",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a folder outside of the dataset's to which links in it may lead (may be given several times)",
    )


def _index(options: argparse.Namespace) -> int:
    from clip2scene.data.datasets import build_index
    from clip2scene.data.index import write_index
    from clip2scene.storage import writing

    index = build_index(
        options.dataset,
        Path(options.root),
        version=options.version,
        max_sweeps=options.max_sweeps,
        images_per_scene=options.images_per_scene,
        linked_folders=map(Path, options.linked_folder),
    )
    with writing(Path(options.output)) as aside:
        write_index(index, aside)
    for sentence in index.left_out:
        print(sentence)
    print(f"{options.output}: {len(index.frames)} keyframes of {len({f.scene for f in index.frames})} scenes")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from clip2scene.data.index import read_index
    from clip2scene.data.vocabulary import vocabulary_of
    from clip2scene.inspection import format_table, inspect_frame
    from clip2scene.progress import progress, silent

    index = read_index(options.index, options.root, options.linked_folder)
    words = vocabulary_of(index.dataset)
    frames = (index.frame(options.frame),) if options.frame else index.frames
    rows = []
    show = progress if len(frames) > 1 else silent
    with show("inspect", len(frames), "keyframes") as advance:
        for frame in frames:
            rows.append(inspect_frame(index, frame, words))
            advance()
    print(json.dumps({"frames": rows}, indent=2) if options.json else format_table(rows))
    if options.figure:
        from clip2scene.storage import writing
        from clip2scene.tracking.figures.keyframe import frame_figure

        with writing(Path(options.figure)) as aside:
            frame_figure(index, frames[0], words).savefig(aside, format="png", dpi=100)
    return 0
