"""A plan and its parts: the work of each stage, with its time.

The time of a stage is its work divided by a measured rate (:mod:`clip2scene.cluster.rates`) and by the number of
workers that have a core or a GPU; without a rate that was measured with the job's settings, there is no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from clip2scene.cluster.plan_data import Data
from clip2scene.cluster.plan_machine import Machine
from clip2scene.cluster.rates import Rate, RatedStage
from clip2scene.config import Job

UNITS: Mapping[RatedStage, str] = {
    "streetworld": "keyframes",
    "index": "keyframes",
    "extract": "images",
    "superpixels": "images",
    "distill": "clouds",
    "evaluate": "keyframes",
    "finetune": "clouds",
    "predict": "keyframes",
    "verify": "clouds",
    "start": "commands",
}
"""Units of a stage's work, where there is no rate to name one."""


@dataclass(frozen=True)
class Work:
    """The work of one stage."""

    stage: RatedStage
    amount: int
    unit: str
    done: int = 0
    """How much of ``amount`` the storage has already."""
    steps: int = 0
    """Of a training."""
    seconds: float | None = 0.0
    """None if no rate was measured."""
    gpus: float = 0
    """In use at the same time."""
    stored_bytes: int = 0
    sources: tuple[str, ...] = ()
    """Where the time comes from."""

    def plus(self, other: Work) -> Work:
        """This work, followed by the same stage of another job."""
        unknown = self.seconds is None or other.seconds is None
        return replace(
            self,
            amount=self.amount + other.amount,
            done=self.done + other.done,
            steps=self.steps + other.steps,
            seconds=None if unknown else (self.seconds or 0) + (other.seconds or 0),
            gpus=max(self.gpus, other.gpus),
            stored_bytes=self.stored_bytes + other.stored_bytes,
            sources=tuple(dict.fromkeys((*self.sources, *other.sources))),
        )


@dataclass(frozen=True)
class Plan:
    """A dry run."""

    name: str
    works: tuple[Work, ...]
    data: Data
    """Of the first job."""
    machine: Machine
    wanted: tuple[str, ...]
    """One sentence per kind of resource."""
    memory: Mapping[str, int] | None
    """Of the training worker that needs the most, by purpose; None if unknown."""
    on_gpu: tuple[str, ...]
    """Purposes of ``memory`` that lie on the worker's GPU."""
    actor_memory: int | None
    """Of an extraction actor; None if nothing is encoded."""
    unschedulable: tuple[str, ...] = ()
    """Reasons why Ray would wait for ever."""
    no_room: tuple[str, ...] = ()
    """What the disk cannot take."""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    """Counts of a sweep or a table."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Reasons why it would not finish."""
        return (*self.unschedulable, *self.no_room)

    @property
    def refusal(self) -> str:
        """The problems in one sentence, grouped by kind."""
        kinds = {"never schedulable": self.unschedulable, "disk too small": self.no_room}
        return "; ".join(f"{lead}: {'; '.join(problems)}" for lead, problems in kinds.items() if problems)

    @property
    def seconds(self) -> float | None:
        """Total time; None if that of a stage is unknown."""
        known = [work.seconds for work in self.works if work.seconds is not None]
        return sum(known) if len(known) == len(self.works) else None

    @property
    def gpus(self) -> float:
        """Most GPUs in use at the same time."""
        return max((work.gpus for work in self.works), default=0)

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours, if the most GPUs are held from beginning to end."""
        return None if self.seconds is None else self.gpus * self.seconds / 3600

    @property
    def gpu_memory(self) -> int:
        """Bytes on the GPU of the training worker that needs the most; 0 where that is unknown too."""
        return sum(self.memory[purpose] for purpose in self.on_gpu) if self.memory is not None else 0

    @property
    def stored_bytes(self) -> int:
        """Bytes to be written."""
        return sum(work.stored_bytes for work in self.works)


def asks(stage: RatedStage, job: Job) -> tuple[int, int, float]:
    """Number of workers of a stage, and threads and GPUs of each."""
    if stage in ("index", "start"):
        return 1, 1, 0
    if stage in ("streetworld", "superpixels"):
        return job.extract.num_actors, 1, 0
    if stage == "extract":
        return job.extract.num_actors, job.extract.threads_per_actor, job.extract.gpus_per_actor
    resources = job.resources
    return max(resources.num_workers, 1), resources.threads_per_worker, resources.gpus_per_worker


def seconds_of(rate: Rate | None, amount: int, at_work: int, runs: int = 1) -> float | None:
    """Time of ``amount`` in ``runs`` runs, shared by ``at_work`` workers; None without a rate."""
    return None if rate is None else runs * rate.start_s + amount / (rate.per_second * at_work)


def source_of(rate: Rate | None, gpus: float, at_work: int) -> tuple[str, ...]:
    """Where the time of a stage comes from, or why it has none."""
    if rate is None:
        return ("not measured on a GPU; no estimate" if gpus else "not measured with these settings; no estimate",)
    linear = f"; scaled linearly from {rate.workers} to {at_work} workers, which is optimistic"
    return (rate.source + (linear if at_work > rate.workers else ""),)
