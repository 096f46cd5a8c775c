"""Tables as plain text, for terminals, logs and artifacts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_BOUNDLESS = 10_000
"""More characters than any row has."""


def new_table(title: str) -> Table:
    """An empty rich table in the style of all our tables."""
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def plain_text(parts: Iterable[RenderableType], width: int = 120) -> str:
    """Tables and sentences below each other, as wide as the widest table where ``width`` would shorten its cells."""
    from rich.console import Console
    from rich.measure import Measurement

    parts = list(parts)
    console = Console(file=io.StringIO(), color_system=None, force_terminal=False, highlight=False, markup=False)
    boundless = console.options.update(max_width=_BOUNDLESS)
    tables = [part for part in parts if not isinstance(part, str)]
    console.width = max([width, *(Measurement.get(console, boundless, table).maximum for table in tables)])
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"
