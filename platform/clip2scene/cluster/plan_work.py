"""What a plan is made of: the work of each stage with its time, and the whole.

A stage's time is its work by a measured rate (:mod:`clip2scene.cluster.rates`), shared by as many workers as find a
core or a GPU; where no rate was measured with a job's settings, there is no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from clip2scene.cluster.plan_data import Data
from clip2scene.cluster.plan_machine import Machine
from clip2scene.cluster.rates import Rate
from clip2scene.config import Job

UNITS = {
    "streetworld": "keyframes",
    "index": "keyframes",
    "extract": "images",
    "superpixels": "images",
    "distill": "clouds",
    "evaluate": "keyframes",
    "finetune": "clouds",
    "verify": "clouds",
    "start": "commands",
    "streetworld_clip": "steps",
}
"""What a stage's work is counted in, where no rate says so."""


@dataclass(frozen=True)
class Work:
    """What one stage has to do."""

    stage: str
    amount: int
    unit: str
    done: int = 0
    """Of ``amount``, found in the storage."""
    steps: int = 0
    """Of a training."""
    seconds: float | None = 0.0
    """None where nothing was measured."""
    gpus: float = 0
    """At work at a time."""
    stored_bytes: int = 0
    sources: tuple[str, ...] = ()
    """Of the time."""

    def plus(self, other: Work) -> Work:
        """The same stage of another job, after this one's."""
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
    data: Data | None
    """Of the first job; None where a job has none."""
    machine: Machine
    wanted: tuple[str, ...]
    """Resources, a sentence each."""
    memory: Mapping[str, int] | None
    """Of the training worker that needs the most, by what it is for; None where it cannot be said."""
    actor_memory: int | None
    """Of an actor that encodes; None where nothing is encoded."""
    unschedulable: tuple[str, ...] = ()
    """Why Ray would wait for ever."""
    no_room: tuple[str, ...] = ()
    """What the disk cannot take."""
    notes: tuple[str, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)
    """Counts of a sweep or a table."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it would not run to its end."""
        return (*self.unschedulable, *self.no_room)

    @property
    def refusal(self) -> str:
        """The problems in a sentence, each kind after its lead word."""
        kinds = {"never schedulable": self.unschedulable, "disk too small": self.no_room}
        return "; ".join(f"{lead}: {'; '.join(problems)}" for lead, problems in kinds.items() if problems)

    @property
    def seconds(self) -> float | None:
        """Of everything; None where a stage's are not known."""
        known = [work.seconds for work in self.works if work.seconds is not None]
        return sum(known) if len(known) == len(self.works) else None

    @property
    def gpus(self) -> float:
        """The most that are at work at a time."""
        return max((work.gpus for work in self.works), default=0)

    @property
    def gpu_hours(self) -> float | None:
        """With the most GPUs held from beginning to end."""
        return None if self.seconds is None else self.gpus * self.seconds / 3600

    @property
    def stored_bytes(self) -> int:
        """To be written."""
        return sum(work.stored_bytes for work in self.works)


def asks(stage: str, job: Job) -> tuple[int, int, float]:
    """Workers of a stage, threads and GPUs of each."""
    if stage in ("index", "start", "streetworld_clip"):
        return 1, 1, 0
    if stage in ("streetworld", "superpixels"):
        return job.extract.num_actors, 1, 0
    if stage == "extract":
        return job.extract.num_actors, job.extract.threads_per_actor, job.extract.gpus_per_actor
    resources = job.resources
    return max(resources.num_workers, 1), resources.threads_per_worker, resources.gpus_per_worker


def seconds_of(rate: Rate | None, amount: int, at_work: int, runs: int = 1) -> float | None:
    """Time of ``amount`` in ``runs`` runs, shared by the workers at work; None without a rate."""
    return None if rate is None else runs * rate.start_s + amount / (rate.per_second * at_work)


def source_of(rate: Rate | None, gpus: float, at_work: int) -> tuple[str, ...]:
    """Where the time of a stage comes from, or why there is none."""
    if rate is None:
        return ("not measured on a GPU; no estimate" if gpus else "not measured with these settings; no estimate",)
    linear = f"; with {at_work} instead of {rate.workers} at work as if linear, an upper bound of the speed"
    return (rate.source + (linear if at_work > rate.workers else ""),)
