"""The table on the terminal, the samples as JSON, and BENCHMARKS.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import growth
import psutil
import torch
from bench import REPOSITORY, Bench
from harness import Measured, Row
from rich.console import Console
from rich.table import Table

FORMAT = "clip2scene-benchmarks-1"
_WIDTH = 200
"""Columns of the table where the output is no terminal."""

Profile = list[tuple[str, float, float]]
"""Part of the step, its milliseconds, its share."""
Grown = list[dict[str, Any]]
"""What :func:`growth.measure` gives."""


@dataclass(frozen=True)
class Outcome:
    """A row and what came of it."""

    row: Row
    measured: Measured | None
    status: str
    """``ok``, ``short``, ``skipped`` or ``failed``."""
    reason: str = ""
    seconds: float = 0.0

    @property
    def ratios(self) -> list[float]:
        return self.row.ratios(self.measured) if self.measured else []

    def cells(self) -> list[str]:
        """The row of the table: all but what physics allows."""
        row, status = self.row, self.status if not self.reason else f"{self.status} ({self.reason})"
        goal = "" if row.goal is None else str(row.goal)
        if self.measured is None:
            return [row.name, row.title, row.baseline, "", "", "", "", "", goal, status]
        measured, ratios = self.measured, self.ratios
        value = _number(statistics.median(ratios), measured.unit if row.compare == "ours" else "x")
        spread = f"{_number(min(ratios))} - {_number(max(ratios))}"
        ours, baseline = (_middle(samples, measured.unit) for samples in (measured.ours, measured.baseline))
        return [row.name, row.title, row.baseline, measured.work, ours, baseline, value, spread, goal, status]


HEADINGS = ("row", "what", "baseline", "work", "ours", "base", "ratio", "spread", "goal", "status")


def about(bench: Bench) -> dict[str, Any]:
    """Machine, date and revision."""
    revision = _git("rev-parse", "--short", "HEAD")
    changed = "+changes" if _git("status", "--porcelain", "--", "platform", "tests/benchmarks") else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "format": FORMAT,
        "mode": "full" if bench.full else "quick",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": f"{revision}{changed}",
        "machine": {
            "processor": _processor(),
            "cores": bench.cores,
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "memory_copy_gb_per_s": round(bench.memory_bandwidth / 1e9, 1),
            "gpu": device,
            "load_average_at_start": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def show(outcomes: list[Outcome], about: dict[str, Any], profile: Profile | None) -> None:
    """Print the table; its last line counts the rows by status."""
    console = Console(width=None if os.isatty(1) else _WIDTH, highlight=False)
    table = Table(*HEADINGS, show_lines=True)
    for outcome in outcomes:
        table.add_row(*outcome.cells())
    console.print(table, markup=False)
    if profile:
        console.print("one distillation step: " + ", ".join(f"{n} {ms:.0f} ms ({s:.0%})" for n, ms, s in profile))
    console.print(_machine(about))
    console.print(counts(outcomes))


def counts(outcomes: list[Outcome]) -> str:
    """``14 ok, 2 short, 3 skipped``; ``failed`` only where something did."""
    found = Counter(outcome.status for outcome in outcomes)
    named = ["ok", "short", "skipped"] + ["failed"] * bool(found["failed"])
    return ", ".join(f"{found[status]} {status}" for status in named)


def write_json(
    path: Path, outcomes: list[Outcome], about: dict[str, Any], profile: Profile | None, grown: Grown | None
) -> None:
    rows = []
    for outcome in outcomes:
        row, measured = outcome.row, outcome.measured
        values: dict[str, Any] = {
            "name": row.name,
            "title": row.title,
            "baseline": row.baseline,
            "compare": row.compare,
            "goal": None if row.goal is None else str(row.goal),
            "status": outcome.status,
            "reason": outcome.reason,
        }
        if measured is not None:
            values |= {
                "work": measured.work,
                "unit": measured.unit,
                "limit": measured.limit,
                "ours": measured.ours,
                "baseline_samples": measured.baseline,
                "ratios": outcome.ratios,
                "median": statistics.median(outcome.ratios),
                "seconds": outcome.seconds,
            }
        rows.append(values)
    steps = None if profile is None else [{"part": n, "ms": ms, "share": share} for n, ms, share in profile]
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {**about, "rows": rows, "profile": steps, "growth": grown, "counts": counts(outcomes)}
    path.write_text(json.dumps(values, indent=1) + "\n")


def write_markdown(path: Path, outcomes: list[Outcome], about: dict[str, Any], profile: Profile, grown: Grown) -> None:
    """BENCHMARKS.md: the table, the profile of a step, what is left to the physical limits, and growth."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench BENCH=full`. A ratio is the median of at least five runs, each made beside its "
        "baseline in "
        "the same run (A B A B ...); the spread is its smallest and largest value. Times are of this machine:",
        "",
        _machine(about),
        "",
        *_table(HEADINGS, [outcome.cells() for outcome in outcomes]),
        "",
        counts(outcomes),
    ]
    cells = [[name, f"{ms:.1f}", f"{100 * share:.1f}%"] for name, ms, share in profile]
    lines += [
        "",
        "## Where a distillation step's time goes",
        "",
        "The demo's job, two keyframes of K = 2 sweeps, nothing cached, one worker, one thread; medians of five.",
        "",
        *_table(("part", "ms", "share"), cells),
    ]
    limits = [[o.row.name, o.status, o.measured.limit] for o in outcomes if o.measured is not None and o.measured.limit]
    lines += ["", "## What is left to the physical limit", "", *_table(("row", "status", "limit"), limits)]
    lines += ["", "## How time, memory and bytes grow with the keyframes", "", *_growth(grown), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _growth(grown: Grown) -> list[str]:
    sizes = list(dict.fromkeys(row["keyframes"] for row in grown))
    cells = []
    for part in dict.fromkeys(row["part"] for row in grown):
        rows = [row for row in grown if row["part"] == part]
        for key in rows[0]:
            if key not in ("part", "keyframes"):
                cells.append([part, key.replace("_", " "), *(f"{row[key]:.3g}" for row in rows)])
    return [
        "Synthetic nuScenes tables (`python tests/benchmarks/growth.py`): `tables` is the devkit's reading and our "
        "index of it, `index` what every driver reads and sends to a worker, `store` ViT-B/16's features. Seconds are "
        "of the processor.",
        "",
        *_table(("part", "what", *(f"{size:,} keyframes" for size in sizes)), cells),
        "",
        *(f"{sentence}." for sentence in growth.bends(grown)),
    ]


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _machine(about: dict[str, Any]) -> str:
    machine = about["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, memory copy "
        f"{machine['memory_copy_gb_per_s']} GB/s, GPU {machine['gpu']}; {about['date']}, revision {about['revision']}, "
        f"{about['mode']} mode, {about['seconds']:.0f} s, load {machine['load_average_at_start']} at the start"
    )


def _middle(samples: list[float], unit: str) -> str:
    return _number(statistics.median(samples), unit) if samples else ""


def _number(value: float, unit: str = "") -> str:
    if unit == "s" and value < 1:
        return f"{1e3 * value:.3g} ms"
    if unit == "B" and value >= 1e5:
        return f"{value / 1e6:.3g} MB"
    text = f"{value:.3g}" if value < 1e3 else f"{value:.0f}"
    return f"{text}{'' if unit in ('', 'x', '%') else ' '}{unit}"


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    return done.stdout.strip()
