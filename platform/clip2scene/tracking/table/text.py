"""A table as text: our mean and standard deviation over seeds, the paper's number, and whether both move alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clip2scene.tracking.records import mean_and_deviation
from clip2scene.tracking.table.record import TableCell, TableRecord, difference, direction
from clip2scene.tracking.text import new_table, plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_DATASETS = {"nuscenes": "nuScenes", "semantickitti": "SemanticKITTI", "scannet": "ScanNet"}
LEGEND = (
    "mIoU in percent, mean ± sample standard deviation over seeds. Differences are to the row {reference!r}, ours over "
    "the seeds that both rows have; direction: does ours move the way the paper's does (unclear: less than one "
    "standard deviation, for which both rows need two seeds)?"
)


def row_texts(cell: TableCell, reference: TableCell) -> tuple[str, ...]:
    """Seeds, mean ± deviation, paper, both differences, direction; a dash for what is missing."""
    mean, deviation = mean_and_deviation(list(cell.values.values()))
    ours = "–" if mean is None else f"{mean:.1f} ± {'–' if deviation is None else f'{deviation:.1f}'}"
    if cell.failures and mean is None:
        ours = "failed"
    delta, _ = difference(cell, reference)
    gap = None if cell.paper is None or reference.paper is None else cell.paper - reference.paper
    own = cell is reference
    return (
        str(len(cell.values)),
        ours,
        paper_number(cell.paper),
        "–" if own else _signed(delta),
        "–" if own else _signed(gap),
        direction(cell, reference),
    )


def headings(record: TableRecord) -> tuple[str, ...]:
    """Headings of :func:`row_texts`."""
    paper = f"paper ({_DATASETS.get(record.about['paper_dataset'], record.about['paper_dataset'])})"
    return ("seeds", "ours", paper, "Δ ours", "Δ paper", "direction")


def differing_tags(record: TableRecord, tag: str) -> tuple[str, ...]:
    """The values of a tag over all runs, sorted; with a single one, all scores are comparable in this respect."""
    return tuple(sorted({run.tags.get(tag, "?") for cell in record.cells for run in cell.runs.values()}))


def tags_shown(record: TableRecord) -> tuple[str, ...]:
    """The tags that not all runs share; each is a column."""
    return tuple(tag for tag in ("protocol", "vocabulary") if len(differing_tags(record, tag)) > 1)


def tag_of(cell: TableCell, tag: str) -> str:
    """A tag of a cell's runs."""
    return ", ".join(sorted({run.tags.get(tag, "?") for run in cell.runs.values()})) or "–"


def paper_number(value: float | None) -> str:
    """A number as the paper prints it: one decimal, or two where it gives two."""
    if value is None:
        return "–"
    text = f"{value:.2f}"
    return text[:-1] if text.endswith("0") else text


def failures(record: TableRecord) -> tuple[str, ...]:
    """One line per row that has failed seeds."""
    several = len(record.about["columns"]) > 1
    return tuple(
        f"{cell.row}{f', {cell.column}' if several else ''}: {'; '.join(cell.failures)}"
        for cell in record.cells
        if cell.failures
    )


def table_text(record: TableRecord) -> str:
    """The table as plain text."""
    return plain_text(_parts(record))


def provenance(record: TableRecord) -> dict[str, str]:
    """What the scores hold for."""
    about = record.about
    found = {
        "dataset": about["dataset"],
        "seeds": ", ".join(map(str, about["seeds"])),
        "protocol": ", ".join(differing_tags(record, "protocol")) or "–",
        "vocabulary": ", ".join(differing_tags(record, "vocabulary")) or "–",
        "code": record.git_revision,
        "machine": about["machine"],
        "command": about["command"],
        "MLflow run": record.run_id,
    }
    return {key: str(value) for key, value in found.items()}


def _parts(record: TableRecord) -> list[RenderableType]:
    parts: list[RenderableType] = []
    tags = tags_shown(record)
    for column in record.about["columns"]:
        title = record.about["title"] + (f": {column}" if len(record.about["columns"]) > 1 else "")
        table = new_table(f"{title} ({record.about['dataset']})")
        table.add_column("")
        table.add_column("", no_wrap=True)
        for heading in (*headings(record), *tags):
            table.add_column(heading, justify="left" if heading in ("direction", *tags) else "right", no_wrap=True)
        reference, group = record.reference(column), ""
        for cell in record.column(column):
            if group and cell.group != group:
                table.add_section()
            shown = "" if cell.group == group else cell.group
            table.add_row(shown, cell.row, *row_texts(cell, reference), *(tag_of(cell, tag) for tag in tags))
            group = cell.group
        parts.append(table)
    parts += [f"failed: {line}" for line in failures(record)]
    parts.append(LEGEND.format(reference=record.about["reference"]))
    parts.append("\n".join(f"{key}: {value}" for key, value in provenance(record).items()))
    return parts


def _signed(value: float | None) -> str:
    if value is None:
        return "–"
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")
