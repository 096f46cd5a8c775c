"""A table as one HTML file that needs nothing else: style and figures are inside, and it prints."""

from __future__ import annotations

import base64
import datetime
import html
import io
from collections.abc import Iterator

from matplotlib.figure import Figure

from clip2scene.data.vocabulary import vocabulary
from clip2scene.tracking.table_figures import class_panels, scene_row
from clip2scene.tracking.table_record import TableCell, TableRecord
from clip2scene.tracking.table_report import (
    LEGEND,
    differing_tags,
    failures,
    headings,
    provenance,
    row_texts,
    tag_of,
)

_STYLE = """
:root { --ink: #23272e; --soft: #666d77; --line: #d9dde2; --accent: #1f5fa8; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  max-width: 1120px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p.lead, p.note, figcaption { color: var(--soft); }
p.note, figcaption { font-size: .88rem; }
p.failed { color: #b3261e; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; color: var(--soft); border-bottom: 1.5px solid var(--ink); }
td.text, th.text { text-align: left; white-space: normal; }
td.mono { font: .8rem ui-monospace, Menlo, Consolas, monospace; }
tbody tr.first td { border-top: 1px solid var(--line); }
tbody tr:first-child td { border-top: 0; }
tbody tr:last-child td { border-bottom: 1.5px solid var(--ink); }
td.group { color: var(--soft); }
tr.reference td { font-weight: 600; }
td.same { color: #1b7340; } td.opposite { color: #b3261e; } td.unclear { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
dd.mono, code { font: .84rem ui-monospace, Menlo, Consolas, monospace; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; display: block; }
a { color: var(--accent); text-decoration: none; }
@media print { body { margin: 0; max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  a { color: inherit; } @page { margin: 14mm; } }
"""


def table_html(record: TableRecord, pages_at: str | None = None) -> str:
    """The whole page; links to runs go to the MLflow server at ``pages_at``, or to the one that was read."""
    about = record.about
    columns = about["columns"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_text(about['title'])} ({_text(about['dataset'])})</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{_text(about['title'])}</h1>",
        f'<p class="lead">{_text(_lead(record))}</p>',
    ]
    for column in columns:
        if len(columns) > 1:
            parts.append(f"<h2>{_text(column)}</h2>")
        parts.append(_table(record, column))
    parts.append(f'<p class="note">{_text(LEGEND.format(reference=about["reference"]))}</p>')
    parts += [f'<p class="failed">Failed: {_text(line)}</p>' for line in failures(record)]
    parts.append("<h2>What the scores hold for</h2>")
    parts.append(_provenance(record))
    drawn = list(table_figures(record))
    for kind, heading, note in _CHAPTERS:
        chosen = [(name, caption, figure) for name, caption, figure in drawn if name.startswith(kind)]
        if chosen:
            parts.append(f"<h2>{heading}</h2>")
            parts.append(f'<p class="note">{_text(note.format(reference=about["reference"]))}</p>')
            parts += [_figure(figure, caption) for _, caption, figure in chosen]
    parts.append("<h2>Runs in MLflow</h2>")
    if pages_at is not None:
        parts.append(
            f'<p class="note">The links open where <code>clip2scene ui --storage FOLDER</code> shows the runs of the '
            f"table's storage folder: {_text(pages_at)}</p>"
        )
    parts.append(_runs(record, pages_at))
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


_CHAPTERS = (
    ("classes", "IoU per class", "Mean over seeds, with its standard deviation. Orange: the row {reference!r}."),
    (
        "scene",
        "One held-out scan",
        "From above, from the first seed's run of every row. Grey points are not scored, as they have no label.",
    ),
)


def table_figures(record: TableRecord) -> Iterator[tuple[str, str, Figure]]:
    """Every figure of a table: a file name (``classes_1`` or ``scene_3``), a caption and the figure.

    Rows that read the same score of the same runs are drawn once.
    """
    words = vocabulary(record.about["vocabulary"])
    several = len(record.about["columns"]) > 1
    for place, column in enumerate(record.about["columns"], start=1):
        scored = {cell.row: cell.iou_per_class() for cell in _different(record, column)}
        scored = {row: ious for row, ious in scored.items() if ious}
        if scored:
            title = column if several else ""
            yield f"classes_{place}", title, class_panels(scored, words.classes, record.about["reference"], title)
    number = 0
    for column in record.about["columns"]:
        for cell in _different(record, column):
            example = record.example(cell)
            if example is None or cell.method not in example:
                continue
            number += 1
            title = f"{cell.row}, {column}" if several else cell.row
            figure = scene_row(example["points"], example["truth"], example[cell.method], words, title)
            yield f"scene_{number}", "", figure


def _different(record: TableRecord, column: str) -> list[TableCell]:
    """Cells of a column without those that repeat an earlier one; the reference row counts as the earliest."""
    reference = record.reference(column)
    seen = {_what(reference)}
    kept = []
    for cell in record.column(column):
        if cell is reference or _what(cell) not in seen:
            kept.append(cell)
            seen.add(_what(cell))
    return kept


def _what(cell: TableCell) -> tuple[str, ...]:
    return (cell.score, *(run.run_id for run in cell.runs.values())) if cell.runs else (cell.row,)


def _lead(record: TableRecord) -> str:
    when = datetime.datetime.fromtimestamp(record.started_ms / 1000, datetime.UTC).strftime("%d %B %Y")
    seeds = record.about["seeds"]
    return f"On {record.about['dataset']}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {when}."


def _table(record: TableRecord, column: str) -> str:
    tags = [tag for tag in ("protocol", "vocabulary") if len(differing_tags(record, tag)) > 1]
    heads = "".join(f"<th>{_text(name)}</th>" for name in headings(record)[:-1])
    heads += f'<th class="text">{_text(headings(record)[-1])}</th>'
    heads += "".join(f'<th class="text">{tag}</th>' for tag in tags)
    lines = [f'<table><thead><tr><th class="text"></th><th class="text"></th>{heads}</tr></thead><tbody>']
    reference, group = record.reference(column), ""
    for cell in record.column(column):
        *numbers, verdict = row_texts(cell, reference)
        shown = "" if cell.group == group else _text(cell.group)
        marks = [name for name, on in (("first", shown), ("reference", cell is reference)) if on]
        cells = f'<td class="text group">{shown}</td><td class="text">{_text(cell.row)}</td>'
        cells += "".join(f"<td>{_text(number)}</td>" for number in numbers)
        cells += f'<td class="text {verdict if verdict.isalpha() else ""}">{_text(verdict)}</td>'
        cells += "".join(f'<td class="text mono">{_text(tag_of(cell, tag))}</td>' for tag in tags)
        lines.append(f'<tr class="{" ".join(marks)}">{cells}</tr>')
        group = cell.group
    return "\n".join([*lines, "</tbody></table>"])


def _provenance(record: TableRecord) -> str:
    plain = ("dataset", "seeds", "machine")
    entries = [
        f'<dt>{_text(key)}</dt><dd class="{"" if key in plain else "mono"}">{_text(value)}</dd>'
        for key, value in provenance(record).items()
    ]
    return f"<dl>{''.join(entries)}</dl>"


def _figure(figure: Figure, caption: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    image = base64.b64encode(file.getvalue()).decode()
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{_text(caption) or "figure"}" src="data:image/png;base64,{image}">{below}</figure>'


def _runs(record: TableRecord, pages_at: str | None) -> str:
    several = len(record.about["columns"]) > 1
    entries = []
    for cell in record.cells:
        links = []
        for seed, run in cell.runs.items():
            page, about = _text(record.url(run.run_id, pages_at)), f"seed {seed}, {run.seconds:.0f} s"
            links.append(f'<a href="{page}" title="{about}">{run.run_id[:8]}</a>')
        name = f"{cell.row}, {cell.column}" if several else cell.row
        entries.append(f'<dt>{_text(name)}</dt><dd class="mono">{" ".join(links) or "–"}</dd>')
    return f"<dl>{''.join(entries)}</dl>"


def _text(value: object) -> str:
    return html.escape(str(value))
