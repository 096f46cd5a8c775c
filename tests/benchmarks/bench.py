"""What the rows share: the mode, a scratch folder, two street worlds and the feature store of one of them."""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from harness import seconds

from clip2scene.config import ExtractSettings, Job, StreetworldSettings, TeacherSettings
from clip2scene.data.index import Index
from clip2scene.jobfile import load_job
from clip2scene.storage import Storage

REPOSITORY = Path(__file__).resolve().parents[2]
_MEBIBYTE = 2**20


class Bench:
    """One run of the benchmarks."""

    def __init__(self, folder: Path, mode: str):
        self.folder, self.full = folder, mode == "full"

    def pick(self, quick: Any, full: Any) -> Any:
        """The size of a row's work in this mode."""
        return full if self.full else quick

    @functools.cached_property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def processes(self, count: int) -> str:
        """What so many processes that share nothing but the machine do beside one: products and gathers."""

        def run(count: int) -> int:
            command = [sys.executable, "-c", _ALONE, str(self.pick(2.0, 4.0))]
            started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
            return sum(int(process.communicate()[0]) for process in started)

        more = statistics.median(run(count) / run(1) for _ in range(3))
        return f"{count} processes without any communication do {more:.2f}x the work of one on these {self.cores} cores"

    @functools.cached_property
    def memory_bandwidth(self) -> float:
        """Bytes read and written per second by one thread's copy of 256 MiB, the best of five."""
        source = np.ones(256 * _MEBIBYTE, dtype=np.uint8)
        target = np.empty_like(source)
        np.copyto(target, source)
        return 2 * source.nbytes / min(seconds(lambda: np.copyto(target, source)) for _ in range(5))

    def moved(self, num_bytes: float) -> str:
        """How long one thread takes to move that many bytes."""
        return f"{num_bytes / _MEBIBYTE:.0f} MiB moved = {1e3 * num_bytes / self.memory_bandwidth:.3g} ms of memcpy"

    def _world(self, name: str, settings: StreetworldSettings) -> Index:
        from clip2scene.data.nuscenes import build_index
        from clip2scene.streetworld.generate import generate

        root = self.folder / name
        generate(root, settings, seed=7, workers=self.cores)
        return build_index(root, "v1.0-trainval")

    @functools.cached_property
    def dense_world(self) -> Index:
        """Four keyframes with clouds of nuScenes' size: 32 beams x 1084 azimuths, ten sweeps between keyframes."""
        return self._world(
            "dense",
            StreetworldSettings(
                train_scenes=1, val_scenes=1, keyframes_per_scene=2, lidar_beams=32, lidar_azimuth_steps=1084
            ),
        )

    @functools.cached_property
    def world(self) -> Index:
        """Keyframes like the demo's."""
        scenes = self.pick(3, 7)
        return self._world("street", StreetworldSettings(train_scenes=scenes, val_scenes=1, keyframes_per_scene=2))

    @functools.cached_property
    def job(self) -> Job:
        """The demo's job, on :attr:`world`."""
        return load_job(REPOSITORY / "jobs" / "demo.yaml", [f"storage={self.folder / 'storage'}"])

    @property
    def teacher_settings(self) -> TeacherSettings:
        """The small CLIP that ships with the package, as in the demo."""
        return self.job.teacher

    @functools.cached_property
    def store_path(self) -> Path:
        """A finished feature store of :attr:`world`."""
        from clip2scene.teacher.clip import load_teacher
        from clip2scene.teacher.extract import extract

        path = self.folder / "features"
        with ray_here(self.cores):
            extract(
                self.world,
                self.world.frames,
                load_teacher(self.teacher_settings),
                ExtractSettings(),
                path,
                storage=Storage(path),
            )
        return path


_ALONE = """
import sys, time
import torch
torch.set_num_threads(1)
a, b = torch.randn(768, 768), torch.randn(20_000, 512)
rows = torch.randint(0, 20_000, (60_000,))
deadline, done = time.perf_counter() + float(sys.argv[1]), 0
while time.perf_counter() < deadline:
    a @ a
    b.index_select(0, rows).sum()
    done += 1
print(done)
"""


@contextlib.contextmanager
def ray_here(num_cpus: int) -> Iterator[None]:
    """An embedded Ray for the length of a block."""
    import ray

    from clip2scene.cluster.session import TRAIN_POLLING

    os.environ.setdefault(*TRAIN_POLLING)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local", num_cpus=max(num_cpus, 2), include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    try:
        yield
    finally:
        ray.shutdown()


def median_ms(samples: list[float]) -> str:
    return f"{1e3 * statistics.median(samples):.3g} ms"
