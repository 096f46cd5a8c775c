"""The best configuration of a sweep as a job file for ``clip2scene run``."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from clip2scene.config import Job
from clip2scene.errors import ConfigError
from clip2scene.jobfile import parse, put
from clip2scene.tracking.sweep.names import score_name
from clip2scene.tracking.sweep.record import Configuration, SweepRecord


def best_job(record: SweepRecord) -> dict[str, Any]:
    """The user's job with the settings of the best configuration, and those that all trials share.

    It trains as many epochs as a trial that is not stopped: a trial's learning rate follows that number, not the job's.

    Raises:
        ConfigError: no trial has a score yet, or the settings are not a valid job.
    """
    best, about = record.best, record.about
    if best is None:
        raise ConfigError(f"sweep {about['sweep']!r}: no trial ended with a score, so none is the best")
    values = copy.deepcopy(about["job"])
    values["name"] = f"{values['name']}-best"
    variant = about["variants"][best.variant] if best.variant else {}
    for key, value in {"distill.epochs": about["epochs"], **about["set"], **variant, **best.values}.items():
        put(values, key, value, f"best of sweep {about['sweep']}")
    parse(Job, values, f"best of sweep {about['sweep']}")
    return dict(values)


def best_yaml(record: SweepRecord) -> str:
    """:func:`best_job` as the text of a job file, below comments that say what was measured.

    Raises:
        ConfigError: as in :func:`best_job`.
    """
    values, best = best_job(record), record.best
    assert best is not None
    trials = ", ".join(f"{trial.number:02d} (seed {trial.seed})" for trial in best.compared)
    comments = [
        f"The best configuration of sweep {record.about['sweep']} (MLflow run {record.run_id}): trial {trials}.",
        f"{score_text(record, best)}.",
    ]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return "".join(f"# {comment}\n" for comment in comments) + text


def score_text(record: SweepRecord, configuration: Configuration) -> str:
    """A configuration's objective: ``mIoU 41.15 ± 0.52% on verifying scenes after 6 epochs``."""
    about, epochs = record.about, str(configuration.epochs)
    mean, deviation = configuration.score(record.metric)
    score = f"{mean:.2f}%" if deviation is None else f"{mean:.2f} ± {deviation:.2f}%"
    if configuration.epochs != about["epochs"]:
        epochs += f" of {about['epochs']}"
    return f"{score_name(record.metric)} {score} on {about['splits']['verify']} scenes after {epochs} epochs"
