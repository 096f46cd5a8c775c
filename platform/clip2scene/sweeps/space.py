"""A search space: what a sweep varies, how it is searched, and what that may cost.

A space file is YAML with the key ``sweep``. It holds no job: ``clip2scene sweep SPACE --job JOB`` combines the two.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from clip2scene.config import Score, Settings, WorkerSettings
from clip2scene.sweeps.distribution import FINITE, Distribution

TRAIN_SPLIT, VERIFY_SPLIT = "parametrizing", "verifying"
"""Splits that trials are trained and compared on: both are parts of ``train``, so the reported split stays unseen."""
_FEATURES = ("dataset", "teacher", "variant")
_ALLOWED = (*_FEATURES, "prompts", "student", "distill")
_SPLITS = ("dataset.train_split", "dataset.eval_split")


class Scheduler(Settings):
    """Which trials are stopped before their last epoch."""

    kind: Literal["asha", "none"] = "asha"
    """``asha``: at growing numbers of epochs (rungs), only the best trials go on; ``none``: all trials do."""
    grace_epochs: int = Field(3, ge=1)
    """Epochs that every trial may train: the first rung."""
    reduction_factor: int = Field(2, ge=2)
    """One in this many trials goes on at a rung; the next rung is at this many times the epochs."""


class Budget(Settings):
    """What a sweep may cost."""

    epochs: int | None = Field(None, ge=1)
    """Epochs of a trial that is not stopped; the job's ``distill.epochs`` when not given."""
    hours: float | None = Field(None, gt=0)
    """Hours after which the sweep pauses and is scored; counted from 0 again when the same command goes on with it."""


class TrialResources(WorkerSettings):
    """What each trial gets. When nothing is given: the workers of a job that trains on GPUs, else one process."""

    num_workers: int = Field(0, ge=0)
    """Ray Train workers per trial; 0 trains in the trial's own process, which reserves ``threads_per_worker`` CPUs."""


class Space(Settings):
    """A search space with its scheduler, searcher and budget."""

    sweep: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Name of the sweep, for ``--resume`` and ``clip2scene report``."""
    title: str = ""
    """Title of the report; the sweep's name when empty."""
    parameters: dict[str, Distribution] = Field(default_factory=dict)
    """What is searched: a dotted key of the job (``distill.scr.tau``), and where its values come from."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named sets of dotted keys and values. Each is run with every grid value and every draw."""
    set_: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Dotted keys and values that all trials share."""
    seeds: tuple[int, ...] = Field((), max_length=100)
    """Every configuration is trained once per seed; with the job's seed when empty. The street world stays that of the
    job's seed."""
    metric: Score = "miou"
    """Score that trials are selected by; more is better. ``miou`` needs labels of the verifying scenes, the others do
    not."""
    labels: bool = True
    """Measure ``miou`` too; if false, no label file is opened."""
    verify_every_epochs: int = Field(1, ge=1)
    """Epochs from one scoring of a trial to the next; its last epoch is always scored."""
    scheduler: Scheduler = Scheduler()
    searcher: Literal["random", "tpe"] = "random"
    """``random``: all draws are made beforehand; ``tpe``: Optuna's tree-structured Parzen estimator learns from the
    trials that have ended."""
    num_trials: int = Field(1, ge=1, le=10_000)
    """Number of random draws; each is combined with every grid value, variant and seed."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the draws."""
    budget: Budget = Budget()
    resources: TrialResources = TrialResources()
    touches_features: bool = False
    """Allow keys that decide the feature store (``dataset``, ``teacher``, ``variant``); each of their values costs an
    extraction."""

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
            raise ValueError(f"seeds={list(self.seeds)}: a seed is given twice")
        if self.metric == "miou" and not self.labels:
            raise ValueError(
                "metric=miou reads labels, and labels=false; allowed then: agreement, consistency, label_free"
            )
        drawn = [key for key, distribution in self.parameters.items() if distribution.grid is None]
        if self.num_trials > 1 and not drawn:
            raise ValueError(f"num_trials={self.num_trials}: nothing is random here; a grid is run once (num_trials=1)")
        if self.searcher == "tpe" and (len(drawn) < len(self.parameters) or self.variants or len(self.seeds) > 1):
            raise ValueError("searcher=tpe chooses every trial itself: no grid and no variants, and at most one seed")
        return self

    def _check_key(self, key: str) -> None:
        group, _, rest = key.partition(".")
        if group not in _ALLOWED or bool(rest) == (group == "variant"):
            raise ValueError(
                f"{key}: changes nothing that a sweep measures; allowed: variant, and keys such as distill.scr.tau in "
                f"{', '.join(name for name in _ALLOWED if name != 'variant')}"
            )
        if key in _SPLITS:
            raise ValueError(f"{key}: a sweep always trains on {TRAIN_SPLIT} and compares on {VERIFY_SPLIT}")
        if key.endswith("_"):
            raise ValueError(f"{key}: in files this setting is {key.rstrip('_')}")
        if key == "distill.epochs":
            raise ValueError("distill.epochs: belongs to the budget; give budget.epochs")
        if group in _FEATURES and not self.touches_features:
            raise ValueError(
                f"{key}: decides the feature store, so every value costs an extraction; set touches_features: true"
            )
        if key in self.parameters and group in _FEATURES:
            if key == "variant":  # it sets many keys, and trials are told apart by keys
                raise ValueError("variant: is not a parameter; give it in variants, as {NAME: {variant: released}}")
            if self.parameters[key].kind not in FINITE:
                raise ValueError(f"{key}: decides the feature store, so only grid and choice are allowed")
            if self.searcher == "tpe":
                raise ValueError(
                    f"{key}: decides the feature store, which is filled before any trial; not with searcher=tpe"
                )

    @property
    def reads_labels(self) -> bool:
        """Whether trials are selected by labels."""
        return self.metric == "miou"
