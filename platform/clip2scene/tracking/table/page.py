"""A table as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from clip2scene.data.vocabulary import vocabulary
from clip2scene.tracking.html import entries, figure_tag, links_note, note, page, text
from clip2scene.tracking.table.figures import class_panels, scene_row
from clip2scene.tracking.table.record import TableCell, TableRecord
from clip2scene.tracking.table.text import (
    LEGEND,
    differing_tags,
    failures,
    headings,
    provenance,
    row_texts,
    tag_of,
)

_CHAPTERS = (
    ("classes", "IoU per class", "Mean over seeds, with its standard deviation. Orange: the row {reference!r}."),
    (
        "scene",
        "One held-out scan",
        "From above, from the first seed's run of every row. Grey points are not scored, as they have no label.",
    ),
)


def table_html(
    record: TableRecord, pages_at: str | None = None, figures: Sequence[tuple[str, str, Figure]] | None = None
) -> str:
    """The whole page.

    Args:
        record: the table.
        pages_at: MLflow server that links to runs open; the one that was read when not given.
        figures: what :func:`table_figures` yields; drawn when not given.
    """
    about = record.about
    columns = about["columns"]
    parts = []
    for column in columns:
        if len(columns) > 1:
            parts.append(f"<h2>{text(column)}</h2>")
        parts.append(_table(record, column))
    parts.append(note(LEGEND.format(reference=about["reference"])))
    parts += [f'<p class="failed">Failed: {text(line)}</p>' for line in failures(record)]
    parts.append("<h2>What the scores hold for</h2>")
    parts.append(entries(provenance(record), plain=("dataset", "seeds", "machine")))
    drawn = list(table_figures(record)) if figures is None else figures
    for kind, heading, words in _CHAPTERS:
        chosen = [(caption, figure) for name, caption, figure in drawn if name.startswith(kind)]
        if chosen:
            parts.append(f"<h2>{heading}</h2>")
            parts.append(note(words.format(reference=about["reference"])))
            parts += [figure_tag(figure, caption) for caption, figure in chosen]
    parts.append("<h2>Runs in MLflow</h2>")
    if pages_at is not None:
        parts.append(links_note("table", pages_at))
    parts.append(_runs(record, pages_at))
    return page(f"{about['title']} ({about['dataset']})", _lead(record), parts, heading=about["title"])


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


def _lead(record: TableRecord) -> str:
    seeds = record.about["seeds"]
    return f"On {record.about['dataset']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {record.day}."


def _table(record: TableRecord, column: str) -> str:
    tags = [tag for tag in ("protocol", "vocabulary") if len(differing_tags(record, tag)) > 1]
    heads = "".join(f"<th>{text(name)}</th>" for name in headings(record)[:-1])
    heads += f'<th class="text">{text(headings(record)[-1])}</th>'
    heads += "".join(f'<th class="text">{tag}</th>' for tag in tags)
    lines = [f'<table><thead><tr><th class="text"></th><th class="text"></th>{heads}</tr></thead><tbody>']
    reference, group = record.reference(column), ""
    for cell in record.column(column):
        *numbers, verdict = row_texts(cell, reference)
        shown = "" if cell.group == group else text(cell.group)
        marks = [name for name, on in (("first", shown), ("reference", cell is reference)) if on]
        cells = f'<td class="text group">{shown}</td><td class="text">{text(cell.row)}</td>'
        cells += "".join(f"<td>{text(number)}</td>" for number in numbers)
        cells += f'<td class="text {verdict if verdict.isalpha() else ""}">{text(verdict)}</td>'
        cells += "".join(f'<td class="text mono">{text(tag_of(cell, tag))}</td>' for tag in tags)
        lines.append(f'<tr class="{" ".join(marks)}">{cells}</tr>')
        group = cell.group
    return "\n".join([*lines, "</tbody></table>"])


def _runs(record: TableRecord, pages_at: str | None) -> str:
    several = len(record.about["columns"]) > 1
    items = []
    for cell in record.cells:
        links = []
        for seed, run in cell.runs.items():
            page, about = text(record.url(run.run_id, pages_at)), f"seed {seed}, {run.seconds:.0f} s"
            links.append(f'<a href="{page}" title="{about}">{run.run_id[:8]}</a>')
        name = f"{cell.row}, {cell.column}" if several else cell.row
        items.append(f'<dt>{text(name)}</dt><dd class="mono">{" ".join(links) or "–"}</dd>')
    return f"<dl>{''.join(items)}</dl>"
