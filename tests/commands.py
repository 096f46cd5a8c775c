"""The command line in processes of its own, as a user types it, and what tests of other processes need."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent


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


def begin(log: Path, *words: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command that writes all its output to ``log``."""
    command = [sys.executable, "-m", "clip2scene.cli", *map(str, words)]
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, text=True, cwd=REPOSITORY, env=environment)


def wait_until(
    condition: Callable[[], object],
    what: str,
    timeout_s: float = 120,
    process: subprocess.Popen | None = None,
    log: Path | None = None,
) -> None:
    """Wait for a condition; fails when ``process`` ends first, and then shows the end of ``log``."""
    deadline_s = time.monotonic() + timeout_s

    def told() -> str:
        return "" if log is None else f"\n{log.read_text()[-3000:]}"

    while not condition():
        assert process is None or process.poll() is None, f"the process ended before {what}{told()}"
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:.0f} s until {what}{told()}")
        time.sleep(0.05)


def wait_for(text: str, log: Path, process: subprocess.Popen, timeout_s: float = 300) -> None:
    """Wait until a process has written a text to its log."""
    wait_until(lambda: text in log.read_text(), repr(text), timeout_s, process, log)


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def free_port() -> int:
    """A port that nothing listens on."""
    return free_ports(1)[0]


def tell_recovery(fault_at_s: float) -> None:
    """Say how long it took from the fault (monotonic) until work went on; tests/benchmarks/recovery.py reads it."""
    seconds, test = time.monotonic() - fault_at_s, os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split()[0]
    print(f"\nrecovered: {test} after {seconds:.1f} s", file=sys.__stdout__, flush=True)  # past a test's capsys
