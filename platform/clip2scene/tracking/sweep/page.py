"""A sweep as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from clip2scene.tracking.html import entries, figure_tag, links_note, note, page, text
from clip2scene.tracking.sweep.best import best_yaml
from clip2scene.tracking.sweep.figures import sweep_figures
from clip2scene.tracking.sweep.names import score_name
from clip2scene.tracking.sweep.record import SweepRecord
from clip2scene.tracking.sweep.text import (
    TEXTUAL,
    compare_url,
    configuration_headings,
    configuration_texts,
    has_seeds,
    legend,
    provenance,
    sentences,
    trial_headings,
    trial_texts,
)

_CHAPTERS = (
    (("surface",), "Response surface"),
    (("curve_",), "One parameter at a time"),
    (("parallel", "importance"), "All parameters together"),
    (("learning",), "Learning curves"),
    (("ranking",), "How well scores without labels rank the trials"),
)
_PLAIN = ("dataset", "scenes", "seeds", "search", "machine")


def sweep_html(
    record: SweepRecord, pages_at: str | None = None, figures: Sequence[tuple[str, str, Figure]] | None = None
) -> str:
    """The whole page.

    Args:
        record: the sweep.
        pages_at: MLflow server that links to runs open; the one that was read when not given.
        figures: what :func:`sweep_figures` yields; drawn when not given.
    """
    parts = ['<p class="failed">No trial ended with a score.</p>' if record.best is None else _best(record)]
    if has_seeds(record):
        chosen = [record.configurations[0]] if record.best else []
        rows = [(row, None) for row in record.configurations]
        parts.append("<h2>Configurations</h2>")
        parts.append(_table(record, configuration_headings(record), rows, chosen, configuration_texts))
    trials = [(trial, record.url(trial.run_id, pages_at)) for trial in sorted(record.trials, key=record.order)]
    parts.append("<h2>Trials</h2>")
    parts.append(_table(record, trial_headings(record), trials, [record.best_trial], trial_texts))
    parts.append(note(legend(record)))
    parts.append(f"<ul>{''.join(f'<li>{text(sentence)}</li>' for sentence in sentences(record))}</ul>")
    where = f'<a href="{text(compare_url(record, pages_at))}">Compare the trials in MLflow</a>, or open '
    parts.append(f'<p>{where}<a href="{text(record.url(record.run_id, pages_at))}">the sweep\'s own run</a>.</p>')
    if pages_at is not None:
        parts.append(links_note("sweep", pages_at))
    parts.append("<h2>What the scores hold for</h2>")
    parts.append(entries(provenance(record), _PLAIN))
    drawn = list(sweep_figures(record)) if figures is None else figures
    for kinds, heading in _CHAPTERS:
        chosen_figures = [(caption, figure) for name, caption, figure in drawn if name.startswith(kinds)]
        if chosen_figures:
            parts.append(f"<h2>{heading}</h2>")
            parts += [figure_tag(figure, caption) for caption, figure in chosen_figures]
    title = record.about["title"]
    return page(f"{title} ({record.about['dataset']})", _lead(record), parts, heading=title)


def _lead(record: SweepRecord) -> str:
    about = record.about
    return (
        f"Sweep {about['sweep']} on {about['dataset']}: {len(record.trials)} of {about['num_trials']} trials of "
        f"{about['epochs']} epochs, selected by {score_name(record.metric)} ({record.selection}), {record.day}."
    )


def _best(record: SweepRecord) -> str:
    assert record.best is not None
    assert record.best_trial is not None
    if has_seeds(record):
        names, values = configuration_headings(record), configuration_texts(record, record.best)
    else:
        names, values = trial_headings(record), trial_texts(record, record.best_trial)
    job = "As a job for <code>clip2scene run</code> (artifact <code>best.yaml</code> of the sweep's run)"
    return (
        f"<h2>Best configuration</h2>{entries(dict(zip(names, values, strict=True)), plain=names)}"
        f"<details><summary>{job}</summary><pre>{text(best_yaml(record))}</pre></details>"
    )


def _table(
    record: SweepRecord,
    headings: Sequence[str],
    rows: Sequence[tuple[Any, str | None]],
    best: Sequence[Any],
    texts: Callable[[SweepRecord, Any], Sequence[str]],
) -> str:
    """A table of rows, each with the address that its first cell links to."""
    kinds = ["text" if heading in TEXTUAL else "" for heading in headings]
    heads = "".join(f'<th class="{kind}">{text(head)}</th>' for kind, head in zip(kinds, headings, strict=True))
    lines = [f"<table><thead><tr>{heads}</tr></thead><tbody>"]
    for row, address in rows:
        values = [text(value) for value in texts(record, row)]
        if address is not None:
            values[0] = f'<a href="{text(address)}">{values[0]}</a>'
        cells = "".join(f'<td class="{kind}">{value}</td>' for kind, value in zip(kinds, values, strict=True))
        lines.append(f'<tr class="{"reference" if row in best else ""}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table>"])
