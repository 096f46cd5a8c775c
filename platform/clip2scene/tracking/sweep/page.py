"""A sweep as one self-contained HTML file, whose words and numbers are those of its text."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from clip2scene.tracking.html import render
from clip2scene.tracking.sweep import text
from clip2scene.tracking.sweep.best import best_yaml
from clip2scene.tracking.sweep.figures import sweep_figures
from clip2scene.tracking.sweep.names import score_name
from clip2scene.tracking.sweep.record import SweepRecord


def sweep_html(
    record: SweepRecord, pages_at: str | None = None, figures: Sequence[tuple[str, str, Figure]] | None = None
) -> str:
    """The whole page.

    Args:
        record: the sweep.
        pages_at: MLflow server that links to runs open; the one that was read when not given.
        figures: what :func:`sweep_figures` yields; drawn when not given.
    """
    return render(
        "sweep.html",
        record=record,
        pages_at=pages_at,
        figures=list(sweep_figures(record)) if figures is None else figures,
        text=text,
        trials=sorted(record.trials, key=record.order),
        metric=score_name(record.metric),
        job=best_yaml(record) if record.best else "",
    )
