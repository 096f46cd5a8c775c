"""A table as one self-contained HTML file, whose words and numbers are those of its text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from clip2scene.data.vocabulary import vocabulary
from clip2scene.tracking.html import render
from clip2scene.tracking.table import text
from clip2scene.tracking.table.figures import class_panels, scene_row
from clip2scene.tracking.table.record import TableCell, TableRecord


def table_html(
    record: TableRecord, pages_at: str | None = None, figures: Sequence[tuple[str, str, Figure]] | None = None
) -> str:
    """The whole page.

    Args:
        record: the table.
        pages_at: MLflow server that links to runs open; the one that was read when not given.
        figures: what :func:`table_figures` yields; drawn when not given.
    """
    return render(
        "table.html",
        record=record,
        pages_at=pages_at,
        figures=list(table_figures(record)) if figures is None else figures,
        text=text,
    )


def table_figures(record: TableRecord) -> Iterator[tuple[str, str, Figure]]:
    """All figures of a table: file name (``classes_1`` or ``scene_3``), caption and figure.

    Rows that read the same score of the same runs are drawn once.
    """
    words = vocabulary(record.about["vocabulary"])
    several = len(record.about["columns"]) > 1
    for place, column in enumerate(record.about["columns"], start=1):
        scored = {cell.row: cell.iou_per_class() for cell in _distinct(record, column)}
        scored = {row: ious for row, ious in scored.items() if ious}
        if scored:
            title = column if several else ""
            yield f"classes_{place}", title, class_panels(scored, words.classes, record.about["reference"], title)
    number = 0
    for column in record.about["columns"]:
        for cell in _distinct(record, column):
            example = record.example(cell)
            if example is None or cell.array not in example:
                continue
            number += 1
            title = f"{cell.row}, {column}" if several else cell.row
            figure = scene_row(example["points"], example["truth"], example[cell.array], words, title)
            yield f"scene_{number}", "", figure


def _distinct(record: TableRecord, column: str) -> list[TableCell]:
    """The cells of a column without those that repeat an earlier one; the reference row counts as the earliest."""
    reference = record.reference(column)
    seen = {_source(reference)}
    kept = []
    for cell in record.column(column):
        if cell is reference or _source(cell) not in seen:
            kept.append(cell)
            seen.add(_source(cell))
    return kept


def _source(cell: TableCell) -> tuple[str, ...]:
    return (cell.score, *(run.run_id for run in cell.runs.values())) if cell.runs else (cell.row,)
