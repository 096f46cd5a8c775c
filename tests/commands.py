"""The command line in processes of its own, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def clip2scene(
    *words: object, timeout_s: int = 400, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clip2scene.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY, env=environment)


def succeed(*words: object) -> str:
    done = clip2scene(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fail(*words: object) -> str:
    """The one sentence that a mistake gets."""
    done = clip2scene(*words)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("clip2scene: "), done.stderr[-3000:]
    return last


def tell_recovery(fault_at_s: float) -> None:
    """Say how long it took from the fault (monotonic) until work went on; tests/benchmarks/recovery.py reads it."""
    seconds, test = time.monotonic() - fault_at_s, os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split()[0]
    print(f"\nrecovered: {test} after {seconds:.1f} s", file=sys.__stdout__, flush=True)  # past a test's capsys
