"""Keeps all that is made of a table in its MLflow run."""

from __future__ import annotations

import re

from clip2scene.tracking.records import mean_and_deviation
from clip2scene.tracking.run import Run
from clip2scene.tracking.table.page import table_figures, table_html
from clip2scene.tracking.table.record import TableRecord
from clip2scene.tracking.table.text import table_text


def keep_table(record: TableRecord, parent: Run, pages_at: str | None = None) -> None:
    """Keep the text, the page and the figures as artifacts, and the means as metrics for MLflow's comparison of runs.

    Args:
        record: the table, as it was read back.
        parent: the table's own run.
        pages_at: MLflow server that the page's links to runs open; the record's server when not given.
    """
    parent.log_text(table_text(record), "table.txt")
    figures = list(table_figures(record))
    for name, _, figure in figures:
        parent.log_figure(figure, f"figures/{name}.png")
    parent.log_text(table_html(record, pages_at, figures), "table.html")
    means = {
        f"{_in_metric(cell.row)}/{_in_metric(cell.column)}": mean_and_deviation(list(cell.values.values()))[0]
        for cell in record.cells
    }
    parent.log_metrics({name: mean for name, mean in means.items() if mean is not None})


def _in_metric(name: str) -> str:
    """A name as MLflow accepts it as part of a metric's name."""
    return re.sub(r"[^A-Za-z0-9_. -]+", " ", name).strip()
