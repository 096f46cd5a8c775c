"""A search space on a job: every trial is that job with some settings changed, validated before anything runs."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip2scene.config import TEXT_FREE, Job, WorkerSettings, digest_of
from clip2scene.errors import ConfigError
from clip2scene.jobfile import kind_of, parse, put, read_values
from clip2scene.remote import is_remote
from clip2scene.sweeps.space import TRAIN_SPLIT, VERIFY_SPLIT, Space, TrialResources
from clip2scene.sweeps.unread import why_unread
from clip2scene.tracking.run import flatten

_FIXED = {"stage": "distill", "dataset.train_split": TRAIN_SPLIT, "dataset.eval_split": VERIFY_SPLIT}
"""What every trial does, whatever its job says."""


@dataclass(frozen=True)
class Trial:
    """One configuration with one seed."""

    number: int
    seed: int
    values: Mapping[str, Any]
    """Value per dotted key of the space's parameters."""
    variant: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A search space combined with a job."""

    space: Space
    job_values: Mapping[str, Any]
    """The job file's values, with the user's changes."""

    @property
    def digest(self) -> str:
        """Hash of everything that decides the trials, so neither the title nor the hours."""
        return digest_of(*self._deciding)

    @property
    def _deciding(self) -> tuple[dict[str, Any], dict[str, Any]]:
        space = self.space.model_dump(mode="json", by_alias=True, exclude={"title": True, "budget": {"hours"}})
        return space, self.job.model_dump(mode="json", by_alias=True, exclude={"name", "storage"})

    def differences(self, held: Sweep) -> dict[str, tuple[str, str]]:
        """Values of this sweep and of another one, by the keys that decide trials and differ (``job.seed``)."""
        ours, theirs = (flatten(space | {"job": job}) for space, job in (self._deciding, held._deciding))
        both = {key: (ours.get(key, "null"), theirs.get(key, "null")) for key in {**ours, **theirs}}
        return {key: values for key, values in both.items() if values[0] != values[1]}

    @functools.cached_property
    def job(self) -> Job:
        """The user's job."""
        return Job.model_validate(self.job_values)

    @property
    def epochs(self) -> int:
        """Epochs of a trial that is not stopped."""
        return self.space.budget.epochs or self.job.distill.epochs

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that every configuration is trained with."""
        return self.space.seeds or (self.job.seed,)

    @property
    def extremes(self) -> tuple[Trial, ...]:
        """Per variant, trials that move one parameter at a time to each extreme: if these are valid, all are."""
        space = self.space
        first = {key: distribution.extremes[0] for key, distribution in space.parameters.items()}
        others = [{key: value} for key, distribution in space.parameters.items() for value in distribution.extremes[1:]]
        return tuple(
            Trial(0, self.seeds[0], first | change, variant)
            for variant in space.variants or (None,)
            for change in ({}, *others)
        )

    @functools.cached_property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in order; with ``searcher=tpe`` only their number and seed are known before they run."""
        space = self.space
        grids = {key: distribution for key, distribution in space.parameters.items() if distribution.grid is not None}
        drawn = {key: distribution for key, distribution in space.parameters.items() if distribution.grid is None}
        rng = np.random.default_rng(space.seed)
        draws = [{key: distribution.draw(rng) for key, distribution in drawn.items()} for _ in range(space.num_trials)]
        if space.searcher == "tpe":
            draws = [{} for _ in draws]
        corners = [
            dict(zip(grids, corner, strict=True))
            for corner in itertools.product(*(distribution.values for distribution in grids.values()))
        ]
        configurations = itertools.product(space.variants or (None,), corners, draws, self.seeds)
        return tuple(
            Trial(
                number, seed, {key: (corner | draw)[key] for key in space.parameters if key in corner | draw}, variant
            )
            for number, (variant, corner, draw, seed) in enumerate(configurations)
        )

    def setter_of(self, key: str) -> str | None:
        """What sets a setting of the job for every trial, whatever the job says; None if the job does."""
        space = self.space
        by_variants = set.intersection(*(set(changes) for changes in space.variants.values())) if space.variants else ()
        if key in _FIXED:
            return "the sweep itself"
        if key in space.parameters:
            return f"parameters.{key} of the space"
        if key in by_variants or key in space.set_:
            return "the space"
        if key == "seed" and space.seeds:
            return "the space's seeds"
        if key == "distill.epochs" and space.budget.epochs:
            return "budget.epochs of the space"
        if key.startswith("resources.") and key.removeprefix("resources.") in TrialResources.model_fields:
            # Without a word of the space, trials have the workers of a job on GPUs.
            own = "resources" in space.model_fields_set or not self.job.resources.gpus_per_worker
            return f"{key} of the space" if own else None
        return None

    def with_trials_of(self, other: Sweep) -> Sweep | None:
        """This sweep with as many draws as another; None unless that only adds trials after those of this one."""
        longer = Sweep(self.space.model_copy(update={"num_trials": other.space.num_trials}), self.job_values)
        adds = len(longer.trials) > len(self.trials) and longer.trials[: len(self.trials)] == self.trials
        return longer if adds and self.space.searcher == "random" else None

    def job_of(self, trial: Trial, source: str = "trial") -> Job:
        """The job that a trial runs.

        Raises:
            ConfigError: the values do not make a valid job.
        """
        space, values = self.space, copy.deepcopy(dict(self.job_values))
        changes: dict[str, Any] = {
            **_FIXED,
            "seed": trial.seed,
            "distill.epochs": self.epochs,
            **{f"resources.{name}": value for name, value in space.resources.model_dump().items()},
        }
        if self.job.dataset.kind == "streetworld":
            changes["dataset.streetworld.seed"] = self.job.world_seed
        changes |= {**space.set_, **(space.variants[trial.variant] if trial.variant else {}), **trial.values}
        for key, value in changes.items():
            put(values, key, value, source)
        return parse(Job, values, source)


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the space, and those of the job without their ``job.``."""
    of_job = [override.removeprefix("job.") for override in overrides if override.startswith("job.")]
    return [override for override in overrides if not override.startswith("job.")], of_job


def load_sweep(space_path: str | Path, job_path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a search space and a job; ``key=value`` overrides the space, ``job.key=value`` the job.

    Raises:
        ConfigError: a file cannot be read, or a key or value is wrong, in the space or in any trial.
    """
    if (kind := kind_of(job_path)) != "job":
        raise ConfigError(f"--job {job_path}: a {kind}, but a job is needed")
    of_space, of_job = split_overrides(overrides)
    sweep = combine(
        read_values(space_path, of_space, "sweep"),
        read_values(job_path, of_job, "job"),
        str(space_path),
        str(job_path),
    )
    for key in (override.partition("=")[0] for override in of_job):
        if setter := sweep.setter_of(key):
            raise ConfigError(f"job.{key}: changes nothing, as {setter} sets it for every trial")
    return sweep


def combine(space: dict[str, Any], job: dict[str, Any], space_source: str, job_source: str) -> Sweep:
    """Validate a space, a job, and the space's values in the job.

    Raises:
        ConfigError: as for :func:`load_sweep`; or the storage is an object store, which cannot hold Ray Tune's state.
    """
    base = parse(Job, job, job_source)
    if "sweep" not in space:
        raise ConfigError(f"{space_source}: no search space (it has no key 'sweep')")
    sweep = Sweep(_with_gpus_of(base, parse(Space, space, space_source)), job)
    if is_remote(base.storage):
        raise ConfigError(f"{job_source}: storage={base.storage}: a sweep needs a folder that all its nodes see")
    where = f"{space_source} on {job_source}"
    jobs = [sweep.job_of(trial, where) for trial in sweep.extremes]
    for key in sweep.space.parameters:
        reasons = [why_unread(key, made.distill) for made in jobs]
        if all(reasons):
            raise ConfigError(f"{where}: {key} changes nothing with {reasons[0]}; leave it out")
    for made in jobs:
        if made.distill.method in TEXT_FREE:
            raise ConfigError(f"{where}: distill.method={made.distill.method} cannot be scored without fine-tuning")
        if made.distill.max_steps is not None:
            raise ConfigError(
                f"{where}: distill.max_steps={made.distill.max_steps}: a trial runs the budget's epochs; give "
                "budget.epochs instead (job.distill.max_steps=null)"
            )
        if sweep.space.scheduler.kind == "asha" and sweep.space.scheduler.grace_epochs > sweep.epochs:
            raise ConfigError(
                f"{where}: scheduler.grace_epochs={sweep.space.scheduler.grace_epochs} is above the {sweep.epochs} "
                "epochs of a trial"
            )
    return sweep


def _with_gpus_of(base: Job, space: Space) -> Space:
    """The space; where it says nothing of resources, with the workers of a job that trains on GPUs."""
    if "resources" in space.model_fields_set or not base.resources.gpus_per_worker:
        return space
    shared = base.resources.model_dump(include=set(WorkerSettings.model_fields))
    return space.model_copy(update={"resources": TrialResources(**shared)})
