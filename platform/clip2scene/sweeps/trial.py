"""What one trial does in its Ray Tune actor: distil as the job says, and report every epoch that was verified."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from clip2scene.config import Job
from clip2scene.stages import Stages
from clip2scene.sweeps.sweep import Sweep, Trial
from clip2scene.training.fit import Metrics, Training, fit
from clip2scene.training.launch import DivergedError
from clip2scene.training.validation import PREFIX


@dataclass(frozen=True)
class TrialWork:
    """Everything a trial needs beside its place among the trials; picklable."""

    sweep: Sweep
    """With absolute paths."""
    folder: Path
    """For the trials' checkpoints; shared by all nodes."""
    labels: bool
    """Whether the verifying scenes have labels that may be read."""


def run_trial(config: dict[str, Any], work: TrialWork) -> None:
    """Train; ``config`` is the trial's number where all was drawn beforehand, else what the searcher chose."""
    sweep, trial_id = work.sweep, tune.get_context().get_trial_id()
    job = sweep.job_of(trial_of(sweep, config), f"trial {trial_id}")
    training = _training(job, work)
    on_epoch = functools.partial(_report, sweep.space.metric)
    try:
        fit(training, name=f"trial-{trial_id}", folder=work.folder, resources=job.resources, on_epoch=on_epoch)
    except DivergedError as error:
        tune.report({"epoch": sweep.epochs, "objective": -math.inf, "diverged": str(error)})


def _training(job: Job, work: TrialWork) -> Training:
    """What a trial learns; the stages, which hold the whole CLIP model, do not outlive this."""
    stages = Stages(job)
    validation = stages.validation(work.sweep.space.verify_every_epochs, labels=work.labels)
    return replace(stages.distillation(), validation=validation)


def trial_of(sweep: Sweep, config: dict[str, Any]) -> Trial:
    """The trial that Tune's ``config`` stands for."""
    if "trial" in config:
        return sweep.trials[config["trial"]]
    return replace(sweep.trials[0], values={key: config[key] for key in sweep.space.parameters})


def _report(metric: str, epoch: int, metrics: Metrics) -> None:
    if PREFIX + metric in metrics:
        tune.report({"epoch": epoch, "objective": metrics[PREFIX + metric], "metrics": metrics})
