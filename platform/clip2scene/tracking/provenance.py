"""Where a run comes from: the code's revision, who started it, and the process that writes it."""

from __future__ import annotations

import functools
import getpass
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
REVISION = "REVISION"
"""File in the package that says its revision where there is no checkout to ask: in an image, and on a cluster."""
HOST_TAG, _PID_TAG, _STARTED_TAG = "process.host", "process.pid", "process.started"
OPENED_TAG = "process.opened"
"""When a process last opened the run (seconds since 1970); the run's own start is that of the first."""
_CLOCK_S = 60.0
"""A process's start seems to move by as much as the clock is set."""


@functools.cache
def git_revision() -> str:
    """The checkout's commit, ``-dirty`` when its files were changed, or ``unknown`` outside a checkout of this code.

    Files that git does not know, such as a user's own jobs and outputs, are no change of the code.
    Where the package has a file ``REVISION``, that says it instead.
    """
    with suppress(OSError):
        return (_PACKAGE / REVISION).read_text(encoding="utf-8").strip() or "unknown"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")  # an environment may lie in the checkout of another project
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def origin_tags() -> dict[str, str]:
    """Tags of a new run: who started it, and from which code."""
    revision = git_revision()
    tags = {"mlflow.source.name": "clip2scene", "mlflow.source.type": "LOCAL", "git_revision": revision}
    if revision != "unknown":
        tags["mlflow.source.git.commit"] = revision.removesuffix("-dirty")
    if (user := user_name()) is not None:
        tags["mlflow.user"] = user
    return tags


def user_name() -> str | None:
    """The current user's name; None where there is none, as in a container whose user id has no name."""
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return None


def process_tags() -> dict[str, str]:
    """Tags of a run that is opened or continued: by which :func:`is_gone` knows this process, and when that was."""
    import psutil

    this = psutil.Process()
    return {
        HOST_TAG: socket.gethostname(),
        _PID_TAG: str(this.pid),
        _STARTED_TAG: f"{this.create_time():.2f}",
        OPENED_TAG: f"{time.time():.3f}",
    }


def is_gone(tags: Mapping[str, str]) -> bool:
    """Whether the process of a run's :func:`process_tags` has ended; other users' and machines' count as there."""
    import psutil

    own = tags.get("mlflow.user") == user_name()  # others' processes may be hidden
    if not own or tags.get(HOST_TAG) != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(tags[_PID_TAG]))
        is_another = abs(process.create_time() - float(tags[_STARTED_TAG])) > _CLOCK_S
        return is_another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
