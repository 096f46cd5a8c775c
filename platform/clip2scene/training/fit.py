"""The one training loop: epochs, data-parallel steps, checkpoints, resume. What is learned is a subclass."""

from __future__ import annotations

import itertools
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clip2scene.config import ResourceSettings, StudentSettings, TrainingSettings
from clip2scene.data.index import Frame
from clip2scene.errors import DivergedError, TrainingError
from clip2scene.progress import Advance, uncounted
from clip2scene.student.network import Forward
from clip2scene.training.launch import Worker, launch
from clip2scene.training.samples import Reader, Sample, SampleSource, augment, cached_reader, join, prefetched
from clip2scene.training.validation import Validation

Metrics = dict[str, float]
_REPORT_EVERY_S = 0.2
"""Limits messages: GPU steps are faster than the driver needs to hear of."""
_ATTEMPTS = 2
"""If the final checkpoint is unreadable, the epochs since the one before are trained again, once."""


def steps_of(settings: TrainingSettings, num_frames: int) -> int:
    """Steps of a training on that many keyframes."""
    steps = settings.epochs * math.ceil(num_frames / settings.batch_size)
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


@dataclass(frozen=True)
class Training(ABC):
    """Everything that a worker needs to train; subclasses define the network and the loss."""

    seed: int
    frames: tuple[Frame, ...]
    source: SampleSource
    resources: ResourceSettings
    student: StudentSettings
    settings: TrainingSettings
    validation: Validation | None = field(default=None, kw_only=True)
    """Adds held-out scores to an epoch's metrics; it does not change what is learned."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network with its initial weights; random ones come from torch's global generator, which is seeded."""

    @abstractmethod
    def loss(self, model: Forward, batch: Sample, epoch: int, step: int) -> dict[str, torch.Tensor]:
        """Named scalars; ``loss`` is the one to minimise."""

    def learning_rate_scale(self, parameter: str) -> float:
        """Learning rate of a named parameter relative to the optimiser's."""
        return 1.0

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every keyframe was seen; the last batch is filled up from the start of the order."""
        return math.ceil(len(self.frames) / self.settings.batch_size)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return steps_of(self.settings, len(self.frames))

    @property
    def num_epochs(self) -> int:
        """Epochs in all; ``max_steps`` may cut the last one short."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def __call__(self, worker: Worker) -> None:
        """Train on this worker; rank 0 emits ``step`` every now and then, and ``epoch`` with each epoch's metrics."""
        torch.manual_seed(self.seed)
        learner = _Learner(self, worker.device)
        checkpoint = worker.last_checkpoint()
        history = [] if checkpoint is None else learner.read(checkpoint)
        for metrics in history:
            worker.emit("epoch", metrics)
        network = self._network(learner.model, worker)
        read = cached_reader(self.source, self.frames, self.resources.cached_frames)
        on_gpu = worker.device.type == "cuda"  # on CPUs the network itself takes all threads
        read_map: Any = ThreadPoolExecutor(self.resources.threads_per_worker).map if on_gpu else map
        validate: Callable[[nn.Module], Metrics] = _no_scores
        validate_every = 1
        if self.validation is not None:
            validate, validate_every = self.validation.prepare(worker), self.validation.every_epochs
        worker.emit("step", min(len(history) * self.steps_per_epoch, self.steps))
        for epoch in range(len(history), self.num_epochs):
            batches = self._batches(read, worker, epoch, read_map)
            metrics = self._train_epoch(
                learner, network, worker, epoch, prefetched(batches, Sample.pinned) if on_gpu else batches
            )
            last = epoch + 1 == self.num_epochs
            if last or (epoch + 1) % validate_every == 0:
                metrics |= validate(learner.model)
            history.append(metrics)
            worker.emit("epoch", metrics)
            if last or (epoch + 1) % self.resources.checkpoint_every_epochs == 0:
                worker.save(lambda folder: learner.write(folder, history))

    def _network(self, model: nn.Module, worker: Worker) -> Forward:
        """The model as the loss calls it: with gradients averaged over the ranks, and in half precision if set."""
        wrapped = _data_parallel(model) if worker.world_size > 1 else model
        half = self.settings.precision == "fp16"
        return torch.autocast(worker.device.type, torch.float16, enabled=half)(lambda *given: wrapped(*given))

    def _train_epoch(
        self, learner: _Learner, network: Forward, worker: Worker, epoch: int, batches: Iterator[Sample]
    ) -> Metrics:
        """Train one epoch on this worker; returns its metrics, averaged over the ranks."""
        started, totals = time.perf_counter(), _Totals()
        reported = -math.inf  # so that an epoch's first step is reported at once
        learner.model.train()
        step = epoch * self.steps_per_epoch
        for batch in itertools.islice(batches, self.steps - step):
            terms = self.loss(network, batch.to(worker.device), epoch, step)
            learner.step(terms["loss"])
            totals.add(terms)
            step += 1
            if time.perf_counter() - reported > _REPORT_EVERY_S:
                reported = time.perf_counter()
                worker.emit("step", step)
        worker.emit("step", step)
        metrics = totals.mean(worker)
        if not math.isfinite(metrics["loss"]):
            shown = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            raise DivergedError(
                f"the loss is not finite after epoch {epoch + 1} ({shown}); lower the learning rate"
                + (" or train with precision=fp32" if self.settings.precision == "fp16" else "")
            )
        seconds = time.perf_counter() - started
        return metrics | {
            "epoch": float(epoch + 1),
            "learning_rate": learner.learning_rate,
            "frames_per_second": totals.count * self.settings.batch_size / seconds,
        }

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the optimiser's learning rate at a step: linear warm-up, then half a cosine down to 0."""
        warmup = self.settings.optimiser.warmup_fraction * self.steps
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1)))

    def _batches(self, read: Reader, worker: Worker, epoch: int, read_map: Any = map) -> Iterator[Sample]:
        """This rank's share of each batch of the epoch, in an order that depends on seed and epoch only.

        ``read_map`` reads the keyframes of a batch: ``map``, or one that reads several at a time.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.frames))
        order = np.resize(order, self.steps_per_epoch * self.settings.batch_size)
        share = self.settings.batch_size // worker.world_size
        for start in range(worker.rank * share, len(order), self.settings.batch_size):
            places = range(start, start + share)
            yield join([*read_map(lambda at: self._augmented(read, epoch, at, int(order[at])), places)])

    def _augmented(self, read: Reader, epoch: int, at: int, position: int) -> Sample:
        rng = np.random.default_rng([self.seed, epoch, at])
        return augment(read(position, rng), self.settings.augment, rng)


@dataclass(frozen=True)
class Fitted:
    """A finished training."""

    weights: dict[str, torch.Tensor]
    history: list[Metrics]
    """The metrics of each epoch."""


def fit(
    training: Training,
    *,
    name: str,
    folder: Path,
    on_epoch: Callable[[int, Metrics], None] = lambda epoch, metrics: None,
    on_steps: Advance = uncounted,
) -> Fitted:
    """Train on all workers of its resources; an unfinished run of the same name continues from its last checkpoint.

    Args:
        training: what to learn.
        name: of the run below ``folder``.
        folder: absolute, shared by all nodes.
        on_epoch: called once per epoch, including those of an earlier attempt.
        on_steps: called with the number of steps finished since the last call; first with those of an earlier attempt,
            as ``restored``, if there are any.

    Raises:
        DataError: this process met a damaged file; from a Ray worker it is a TrainingError with the same message.
        DivergedError: the loss is not finite.
        TrainingError: the run failed.
    """
    reported: set[int] = set()
    steps: int | None = None

    def on_message(kind: str, value: Any) -> None:
        nonlocal steps
        if kind == "step" and steps is None:  # a worker begins with those of its checkpoint
            steps = value
            if value:
                on_steps(value, restored=True)
        elif kind == "step" and value > steps:  # the steps of a lost epoch are reported again
            on_steps(value - steps)
            steps = value
        elif kind == "epoch" and int(value["epoch"]) not in reported:
            reported.add(int(value["epoch"]))
            on_epoch(int(value["epoch"]), {key: number for key, number in value.items() if key != "epoch"})

    epochs = 0
    for _ in range(_ATTEMPTS):
        checkpoint = launch(training, name=name, folder=folder, resources=training.resources, on_message=on_message)
        if checkpoint is not None:
            history = json.loads((checkpoint / "history.json").read_text(encoding="utf-8"))
            epochs = len(history)
            if epochs == training.num_epochs:
                return Fitted(load_file(checkpoint / "model.safetensors"), history)
    raise TrainingError(
        f"run {name} ended, but its last intact checkpoint is of epoch {epochs} of {training.num_epochs}; run it again"
    )


def _data_parallel(model: nn.Module) -> nn.Module:
    """Sum gradients over the ranks in an order that a restart does not change.

    Unless it looks for unused parameters, torch rebuilds its gradient buckets after the first step of a process. A
    gradient's position in them decides in which order three or more ranks are summed, so a training that was resumed
    would differ in the last bit from one that was not interrupted.
    """
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")  # there are none
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def _no_scores(model: nn.Module) -> Metrics:
    return {}


class _Learner:
    """The network, optimiser, schedule and loss scaler: everything that a checkpoint holds."""

    def __init__(self, training: Training, device: torch.device):
        self._training = training
        self.model = training.build().to(device)
        self._optimiser = self._make_optimiser()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, training.learning_rate_factor)
        self._scaler = torch.amp.GradScaler(device.type, enabled=training.settings.precision == "fp16")
        if self._scaler.is_enabled():
            # A step that overflows is skipped, but the schedule goes on; torch warns if it is the first one.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")

    @property
    def learning_rate(self) -> float:
        """For the next step; the backbone's if it differs from the head's."""
        return float(self._schedule.get_last_lr()[0])

    def step(self, loss: torch.Tensor) -> None:
        """Take one optimiser step on a loss."""
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()

    def write(self, folder: Path, history: list[Metrics]) -> None:
        """Write a checkpoint with the metrics of the epochs so far."""
        weights = {key: value.contiguous() for key, value in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        torch.save({name: part.state_dict() for name, part in self._parts().items()}, folder / "optimiser.pt")
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")

    def read(self, folder: Path) -> list[Metrics]:
        """Load a checkpoint; returns its metrics."""
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        # load_state_dict moves the moments to their parameters; AdamW's step counters stay on the CPU, or reading them
        # would synchronise.
        saved = torch.load(folder / "optimiser.pt", weights_only=True, map_location="cpu")
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        history: list[Metrics] = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        return history

    def _parts(self) -> dict[str, Any]:
        return {"optimiser": self._optimiser, "schedule": self._schedule, "scaler": self._scaler}

    def _make_optimiser(self) -> torch.optim.Optimizer:
        settings = self._training.settings.optimiser
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(self._training.learning_rate_scale(name), []).append(parameter)
        scaled = [{"params": ps, "lr": settings.learning_rate * scale} for scale, ps in groups.items()]
        if settings.kind == "adamw":
            return torch.optim.AdamW(scaled, weight_decay=settings.weight_decay)
        return torch.optim.SGD(
            scaled,
            momentum=settings.momentum,
            dampening=settings.dampening,
            weight_decay=settings.weight_decay,
        )


class _Totals:
    """Sums of an epoch's loss terms, kept on the device until the epoch ends."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        self.count += 1
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value.detach()

    def mean(self, worker: Worker) -> Metrics:
        values = torch.stack(list(self._sums.values())).double() / self.count
        if worker.world_size > 1:
            torch.distributed.all_reduce(values)
            values /= worker.world_size
        return dict(zip(self._sums, values.tolist(), strict=True))
