"""``make bench``: every stage beside the best alternative, in one run, as one table of ratios.

``python tests/benchmarks/run.py --mode quick|full [--json FILE] [--rows NAME ...] [--goal NAME=NUMBER ...]``. The full
mode with all rows also measures how things grow with the data (:mod:`growth`), and writes BENCHMARKS.md.
"""

from __future__ import annotations

import os

# A worker's settings, and a baseline's: what has threads sets their number itself. Read when numpy is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}

import argparse
import dataclasses
import sys
import tempfile
import time
import traceback
from pathlib import Path

import growth
import report
import rows_commands
import rows_data
import rows_gpu
import rows_index
import rows_losses
import rows_student
import rows_teacher
import rows_workers
from bench import REPOSITORY, Bench
from harness import ROWS, Goal, Row, Skipped

MODULES = (
    rows_teacher, rows_data, rows_losses, rows_index, rows_student, rows_workers, rows_commands, rows_gpu,
)  # fmt: skip


def main() -> int:
    options = _options()
    rows = _chosen(options.rows, options.goal)
    started = time.monotonic()
    outcomes, profile, grown = [], None, None
    with tempfile.TemporaryDirectory(prefix="clip2scene-bench-") as folder:
        bench = Bench(Path(folder), options.mode)
        about = report.about(bench)
        for row in rows:
            print(f"bench: {row.name}", file=sys.stderr, flush=True)
            outcomes.append(_run(row, bench))
        if not options.rows:
            profile = rows_student.profile(bench)
            if bench.full:
                print("bench: growth", file=sys.stderr, flush=True)
                grown = list(growth.measure())
    about["seconds"] = round(time.monotonic() - started, 1)
    report.show(outcomes, about, profile)
    if options.json:
        report.write_json(Path(options.json), outcomes, about, profile, grown)
    if profile and grown:
        report.write_markdown(REPOSITORY / "BENCHMARKS.md", outcomes, about, profile, grown)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _run(row: Row, bench: Bench) -> report.Outcome:
    started = time.monotonic()
    try:
        measured = row.measure(bench)
    except Skipped as reason:
        return report.Outcome(row, None, "skipped", str(reason))
    except Exception as error:
        # The rows after it are still worth their time; the exit status says that the table is not whole.
        traceback.print_exc()
        return report.Outcome(row, None, "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return report.Outcome(row, measured, row.status(measured), "", round(time.monotonic() - started, 1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("quick", "full"), default="quick")
    parser.add_argument("--json", metavar="FILE", help="write all samples, machine, date and revision there")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these: {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--goal", nargs="+", default=[], metavar="NAME=NUMBER", help="judge a row by another goal")
    return parser.parse_args()


def _chosen(names: list[str] | None, goals: list[str]) -> list[Row]:
    known = {row.name: row for row in ROWS}
    for name in [*(names or []), *(text.partition("=")[0] for text in goals)]:
        if name not in known:
            sys.exit(f"bench: no row {name!r}; allowed: {', '.join(known)}")
    for text in goals:
        name, _, number = text.partition("=")
        goal = known[name].goal
        if goal is None:
            sys.exit(f"bench: row {name} has no goal to change")
        try:
            known[name] = dataclasses.replace(known[name], goal=Goal(goal.sense, float(number)))
        except ValueError:
            sys.exit(f"bench: --goal {text}: {number!r} is not a number")
    return [row for row in known.values() if not names or row.name in names]


if __name__ == "__main__":
    sys.exit(main())
