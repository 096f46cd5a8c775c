"""Training on two workers against one, and what the machine's cores allow."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import Bench, ray_here
from harness import Measured, Skipped, at_least, row
from rows_student import distillation

GOAL = 1.7
_WARM_EPOCHS = 1

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


def _ceiling(duration_s: float) -> float:
    """Throughput of two processes that share nothing but the machine, relative to one: products and gathers."""

    def run(count: int) -> int:
        command = [sys.executable, "-c", _ALONE, str(duration_s)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        return sum(int(process.communicate()[0]) for process in processes)

    return statistics.median(run(2) / run(1) for _ in range(3))


def _rates(bench: Bench, workers: int, name: str, epochs: int) -> list[float]:
    """Frames per second of every epoch after the first."""
    from clip2scene.training.fit import fit

    training: Any = distillation(bench, num_workers=workers, threads_per_worker=1)
    settings = training.settings.model_copy(update={"epochs": _WARM_EPOCHS + epochs, "batch_size": 4})
    training = type(training)(**{**vars(training), "settings": settings})
    fitted = fit(training, name=name, folder=Path(bench.folder / "train"), resources=training.resources)
    return [epoch["frames_per_second"] for epoch in fitted.history[_WARM_EPOCHS:]]


@row(
    "workers-2",
    "training, 2 workers, samples/s",
    baseline="1 worker",
    goal=at_least(GOAL),
    compare="ours / baseline",
)
def two_workers(bench: Bench) -> Measured:
    if bench.cores < 2:
        raise Skipped("2 workers need 2 cores, here is 1")
    bench.store_path  # noqa: B018 (made here, before Ray is started for the training)
    rates: dict[int, list[float]] = {1: [], 2: []}
    epochs = bench.pick(3, 4)
    with ray_here(bench.cores + 1):
        for turn in range(2):
            for workers, kept in rates.items():
                kept += _rates(bench, workers, f"workers-{workers}-{turn}", epochs)
    allowed = _ceiling(bench.pick(2.0, 4.0))
    limit = f"two processes without any communication do {allowed:.2f}x the work of one on these {bench.cores} cores"
    work = "the demo's network, batches of 4 keyframes, one thread a worker, gloo"
    return Measured(work, rates[2], rates[1], unit="frames/s", limit=limit)
