"""The command line in processes of its own, as a user types it."""

from __future__ import annotations

import subprocess
import sys
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
