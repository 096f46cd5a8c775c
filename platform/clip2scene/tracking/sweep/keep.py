"""Keeps all that is made of a sweep in its MLflow run."""

from __future__ import annotations

from typing import Any

from clip2scene.tracking.run import Run
from clip2scene.tracking.sweep.best import best_yaml
from clip2scene.tracking.sweep.figures import sweep_figures
from clip2scene.tracking.sweep.page import sweep_html
from clip2scene.tracking.sweep.record import SweepRecord, TrialRecord
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


def _as_dict(trial: TrialRecord) -> dict[str, Any]:
    keys = ("number", "state", "seed", "variant", "values", "finals", "reason", "seconds", "run_id")
    return {key: getattr(trial, key) for key in keys}
