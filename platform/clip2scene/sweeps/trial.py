"""What one trial does in its Ray Tune actor: distil as its job says, and report every epoch that was scored."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from clip2scene.config import Job
from clip2scene.errors import DivergedError
from clip2scene.stages import Stages
from clip2scene.sweeps.sweep import Sweep, Trial
from clip2scene.training.fit import Metrics, Training, fit
from clip2scene.training.validation import SCORE_PREFIX


@dataclass(frozen=True)
class TrialWork:
    """Everything that a trial needs besides its configuration; picklable."""

    sweep: Sweep
    """The sweep, with absolute paths."""
    folder: Path
    """Folder of the trials' checkpoints; shared by all nodes."""
    labels: bool
    """Whether the verifying scenes have labels that may be read."""


def run_trial(config: dict[str, Any], work: TrialWork) -> None:
    """Train one trial; ``config`` has its number if all draws were made beforehand, else the searcher's choice."""
    sweep, trial_id = work.sweep, tune.get_context().get_trial_id()
    job = sweep.job_of(trial_from_config(sweep, config), f"trial {trial_id}")
    training = _training(job, work)
    on_epoch = functools.partial(_report, sweep.space.metric)
    try:
        fit(training, name=f"trial-{trial_id}", folder=work.folder, on_epoch=on_epoch)
    except DivergedError as error:
        tune.report({"epoch": sweep.epochs, "objective": -math.inf, "diverged": str(error)})


def _training(job: Job, work: TrialWork) -> Training:
    """A trial's training. The stages are local, so that the whole CLIP model in them is freed before it starts."""
    stages = Stages(job)
    validation = stages.validation(work.sweep.space.verify_every_epochs, labels=work.labels)
    return replace(stages.distillation(), validation=validation)


def trial_from_config(sweep: Sweep, config: dict[str, Any]) -> Trial:
    """The trial that Tune's ``config`` stands for."""
    if "trial" in config:
        return sweep.trials[config["trial"]]
    return replace(sweep.trials[0], values={key: config[key] for key in sweep.space.parameters})


def _report(metric: str, epoch: int, metrics: Metrics) -> None:
    if SCORE_PREFIX + metric in metrics:
        tune.report({"epoch": epoch, "objective": metrics[SCORE_PREFIX + metric], "metrics": metrics})
