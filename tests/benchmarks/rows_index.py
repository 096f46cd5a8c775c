"""The index against nuscenes-devkit, on as many keyframes as nuScenes trains on.

The tables are those of a small street world, copied with fresh tokens. nuScenes' own have five times as many sensor
records a keyframe (radar, and images between keyframes), all of which the devkit loads.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from bench import Bench
from harness import RUNS, Measured, at_least, row

from clip2scene.data.index import Index, write_index

KEYFRAMES = 28_130
"""Of nuScenes' training scenes."""
VERSION = "v1.0-copied"
_SHARED = ("attribute", "category", "sensor", "visibility")
_TOKEN = re.compile(r'"([0-9a-f]{8})([0-9a-f]{24})"')
_MARK = "@@@@@@@@"

_MEASURE = """
import gc, json, os, sys, time
import pyarrow.parquet, numpy
{imports}
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, started = resident(), time.perf_counter()
{load}
print(json.dumps([time.perf_counter() - started, resident() - before]))
"""
_DEVKIT = _MEASURE.format(
    imports="from nuscenes.nuscenes import NuScenes",
    load="loaded = NuScenes(version=sys.argv[2], dataroot=sys.argv[1], verbose=False)",
)
_OURS = _MEASURE.format(
    imports="from clip2scene.data.index import read_index",
    load="loaded = read_index(sys.argv[1]); frame = loaded.frames[-1]; frame.cameras, frame.sweeps",
)
_FILL = _MEASURE.format(imports="", load="filled = numpy.ones(int(sys.argv[1]), numpy.uint8)")


@functools.cache
def _loads(bench: Bench) -> tuple[list[list[float]], list[list[float]], str]:
    """[seconds, bytes] of each load of ours and of the devkit's, each in a process of its own, in turn."""
    index = bench.world
    copies = -(-bench.pick(KEYFRAMES // 20, KEYFRAMES) // len(index.frames))
    records = _copy_tables(index.root.path / index.version, index.root.path / VERSION, copies)
    frames = tuple(
        replace(frame, frame_id=f"{copy:08x}{frame.frame_id[8:]}") for copy in range(copies) for frame in index.frames
    )
    file = bench.folder / "copied.parquet"
    write_index(Index(index.dataset, index.root, VERSION, frames), file)
    runs = [(_load(_OURS, str(file)), _load(_DEVKIT, str(index.root.path), VERSION)) for _ in range(RUNS)]
    shutil.rmtree(index.root.path / VERSION)
    size = file.stat().st_size / 1e6
    ours, devkit = ([list(pair) for pair in side] for side in zip(*runs, strict=True))
    return ours, devkit, f"{len(frames)} keyframes, {records} table records; the index is {size:.1f} MB on disk"


def _load(code: str, *words: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def _copy_tables(source: Path, target: Path, copies: int) -> int:
    """Write the tables that many times over; returns how many records that makes."""
    target.mkdir()
    shared = {record["token"] for table in _SHARED for record in json.loads((source / f"{table}.json").read_text())}
    total = 0
    for file in sorted(source.glob("*.json")):
        if file.stem == "lidarseg":
            continue  # the devkit then loads none
        text = file.read_text(encoding="utf-8")
        records = len(json.loads(text))
        if file.stem in _SHARED or not records:
            (target / file.name).write_text(text, encoding="utf-8")
            total += records
            continue
        mark = _TOKEN.sub(lambda m: m[0] if m[0][1:-1] in shared else f'"{_MARK}{m[2]}"', text)
        body = mark.strip()[1:-1].strip()
        with (target / file.name).open("w", encoding="utf-8") as out:
            out.write("[")
            for copy in range(copies):
                out.write((",\n" if copy else "") + body.replace(_MARK, f"{copy:08x}"))
            out.write("]")
        total += records * copies
    return total


@row(
    "index-seconds",
    "index load, seconds",
    baseline="nuscenes-devkit, NuScenes(...)",
    goal=at_least(20),
    compare="baseline / ours",
)
def index_seconds(bench: Bench) -> Measured:
    ours, devkit, work = _loads(bench)
    held = statistics.median(run[1] for run in ours)
    filling = sorted(_load(_FILL, str(int(held)))[0] for _ in range(RUNS))
    limit = (
        f"a process that only fills as many fresh bytes as the index holds ({held / 1e6:.0f} MB) takes "
        f"{filling[0]:.2g} to {filling[-1]:.2g} s: whether this machine has such memory at hand is chance"
    )
    return Measured(work, [run[0] for run in ours], [run[0] for run in devkit], limit=limit)


@row(
    "index-memory",
    "index load, memory of a worker",
    baseline="nuscenes-devkit, NuScenes(...)",
    goal=at_least(20),
    compare="baseline / ours",
)
def index_memory(bench: Bench) -> Measured:
    ours, devkit, work = _loads(bench)
    mine = [run[1] for run in ours]
    keyframes = int(work.partition(" ")[0])
    limit = f"{statistics.median(mine) / keyframes:.0f} B a keyframe; its 17 poses alone are {17 * 16 * 8} B"
    return Measured(work, mine, [run[1] for run in devkit], unit="B", limit=limit)
