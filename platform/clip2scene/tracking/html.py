"""Pieces of a self-contained HTML page: style and figures are inside the file, and it can be printed."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

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
pre { font: .84rem/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f5f6f8; padding: .8rem 1rem;
  overflow-x: auto; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
summary { color: var(--accent); cursor: pointer; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; }
@media print { body { margin: 0; max-width: none; padding: 0; font-size: 11px; } h2 { break-after: avoid; }
  a { color: inherit; } @page { margin: 14mm; } }
"""


def page(title: str, lead: str, parts: Iterable[str], heading: str | None = None) -> str:
    """A whole page.

    Args:
        title: title of the window.
        lead: sentence below the heading.
        parts: HTML of the body.
        heading: heading of the page; the title when not given.
    """
    above = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>",
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{text(heading or title)}</h1>",
        f'<p class="lead">{text(lead)}</p>',
    ]
    return "\n".join([*above, *parts, "</body></html>"]) + "\n"


def note(words: str) -> str:
    """A paragraph in small grey letters."""
    return f'<p class="note">{text(words)}</p>'


def links_note(what: str, pages_at: str) -> str:
    """A note on where links to runs open, for a page that links to another server than the one that was read."""
    return (
        '<p class="note">The links open where <code>clip2scene ui --storage FOLDER</code> shows the runs of the '
        f"{text(what)}'s storage folder: {text(pages_at)}</p>"
    )


def entries(values: Mapping[str, str], plain: Iterable[str] = ()) -> str:
    """Names and values in two columns; values are monospaced, except for the names in ``plain``."""
    found = [
        f'<dt>{text(key)}</dt><dd class="{"" if key in plain else "mono"}">{text(value)}</dd>'
        for key, value in values.items()
    ]
    return f"<dl>{''.join(found)}</dl>"


def figure_tag(figure: Figure, caption: str) -> str:
    """A figure as an inline image with its caption."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    image = base64.b64encode(file.getvalue()).decode()
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{text(caption) or "figure"}" src="data:image/png;base64,{image}">{below}</figure>'


def text(value: object) -> str:
    """A value, escaped for HTML."""
    return html.escape(str(value))
