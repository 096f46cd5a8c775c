"""The teacher: dense features against open_clip's own encoder, extraction against a bare loop and against itself."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import Bench, ray_here
from harness import Measured, Skipped, at_least, paired, row

from clip2scene.config import ExtractSettings, TeacherSettings
from clip2scene.data.clouds import read_image
from clip2scene.data.index import Frame
from clip2scene.storage import Storage
from clip2scene.teacher import store
from clip2scene.teacher.clip import load_teacher

CAMERAS = 6
WINDOWS = 3
"""Rates that are taken of one extraction, one after another, once every worker encodes."""


@row(
    "teacher-forward",
    "teacher's dense forward",
    baseline="open_clip's encode_image, same weights and resolution",
    goal=at_least(1.0),
    compare="baseline / ours",
)
def teacher_forward(bench: Bench) -> Measured:
    torch.set_num_threads(bench.cores)
    settings = TeacherSettings(pretrained="random") if bench.full else bench.teacher_settings
    teacher = load_teacher(settings)
    clip: Any = teacher.clip
    size = (settings.image_height_px, settings.image_width_px)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, baseline = paired(lambda: teacher(images), lambda: clip.encode_image(images), runs=9)
    work = f"{settings.model}, 2 images of {size[0]} x {size[1]}, fp32, {torch.get_num_threads()} threads"
    blocks = len(clip.visual.transformer.resblocks)
    limit = f"the value path does 1/12 of a block's matrix products: at most {blocks / (blocks - 1 + 2 / 12):.2f}x"
    return Measured(work, ours, baseline, limit=limit)


def _frames(bench: Bench) -> list[Frame]:
    """The world's keyframes several times under other ids, enough for a steady rate."""
    index = bench.world
    repeats = bench.pick(8, 16)
    return [replace(f, frame_id=f"{f.frame_id}-{copy}") for copy in range(repeats) for f in index.frames]


def _rates(folder: Path) -> list[float]:
    """Images per second of equal windows, by when the frames' files were written, once every worker encodes."""
    written = sorted(path.stat().st_mtime_ns / 1e9 for path in (folder / "frames").iterdir())
    written = written[len(written) // 5 :]
    edges = [round(i * (len(written) - 1) / WINDOWS) for i in range(WINDOWS + 1)]
    return [CAMERAS * (high - low) / (written[high] - written[low]) for low, high in itertools.pairwise(edges)]


def _extract(bench: Bench, actors: int, name: str) -> list[float]:
    """Rates of an extraction with that many actors."""
    from clip2scene.teacher.clip import load_teacher
    from clip2scene.teacher.extract import extract

    teacher = load_teacher(bench.teacher_settings)
    settings, path = ExtractSettings(num_actors=actors), bench.folder / name
    extract(bench.world, _frames(bench), teacher, settings, path, storage=Storage(path))
    return _rates(path)


def _bare_loop(bench: Bench, name: str) -> list[float]:
    """Rates of a plain PyTorch loop that decodes, encodes and stores the same frames, one thread."""
    torch.set_num_threads(1)
    teacher, index = load_teacher(bench.teacher_settings), bench.world
    for frame in _frames(bench):
        images = [read_image(index.root.path_of(c.image_path), c.width, c.height) for c in frame.cameras]
        features = teacher(torch.stack([teacher.preprocess(image) for image in images])).numpy()
        named = dict(zip((camera.name for camera in frame.cameras), features, strict=True))
        store.write_frame(bench.folder / name, frame.frame_id, named, {}, teacher.digest, Storage(bench.folder))
    return _rates(bench.folder / name)


@functools.cache
def _extractions(bench: Bench) -> dict[str, list[float]]:
    """Rates by kind, the kinds in turn; how many of each is a round."""
    rates: dict[str, list[float]] = {"bare": []}
    workers = [n for n in (1, 2, 4) if n <= bench.cores]
    with ray_here(bench.cores + 1):
        for turn in range(2):
            rates["bare"] += _bare_loop(bench, f"bare-{turn}")
            for actors in workers:
                rates.setdefault(str(actors), []).extend(_extract(bench, actors, f"extract-{actors}-{turn}"))
    return rates


def _work(bench: Bench) -> str:
    frames = _frames(bench)
    return f"{len(frames)} frames of {len(frames[0].cameras)} images, streetworld's CLIP, one thread a worker"


_START_UP = "the rates begin when all workers encode: neither Ray's start nor the loading of weights counts"


@row(
    "extract-1",
    "extraction, one worker",
    baseline="a bare PyTorch loop: decode, encode, store",
    goal=at_least(0.95),
    compare="ours / baseline",
)
def extract_one(bench: Bench) -> Measured:
    rates = _extractions(bench)
    return Measured(_work(bench), rates["1"], rates["bare"], unit="images/s", limit=_START_UP)


def _scaling(bench: Bench, actors: int) -> Measured:
    if bench.cores < actors:
        raise Skipped(f"{actors} workers need {actors} cores, here are {bench.cores}")
    rates = _extractions(bench)
    linear = [actors * rate for rate in rates["1"]]
    limit = f"{_START_UP}; {bench.processes(actors)}, and the driver and Ray itself take part of them"
    return Measured(_work(bench), rates[str(actors)], linear, unit="images/s", limit=limit)


@row(
    "extract-2",
    "extraction, 2 workers",
    baseline="2 x one worker",
    goal=at_least(0.9),
    compare="ours / baseline",
)
def extract_two(bench: Bench) -> Measured:
    return _scaling(bench, 2)


@row(
    "extract-4",
    "extraction, 4 workers",
    baseline="4 x one worker",
    goal=at_least(0.9),
    compare="ours / baseline",
)
def extract_four(bench: Bench) -> Measured:
    return _scaling(bench, 4)
