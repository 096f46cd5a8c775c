"""The benchmark runner: its rows are measured, judged and written down. How fast anything is, is not asked here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from commands import REPOSITORY

ROWS = ("help", "store-warm", "store-bytes")


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tests/benchmarks/run.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=400, check=False)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    """Three cheap rows, one of them by a goal that nothing reaches and one by a goal that everything does; and one that
    a quick run leaves out."""
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    goals = ("--goal", "store-warm=1e-9", "help=1e9")
    done = bench("--mode", "quick", "--json", file, *goals, "--rows", *ROWS, "sweep")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text()), done.stdout


def test_json_names_machine_date_and_revision_and_holds_every_sample(judged: tuple[dict, str]) -> None:
    values, _ = judged
    assert values["format"] == "clip2scene-benchmarks-1"
    assert values["machine"]["cores"] >= 1
    assert values["machine"]["processor"]
    assert {"date", "revision", "mode", "seconds"} <= set(values)
    assert {row["name"] for row in values["rows"]} == {*ROWS, "sweep"}
    for row in values["rows"]:
        if row["name"] == "sweep":
            continue
        assert row["baseline"]
        assert row["work"]
        assert len(row["ours"]) == len(row["ratios"])
        assert len(row["baseline_samples"]) == len(row["ours"])
        assert min(row["ours"]) > 0
        assert min(row["ratios"]) <= row["median"] <= max(row["ratios"])


def test_a_goal_decides_between_ok_and_short_and_the_last_line_counts_them(judged: tuple[dict, str]) -> None:
    values, printed = judged
    status = {row["name"]: row["status"] for row in values["rows"]}
    assert (status["store-warm"], status["help"]) == ("short", "ok")
    # Bytes are the same wherever it runs.
    assert status["store-bytes"] == "ok"
    assert printed.strip().splitlines()[-1] == values["counts"] == "2 ok, 1 short, 1 skipped"


def test_what_cannot_run_here_is_listed_with_its_reason(judged: tuple[dict, str]) -> None:
    (row,) = [row for row in judged[0]["rows"] if row["name"] == "sweep"]
    assert (row["status"], row["reason"]) == ("skipped", "minutes; BENCH=full runs it")


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    done = bench("--rows", "nonsense")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("bench: no row 'nonsense'; allowed: ")
    assert "store-warm" in last
