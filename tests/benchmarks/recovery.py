"""Seconds from a fault to work going on, median of three: prints the README's table of faults.

Every test is run three times and says itself how long it took; where it does not, the row has a dash.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = 3
ROWS = (
    # fault, what is lost, test
    (
        "MLflow away, back within 60 s",
        "nothing",
        "tests/faults/test_tracking_faults.py::test_a_server_that_comes_back_in_time_is_not_noticed",
    ),
    (
        "MLflow away for longer",
        "system metrics of that time",
        "tests/faults/test_tracking_faults.py::test_what_is_written_during_a_long_outage_is_delivered_later_in_the_run",
    ),
    (
        "MLflow gone at the end, delivery killed twice",
        "nothing",
        "tests/faults/test_tracking_faults.py::test_the_next_command_delivers_what_was_left_and_may_be_killed_in_it",
    ),
    (
        "PostgreSQL crashes and starts again",
        "nothing",
        "tests/faults/test_tracking_faults.py::test_postgres_crashes_and_starts_again_while_two_write",
    ),
    (
        "killed while it writes a checkpoint",
        "at most one checkpoint interval",
        "tests/faults/test_training_faults.py::test_killed_while_it_writes_a_checkpoint",
    ),
    (
        "newest checkpoint damaged",
        "one checkpoint interval",
        "tests/faults/test_training_faults.py::test_a_damaged_checkpoint_is_passed_over",
    ),
    (
        "training worker killed in an epoch",
        "at most one checkpoint interval",
        "tests/faults/test_training_faults.py::test_a_worker_killed_in_the_middle_of_an_epoch",
    ),
    (
        "extraction's driver and actor killed",
        "the frames in hand",
        "tests/teacher/test_extract.py::test_killed_driver_and_killed_actor",
    ),
    (
        "two jobs want the same extraction",
        "nothing",
        "tests/faults/test_extraction_faults.py::test_two_jobs_that_want_the_same_at_once_encode_it_once",
    ),
    (
        "storage full",
        "the frame in hand",
        "tests/faults/test_extraction_faults.py::test_a_full_disk_ends_the_extraction_and_the_same_command_goes_on",
    ),
)
_RECOVERED = re.compile(r"^recovered: ([0-9.]+) s$", re.MULTILINE)


def main() -> None:
    """Print the table as Markdown."""
    print("| fault | lost | going on after | test |\n| --- | --- | --- | --- |")
    for fault, lost, test in ROWS:
        seconds = [took for _ in range(TIMES) if (took := _seconds(test)) is not None]
        median = f"{statistics.median(seconds):.1f} s" if seconds else "—"
        print(f"| {fault} | {lost} | {median} | `{test.rpartition('::')[2]}` |", flush=True)


def _seconds(test: str) -> float | None:
    """From the fault to the first work after it, if the test tells it."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{test} did not recover:\n{done.stdout[-3000:]}")
    found = _RECOVERED.search(done.stdout)
    return float(found[1]) if found else None


if __name__ == "__main__":
    main()
