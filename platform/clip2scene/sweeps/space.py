"""What a sweep varies: distributions of settings, how they are searched, and what that may cost.

A space file is YAML with the key ``sweep``. It holds no job: ``clip2scene sweep SPACE --job JOB`` puts the two
together, and every trial is that job with some settings changed, validated before anything runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, model_validator

from clip2scene.config import TEXT_FREE, ConfigError, Gpus, Job, Settings, digest_of
from clip2scene.jobfile import kind_of, parse, put, read_values
from clip2scene.storage import is_remote
from clip2scene.sweeps.unread import why_unread

TRAIN_SPLIT, VERIFY_SPLIT = "parametrizing", "verifying"
"""What trials learn from and what they are compared on: both of the training scenes, so that reporting stays clean."""

_FEATURES = ("dataset", "teacher", "variant")
_ALLOWED = (*_FEATURES, "prompts", "student", "distill")
_SPLITS = ("dataset.train_split", "dataset.eval_split")
_FINITE = ("grid", "choice")


class Distribution(Settings):
    """Where a setting's values come from; exactly one of them."""

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Every one of these, each with everything else."""
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these, each as likely."""
    uniform: tuple[float, float] | None = None
    """Between two numbers."""
    loguniform: tuple[float, float] | None = None
    """Between two numbers above 0, uniform in the logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number between two, both included."""

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(type(self).model_fields)} is required, not {' and '.join(given) or 'none'}"
            )
        if given[0] in _FINITE:
            values = [repr(value) for value in self.values]
            if len(set(values)) < len(values):
                raise ValueError(f"{given[0]}={list(self.values)}: a value is there twice")
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"{given[0]}=[{low}, {high}]: empty; the first number must be below the second")
        if given[0] == "loguniform" and low <= 0:
            raise ValueError(f"loguniform=[{low}, {high}]: both numbers must be above 0")
        return self

    @property
    def kind(self) -> str:
        """``grid``, ``choice``, ``uniform``, ``loguniform`` or ``randint``."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a ``grid`` or a ``choice``; none of the others."""
        return self.grid or self.choice or ()

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value of the others."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that are allowed if all are."""
        return self.values or self.bounds

    def draw(self, rng: np.random.Generator) -> Any:
        """One value; not of a ``grid``."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        if self.randint is not None:
            return int(rng.integers(self.randint[0], self.randint[1], endpoint=True))
        low, high = self.bounds
        if self.loguniform is not None:
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return float(rng.uniform(low, high))


class Scheduler(Settings):
    """When a trial is given up before its last epoch."""

    kind: Literal["asha", "none"] = "asha"
    grace_epochs: int = Field(3, ge=1)
    """Every trial may learn for so long."""
    reduction_factor: int = Field(2, ge=2)
    """At each rung one in so many goes on."""


class Budget(Settings):
    """What a sweep may cost."""

    epochs: int | None = Field(None, ge=1)
    """Of a trial that is not stopped; the job's ``distill.epochs`` when not given."""
    hours: float | None = Field(None, gt=0)
    """After so long what still runs is stopped and the sweep has ended; counted anew when it goes on after a kill."""


class TrialResources(Settings):
    """What a trial gets, instead of the job's ``resources``."""

    num_workers: int = Field(0, ge=0)
    """0: the trial's own process. Else so many Ray Train workers below it."""
    threads_per_worker: int = Field(1, ge=1)
    gpus_per_worker: Gpus = 0
    """May be a fraction: 0.5 puts two workers on a GPU."""
    max_failures: int = Field(1, ge=0)
    """A trial that dies goes on from its last checkpoint, so often."""

    @model_validator(mode="after")
    def _gpus_need_workers(self) -> TrialResources:
        if self.gpus_per_worker and not self.num_workers:
            raise ValueError(f"resources.gpus_per_worker={self.gpus_per_worker:g} needs resources.num_workers above 0")
        return self


class Space(Settings):
    """A search space with its scheduler, searcher and budget."""

    sweep: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Its name for ``--resume`` and ``clip2scene report``."""
    title: str = ""
    parameters: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted keys of the job (``distill.scr.tau``)."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named sets of dotted keys and values; each is a trial, with every grid value and every draw."""
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Dotted keys and values that all trials share."""
    seeds: tuple[int, ...] = Field((), max_length=100)
    """Every configuration is trained with each of these; with the job's seed when not given. A street world stays that
    of the job's seed."""
    metric: Literal["miou", "agreement", "consistency", "label_free"] = "miou"
    """What is selected on: ``miou`` reads the labels of the verifying scenes, the others read none. More is better."""
    labels: bool = True
    """Also measure ``miou``; without it, no label file is opened."""
    verify_every_epochs: int = Field(1, ge=1)
    scheduler: Scheduler = Scheduler()
    searcher: Literal["random", "tpe"] = "random"
    """``tpe``: Optuna's tree-structured Parzen estimator learns from the trials that have ended."""
    num_trials: int = Field(1, ge=1, le=10_000)
    """Draws of what is random; each is combined with every grid value, variant and seed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the draws."""
    budget: Budget = Budget()
    resources: TrialResources = TrialResources()
    touches_features: bool = False
    """Allow keys that decide the feature store (``dataset``, ``teacher``, ``variant``): each value is an extraction."""

    model_config = ConfigDict(populate_by_name=True)

    @model_validator(mode="after")
    def _can_be_searched(self) -> Space:
        if not self.parameters and not self.variants:
            raise ValueError("parameters: empty; give at least one parameter or variant")
        for key in (*self.parameters, *self.set_, *itertools.chain(*self.variants.values())):
            self._check_key(key)
        twice = [key for key in self.parameters if key in self.set_ or any(key in v for v in self.variants.values())]
        if twice:
            raise ValueError(f"{twice[0]}: both in parameters and in set or variants; give it once")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: a seed is there twice")
        if self.metric == "miou" and not self.labels:
            raise ValueError(
                "metric=miou reads labels, and labels=false; allowed then: agreement, consistency, label_free"
            )
        drawn = [key for key, values in self.parameters.items() if values.grid is None]
        if self.num_trials > 1 and not drawn:
            raise ValueError(f"num_trials={self.num_trials}: nothing is random here; a grid is run once (num_trials=1)")
        if self.searcher == "tpe" and (len(drawn) < len(self.parameters) or self.variants or len(self.seeds) > 1):
            raise ValueError("searcher=tpe chooses every trial itself: no grid, no variants and one seed at most")
        return self

    def _check_key(self, key: str) -> None:
        group, _, rest = key.partition(".")
        if group not in _ALLOWED or bool(rest) == (group == "variant"):
            raise ValueError(
                f"{key}: changes nothing that a sweep measures; allowed: keys such as distill.scr.tau, below "
                f"{', '.join(name for name in _ALLOWED if name != 'variant')}, and variant"
            )
        if key in _SPLITS:
            raise ValueError(f"{key}: a sweep learns from {TRAIN_SPLIT} and compares on {VERIFY_SPLIT}, always")
        if key.endswith("_"):
            raise ValueError(f"{key}: in files this setting is {key.rstrip('_')}")
        if key == "distill.epochs":
            raise ValueError("distill.epochs: is the budget's; give budget.epochs")
        if group in _FEATURES and not self.touches_features:
            raise ValueError(
                f"{key}: decides the feature store, so every value costs an extraction; say touches_features: true"
            )
        if key in self.parameters and group in _FEATURES:
            if key == "variant":  # its switches are many keys, by which trials are told apart
                raise ValueError("variant: is no parameter; give it in variants, as {NAME: {variant: released}}")
            if self.parameters[key].kind not in _FINITE:
                raise ValueError(f"{key}: decides the feature store, so only grid and choice are allowed")
            if self.searcher == "tpe":
                raise ValueError(
                    f"{key}: decides the feature store, which is made before any trial; not with searcher=tpe"
                )

    @property
    def reads_labels(self) -> bool:
        """Whether trials are selected by labels."""
        return self.metric == "miou"


@dataclass(frozen=True)
class Trial:
    """One configuration with one seed."""

    number: int
    seed: int
    values: Mapping[str, Any]
    """Dotted key to value, of the space's parameters."""
    variant: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A search space put onto a job."""

    space: Space
    job: Mapping[str, Any]
    """The job file's values, with the user's changes."""

    @property
    def digest(self) -> str:
        """What makes it the same sweep when it is started again; how long it may take does not matter."""
        space = self.space.model_dump(mode="json", by_alias=True, exclude={"title": True, "budget": {"hours"}})
        return digest_of(space, self.base.model_dump(mode="json", by_alias=True, exclude={"name", "storage"}))

    @functools.cached_property
    def base(self) -> Job:
        """The user's job."""
        return Job.model_validate(self.job)

    @property
    def epochs(self) -> int:
        """Of a trial that is not stopped."""
        return self.space.budget.epochs or self.base.distill.epochs

    @property
    def seeds(self) -> tuple[int, ...]:
        """One training of every configuration for each."""
        return self.space.seeds or (self.base.seed,)

    @functools.cached_property
    def trials(self) -> tuple[Trial, ...]:
        """All trials, in order; with ``searcher=tpe`` only their number and seed are known before they run."""
        space = self.space
        grids = {key: values for key, values in space.parameters.items() if values.grid is not None}
        drawn = {key: values for key, values in space.parameters.items() if values.grid is None}
        rng = np.random.default_rng(space.seed)
        draws = [{key: values.draw(rng) for key, values in drawn.items()} for _ in range(space.num_trials)]
        if space.searcher == "tpe":
            draws = [{} for _ in draws]
        corners = [
            dict(zip(grids, corner, strict=True))
            for corner in itertools.product(*(values.values for values in grids.values()))
        ]
        configurations = itertools.product(space.variants or (None,), corners, draws, self.seeds)
        return tuple(
            Trial(
                number, seed, {key: (corner | draw)[key] for key in space.parameters if key in corner | draw}, variant
            )
            for number, (variant, corner, draw, seed) in enumerate(configurations)
        )

    def job_of(self, trial: Trial, source: str = "trial") -> Job:
        """The job that a trial runs.

        Raises:
            ConfigError: values that make no job.
        """
        space, values = self.space, copy.deepcopy(dict(self.job))
        changes: dict[str, Any] = {
            "stage": "distill",
            "seed": trial.seed,
            "dataset.train_split": TRAIN_SPLIT,
            "dataset.eval_split": VERIFY_SPLIT,
            "distill.epochs": self.epochs,
            "resources.num_workers": space.resources.num_workers,
            "resources.threads_per_worker": space.resources.threads_per_worker,
            "resources.gpus_per_worker": space.resources.gpus_per_worker,
            "resources.max_failures": space.resources.max_failures,
        }
        if self.base.dataset.kind == "streetworld":
            changes["dataset.streetworld.seed"] = self.base.world_seed
        changes |= {**space.set_, **(space.variants[trial.variant] if trial.variant else {}), **trial.values}
        for key, value in changes.items():
            put(values, key, value, source)
        return parse(Job, values, source)


def split_overrides(overrides: Iterable[str]) -> tuple[list[str], list[str]]:
    """Overrides of the space, and those of the job without their ``job.``."""
    overrides = list(overrides)
    of_job = [override.removeprefix("job.") for override in overrides if override.startswith("job.")]
    return [override for override in overrides if not override.startswith("job.")], of_job


def load_sweep(space_path: str | Path, job_path: str | Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a search space and a job; ``key=value`` changes the space, ``job.key=value`` the job.

    Raises:
        ConfigError: a file cannot be read; a key or value is wrong, in the space or in any trial.
    """
    if (kind := kind_of(job_path)) != "job":
        raise ConfigError(f"--job {job_path}: a {kind}, and a job is needed")
    of_space, of_job = split_overrides(overrides)
    return put_together(
        read_values(space_path, of_space, "search space"),
        read_values(job_path, of_job, "job"),
        str(space_path),
        str(job_path),
    )


def put_together(space: dict[str, Any], job: dict[str, Any], space_source: str, job_source: str) -> Sweep:
    """Validate a space, a job, and the space's values in the job.

    Raises:
        ConfigError: as in :func:`load_sweep`; an object store, where Ray Tune's state and checkpoints cannot be kept.
    """
    base = parse(Job, job, job_source)
    if "sweep" not in space:
        raise ConfigError(f"{space_source}: no search space (it has no key 'sweep')")
    sweep = Sweep(parse(Space, space, space_source), job)
    if base.stage == "streetworld_clip":
        raise ConfigError(f"{job_source}: stage=streetworld_clip has nothing to sweep; give a job that distils")
    if is_remote(base.storage):
        raise ConfigError(f"{job_source}: storage={base.storage}: a sweep needs a folder that all its nodes see")
    where = f"{space_source} on {job_source}"
    jobs = [sweep.job_of(trial, where) for trial in _extreme_trials(sweep)]
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


def _extreme_trials(sweep: Sweep) -> Iterable[Trial]:
    """Trials at every extreme of one parameter after another, and of every variant: all are allowed if these are."""
    space = sweep.space
    first = {key: values.extremes[0] for key, values in space.parameters.items()}
    others = [{key: value} for key, values in space.parameters.items() for value in values.extremes[1:]]
    for variant in space.variants or (None,):
        for change in ({}, *others):
            yield Trial(0, sweep.seeds[0], first | change, variant)
