"""Progress of anything longer than two seconds: a bar on a terminal, and a few lines on stderr elsewhere.

The lines read ``extract: 96/192 images, 31.2 images/s, 3 s left``, at most one per five seconds and one
at the end. Only rich and the standard library are imported, so any module may use this.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0


class Advance(Protocol):
    """What a progress block yields, to be called as work gets done."""

    def __call__(self, n: int = 1, *, restored: bool = False, **fields: Any) -> None:
        """Count ``n`` more units, and show ``fields`` (``loss=0.41``) beside the bar until their next values.

        Those that an earlier command did are ``restored``: they are done, but say nothing of this one's speed.
        """


def uncounted(n: int = 1, *, restored: bool = False, **fields: Any) -> None:
    """An :class:`Advance` that shows nothing."""


@functools.cache
def console() -> Console:
    """The one rich console, on stderr: stdout is for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(sentence: str) -> None:
    """Print a sentence on one line of stderr as it is: brackets in it are no markup, and long paths stay whole."""
    console().print(sentence, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int | None, unit: str = "steps") -> Iterator[Advance]:
    """Show the progress of a block.

    Args:
        description: what is being done, in a word or two (``extract``).
        total: how many units there are; None if that is not known.
        unit: plural name of what is counted (``images``).

    Yields:
        A function ``advance(n=1, **fields)``, safe to call from several threads.
    """
    if console().is_interactive and sys.stderr.isatty():
        with _bar(description, total, unit) as advance:
            yield advance
        return
    lines = _Lines(description, total, unit)
    try:
        yield lines
    except BaseException:
        lines.say("stopped at ")
        raise
    lines.say()


@contextmanager
def silent(description: str, total: int | None, unit: str = "steps") -> Iterator[Advance]:
    """Show nothing; for callers of :func:`progress` that report in another way."""
    yield uncounted


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    class Counts(ProgressColumn):
        def render(self, task: Task) -> Text:
            elapsed_s = task.finished_time if task.finished and task.finished_time is not None else task.elapsed
            return Text(_counts(int(task.completed), before, total, unit, elapsed_s or 0.0, task.fields["shown"]))

    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        Counts(),
    )
    before = 0
    fields: dict[str, Any] = {}
    with Progress(*columns, console=console(), refresh_per_second=4) as bars:
        task = bars.add_task(escape(description), total=total, shown=fields)

        def advance(n: int = 1, *, restored: bool = False, **new_fields: Any) -> None:
            nonlocal before, fields
            before += n * restored
            fields = fields | new_fields  # a new one: rich draws the old one in its own thread
            bars.update(task, advance=n, shown=fields)

        yield advance
        if total is None:
            bars.update(task, total=bars.tasks[task].completed)


class _Lines:
    """Progress as lines on stderr."""

    def __init__(self, description: str, total: int | None, unit: str):
        self._description, self._total, self._unit = description, total, unit
        self._done = self._before = 0
        self._fields: dict[str, Any] = {}
        self._started_s = self._said_s = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, n: int = 1, *, restored: bool = False, **fields: Any) -> None:
        with self._lock:
            self._done += n
            self._before += n * restored
            self._fields.update(fields)
            due = time.monotonic() - self._said_s >= SECONDS_BETWEEN_LINES and self._done != self._total
        if due:
            self.say()

    def say(self, prefix: str = "") -> None:
        with self._lock:
            self._said_s = time.monotonic()
            elapsed_s = self._said_s - self._started_s
            counts = _counts(self._done, self._before, self._total, self._unit, elapsed_s, self._fields)
        print(f"{self._description}: {prefix}{counts}", file=sys.stderr, flush=True)


def _counts(done: int, before: int, total: int | None, unit: str, elapsed_s: float, fields: dict[str, Any]) -> str:
    """``96/192 images, 31.2 images/s, 3 s left, loss 0.41``; at the end the time taken, not left.

    ``before`` of those done are of an earlier command, which took none of ``elapsed_s``.
    """
    parts = [f"{done}/{total} {unit}" if total is not None else f"{done} {unit}"]
    rate = (done - before) / elapsed_s if elapsed_s > 0 else 0.0
    if rate > 0:
        parts.append(f"{_short(rate)} {unit}/s")
    if total is not None and 0 < done < total and rate > 0:
        parts.append(f"{duration((total - done) / rate)} left")
    else:
        parts.append(duration(elapsed_s))
    parts += [f"{name} {_short(value) if isinstance(value, float) else value}" for name, value in fields.items()]
    return ", ".join(parts)


def _short(value: float) -> str:
    """Three digits, never in exponent form for ordinary sizes (31.2, 0.0412, 1250)."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time span for people: ``0.4 s``, ``38 s``, ``4 min 05 s``, ``2 h 07 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    return f"{whole_s // 3600} h {whole_s % 3600 // 60:02d} min"
