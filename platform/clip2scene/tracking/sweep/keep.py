"""Keeps all that is made of a sweep in its MLflow run."""

from __future__ import annotations

import json
from typing import Any

from clip2scene.tracking.run import Run
from clip2scene.tracking.sweep.best import best_yaml, score_text
from clip2scene.tracking.sweep.figures import sweep_figures
from clip2scene.tracking.sweep.names import value_text
from clip2scene.tracking.sweep.page import sweep_html
from clip2scene.tracking.sweep.record import SweepRecord, TrialRecord
from clip2scene.tracking.sweep.runs import OBJECTIVES
from clip2scene.tracking.sweep.text import sweep_text


def keep_sweep(record: SweepRecord, parent: Run, pages_at: str | None = None) -> None:
    """Keep the trials, the best job, the page and the figures as artifacts of the sweep's run.

    Args:
        record: the sweep, as it was read back.
        parent: the sweep's own run.
        pages_at: MLflow server that the page's links to runs open; the record's server when not given.
    """
    parent.log_dict({"format": "clip2scene-trials-1", "trials": [_as_dict(t) for t in record.trials]}, "trials.json")
    parent.log_text(sweep_text(record), "trials.txt")
    if record.best:
        parent.log_text(best_yaml(record), "best.yaml")
    figures = list(sweep_figures(record))
    for name, _, figure in figures:
        parent.log_figure(figure, f"figures/{name}.png")
    parent.log_text(sweep_html(record, pages_at, figures), "sweep.html")


def keep_best(record: SweepRecord, parent: Run) -> None:
    """Keep what is best where MLflow's list of runs shows it: as metrics, as tags, and in the description of the run.

    Args:
        record: the sweep, as it was read back when its trials, or its hours, were over.
        parent: the sweep's own run.
    """
    tags = {"mlflow.note.content": _note(record)}
    if record.best and record.best_trial:
        means = {name: record.best.score(name)[0] for name in OBJECTIVES}
        # Fractions of 1, as in the trials' runs.
        parent.log_metrics({f"best/{name}": mean / 100 for name, mean in means.items() if mean is not None})
        tags["best_trial"] = f"{record.best_trial.number:02d}"
        for key, value in _settings(record).items():
            tags[f"best.{key}"] = value if isinstance(value, str) else json.dumps(value)
    parent.set_tags(tags)


def _settings(record: SweepRecord) -> dict[str, Any]:
    """The settings of the best configuration, the name of its variant among them."""
    assert record.best
    return {**record.best.values, **({"variant": record.best.variant} if record.best.variant else {})}


def _note(record: SweepRecord) -> str:
    """What was varied, what is best and how to repeat it, in Markdown."""
    about, best = record.about, "no trial has ended with a score"
    varied = [f"`{key}`" for key in record.keys]
    if about["variants"]:
        varied.append(f"variants ({', '.join(about['variants'])})")
    if record.best and record.best_trial:
        settings = ", ".join(f"`{key}` = {value_text(value)}" for key, value in _settings(record).items())
        best = f"trial {record.best_trial.number:02d}, {score_text(record, record.best)}, with {settings}"
    return "\n\n".join(
        (
            f"**{about['title']}** ({about['dataset']})",
            f"Varied: {', '.join(varied)}, in {about['num_trials']} trials of {about['epochs']} epochs.",
            f"Best: {best}.",
            f"The artifact `best.yaml` is a job with the best settings. The whole sweep again: `{about['command']}`",
        )
    )


def _as_dict(trial: TrialRecord) -> dict[str, Any]:
    keys = ("number", "state", "seed", "variant", "values", "finals", "reason", "seconds", "run_id")
    return {key: getattr(trial, key) for key in keys}
