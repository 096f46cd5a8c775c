"""A worker's memory is bounded by its settings: at every stage, a ten times larger dataset has the same peak."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

from commands import REPOSITORY

pytestmark = pytest.mark.long

TIMES, WITHIN = 10, 0.15
TRAININGS = 3
"""Per size; the median counts, because the peak of a single one may be 7% off."""
SETTINGS = [
    "dataset.kind=nuscenes",
    "teacher={model: streetworld, image_height_px: 112, image_width_px: 208}",
    "student={voxel_size_m: 0.5, channels: [16, 16, 32]}",
    "distill.num_sweeps=2",
    "distill.batch_size=4",
    "extract={num_actors: 1, frames_per_batch: 2}",
    # Fewer than in the small dataset.
    "resources={num_workers: 0, cached_frames: 4}",
]

MEASURE = r"""
import contextlib, json, os, re, sys, threading
from dataclasses import replace
from pathlib import Path
import psutil
from clip2scene.jobfile import load_job
from clip2scene.stages import Stages
from clip2scene.teacher.extract import extract
from clip2scene.training.fit import fit

stage, copies, steps, job, *words = sys.argv[1:]
stages = Stages(load_job(job, words))
index, frames = stages.index, (*stages.train_frames, *stages.eval_frames)
frames = tuple(replace(f, frame_id=f"{f.frame_id}-{copy}") for copy in range(int(copies)) for f in frames)

def peak(pid="self"):
    # Not getrusage's: a child inherits the peak of who started it.
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
    return 0

peaks = {}
if stage == "extract":
    import ray
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ended = threading.Event()
    def watch():
        while not ended.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name().startswith("ray::MapWorker"):
                        peaks["actor"] = max(peaks.get("actor", 0), peak(process.pid))
    watching = threading.Thread(target=watch)
    watching.start()
    extract(index, frames, stages.teacher, stages.job.extract, stages.store_path, storage=stages.storage)
    ended.set()
    watching.join()
else:
    training = replace(stages.distillation(), frames=frames)
    settings = training.settings.model_copy(update={"epochs": 100, "max_steps": int(steps)})
    training = replace(training, settings=settings)
    training.build()
    before = peak()
    fit(training, name=f"measured-{os.getpid()}", folder=stages.storage.root / "train")
    peaks = {"worker": peak() - before}  # without the interpreter and its libraries
print(json.dumps(peaks | {"frames": len(frames)}))
"""


@pytest.fixture(scope="module")
def measured(streetworld_root, tmp_path_factory) -> dict[int, dict[str, list[int]]]:
    """Peaks in bytes, by the number of copies of the dataset: of the extraction's actor, and of every training."""
    root, version = streetworld_root
    peaks: dict[int, dict[str, list[int]]] = {}
    for copies in (1, TIMES):
        storage = tmp_path_factory.mktemp(f"times-{copies}")
        words = [*SETTINGS, f"dataset.root={root}", f"dataset.version={version}", f"storage={storage}"]
        of_size = peaks.setdefault(copies, {})
        for stage in ("extract", *["distill"] * TRAININGS):
            # The same number of steps, so that only the number of keyframes differs.
            command = [sys.executable, "-c", MEASURE, stage, str(copies), "20", "jobs/demo.yaml", *words]
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                of_size.setdefault(name, []).append(value)
    assert peaks[TIMES]["frames"] == [TIMES * frames for frames in peaks[1]["frames"]]
    return peaks


def test_an_extraction_actor_needs_the_same_for_ten_times_the_keyframes(measured):
    (small,), (large,) = (measured[copies]["actor"] for copies in (1, TIMES))
    assert small > 200e6, "no actor was seen"
    assert abs(large - small) < WITHIN * small


def test_a_training_worker_needs_the_same_for_ten_times_the_keyframes(measured):
    small, large = (statistics.median(measured[copies]["worker"]) for copies in (1, TIMES))
    assert small > 20e6, "the job is too small to say anything"
    assert abs(large - small) < WITHIN * small, measured
