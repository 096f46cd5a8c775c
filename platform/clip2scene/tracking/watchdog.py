"""Run a command that must not outlive its owner: ``python -m clip2scene.tracking.watchdog COMMAND ...``.

The owner starts this module as the leader of a new session with a pipe as standard input, and keeps the other end. When
that end closes, deliberately or because the owner died, every process of the session's group is ended.
(PR_SET_PDEATHSIG would not do: it does not reach the command's own children, and follows a thread, not a process.)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

GRACE_S = 5.0


def watched(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a command under this module; it ends when the returned process's ``stdin`` is closed.

    Args:
        command: with its arguments.
        options: more arguments of :class:`subprocess.Popen`.
    """
    watchdog = [sys.executable, "-m", "clip2scene.tracking.watchdog"]
    return subprocess.Popen([*watchdog, *command], stdin=subprocess.PIPE, start_new_session=True, **options)


def main(command: list[str]) -> int:
    """Run ``command`` until it ends or standard input closes, and return its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the group below; this process must survive it
    owner = os.getppid()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while process.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        if readable or os.getppid() != owner:
            break
    status = process.poll()
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _wait_for_group(time.monotonic() + GRACE_S)
    return process.wait() if status is None else status


def _wait_for_group(deadline_s: float) -> None:
    """Wait until this process is alone in its group; at the deadline it kills the group, itself included."""
    import psutil

    group = os.getpgid(0)
    while time.monotonic() < deadline_s:
        others = [p for p in psutil.process_iter() if p.pid != os.getpid() and _group(p.pid) == group]
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in others):
            return
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
