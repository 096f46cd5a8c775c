"""Commands as a user types them: how soon the first one answers, and a sweep against single runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from bench import REPOSITORY, Bench
from harness import RUNS, Measured, Skipped, at_most, paired, row, seconds

from clip2scene.config import StreetworldSettings

TRIALS = 12
_WORLD = StreetworldSettings(
    seed=3, train_scenes=9, val_scenes=1, keyframes_per_scene=2, sweeps_between_keyframes=2, lidar_beams=16,
    lidar_azimuth_steps=180,
)  # fmt: skip
_JOB: dict[str, Any] = {
    "name": "tiny",
    "stage": "distill",
    "dataset": {"kind": "streetworld", "train_split": "parametrizing", "eval_split": "verifying"},
    "teacher": {"model": "streetworld", "image_height_px": 224, "image_width_px": 400},
    "student": {"voxel_size_m": 1.0, "channels": [8, 8, 16]},
    "distill": {"num_sweeps": 2, "epochs": 2, "optimiser": {"kind": "adamw", "learning_rate": 0.01}},
    "resources": {"num_workers": 1, "checkpoint_every_epochs": 2},
}
_SPACE: dict[str, Any] = {
    "sweep": "bench",
    "parameters": {"distill.scr.tau": {"loguniform": [0.1, 2.0]}, "distill.stcr.lambda": {"loguniform": [0.1, 10.0]}},
    "num_trials": TRIALS,
    "scheduler": {"kind": "none"},
    "budget": {"epochs": 2},
}


def _command(*words: object) -> None:
    command = [sys.executable, "-m", "clip2scene.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ, check=False)
    if done.returncode:
        raise RuntimeError(f"clip2scene {' '.join(map(str, words))}: {done.stderr.strip()[-500:]}")


@row(
    "help",
    "start of `clip2scene --help`",
    baseline="none: the seconds themselves (beside them an empty Python)",
    goal=at_most(0.5),
    compare="ours",
)
def help_text(bench: Bench) -> Measured:
    ours, python = paired(
        lambda: _command("--help"), lambda: subprocess.run([sys.executable, "-c", ""], check=True), runs=7
    )
    return Measured("a process of its own", ours, python, limit="the base is an empty Python's start")


def _written(folder: Path, name: str, values: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@row(
    "sweep",
    f"sweep of {TRIALS} trials",
    baseline=f"{TRIALS} single runs that each extract",
    goal=at_most(0.2),
    compare="ours / baseline",
)
def sweep(bench: Bench) -> Measured:
    if not bench.full:
        raise Skipped("minutes; BENCH=full runs it")
    from clip2scene.streetworld.generate import generate

    root = bench.folder / "sweep-world"
    generate(root, _WORLD, seed=3, workers=bench.cores)
    dataset = _JOB["dataset"] | {"root": str(root), "streetworld": _WORLD.model_dump()}

    def single(number: int) -> None:
        folder = bench.folder / f"single-{number}"
        job = _JOB | {"storage": str(folder / "storage"), "dataset": dataset, "seed": number}
        _command("run", _written(folder, "job.yaml", job))

    folder = bench.folder / "sweep"
    job = _written(folder, "job.yaml", _JOB | {"storage": str(folder / "storage"), "dataset": dataset})
    space = _written(folder, "space.yaml", _SPACE)
    singles = [seconds(lambda number=number: single(number)) for number in range(RUNS // 2)]
    whole = seconds(lambda: _command("sweep", space, "--job", job))
    singles += [seconds(lambda number=number: single(number)) for number in range(RUNS // 2, RUNS)]
    keyframes = _WORLD.train_scenes * _WORLD.keyframes_per_scene
    return Measured(
        f"{6 * keyframes} images, two epochs; one sweep between {RUNS} single runs, whose time x {TRIALS} is the base",
        [whole] * RUNS,
        [TRIALS * one for one in singles],
        limit="a single run starts Ray and MLflow and encodes its images; the sweep does so once",
    )
