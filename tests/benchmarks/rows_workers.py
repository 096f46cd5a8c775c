"""Training on two workers against one, and what the machine's cores allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import Bench, ray_here
from harness import Measured, Skipped, at_least, row
from rows_student import distillation

GOAL = 1.7
_WARM_EPOCHS = 1


def _rates(bench: Bench, workers: int, name: str, epochs: int) -> list[float]:
    """Frames per second of every epoch after the first."""
    from clip2scene.training.fit import fit

    training: Any = distillation(bench, num_workers=workers, threads_per_worker=1)
    settings = training.settings.model_copy(update={"epochs": _WARM_EPOCHS + epochs, "batch_size": 4})
    training = type(training)(**{**vars(training), "settings": settings})
    fitted = fit(training, name=name, folder=Path(bench.folder / "train"))
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
    limit = f"{bench.processes(2)}; every step waits for the slower of two, and sums their gradients"
    work = "the demo's network, batches of 4 keyframes, one thread a worker, gloo"
    return Measured(work, rates[2], rates[1], unit="frames/s", limit=limit)
