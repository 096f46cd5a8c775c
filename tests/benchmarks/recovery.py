"""Seconds from a fault to work going on, median of three: prints the table of faults in RESULTS.md.

The tests are run three times; each says itself how long it took.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = 3
ROWS = (
    # fault, what is lost, what is waited for, test
    (
        "training worker killed in an epoch",
        "at most one checkpoint interval",
        "an epoch's end",
        "test_a_worker_killed_in_the_middle_of_an_epoch",
    ),
    (
        "node lost during training",
        "at most one checkpoint interval",
        "the next epoch's end, after the last one's",
        "test_a_node_lost_during_training",
    ),
    (
        "job's driver killed, job submitted again",
        "at most one checkpoint interval",
        "an epoch's end",
        "test_a_driver_is_killed_and_its_job_submitted_again",
    ),
    (
        "killed while it writes a checkpoint",
        "at most one checkpoint interval",
        "an epoch's end",
        "test_killed_while_it_writes_a_checkpoint",
    ),
    (
        "newest checkpoint damaged",
        "one checkpoint interval",
        "an epoch's end",
        "test_a_damaged_checkpoint_is_passed_over",
    ),
    ("extraction actor killed", "the frame in hand", "the next frame", "test_killed_driver_and_killed_actor"),
    ("node lost during extraction", "the frames in hand", "all is encoded", "test_a_node_lost_during_extraction"),
    (
        "storage full",
        "the frame in hand",
        "all is encoded, with the command again",
        "test_a_full_disk_ends_the_extraction_and_the_same_command_goes_on",
    ),
    ("MLflow away for 30 s", "nothing", "the next metric", "test_a_server_that_comes_back_in_time_is_not_noticed"),
    (
        "MLflow away for longer",
        "system metrics of that time",
        "all delivered, once it is back",
        "test_what_is_written_during_a_long_outage_is_delivered_later_in_the_run",
    ),
    (
        "MLflow gone at the end, delivery killed twice",
        "nothing",
        "all delivered by the next command",
        "test_the_next_command_delivers_what_was_left_and_may_be_killed_in_it",
    ),
    (
        "PostgreSQL crashes and starts again",
        "nothing",
        "all metrics there",
        "test_postgres_crashes_and_starts_again_while_two_write",
    ),
)
_RECOVERED = re.compile(r"^recovered: (\w+) after ([0-9.]+) s$", re.MULTILINE)


def main() -> int:
    """Print the table as Markdown; the status is 1 if a fault was not recovered from as its test demands."""
    seconds: dict[str, list[float]] = defaultdict(list)
    whole = True
    for _ in range(TIMES):
        recovered, passed = _recoveries()
        whole &= passed
        for test, took in recovered:
            seconds[test].append(took)
    print("| fault | lost | seconds | until | test |\n| --- | --- | --- | --- | --- |")
    for fault, lost, until, test in ROWS:
        took_s = f"{statistics.median(seconds[test]):.1f}" if len(seconds[test]) == TIMES else "not recovered"
        print(f"| {fault} | {lost} | {took_s} | {until} | `{test}` |")
    return int(not whole)


def _recoveries() -> tuple[list[tuple[str, float]], bool]:
    """What one run of the tests told, and whether all passed."""
    named = " or ".join(test for *_, test in ROWS)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-k", named, "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"not everything recovered:\n{done.stdout[-5000:]}", file=sys.stderr)
    found = _RECOVERED.findall(done.stdout)
    print(*found, file=sys.stderr, flush=True)
    return [(test, float(took)) for test, took in found], not done.returncode


if __name__ == "__main__":
    sys.exit(main())
