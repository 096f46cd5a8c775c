"""Where a run comes from: the code's revision and who started it."""

from __future__ import annotations

import functools
import getpass
import subprocess
from contextlib import suppress
from pathlib import Path


def git_revision(folder: str | Path | None = None) -> str:
    """The checkout's commit, ``-dirty`` when files differ from it, or ``unknown`` outside a checkout.

    ``folder`` is this package's own when not given.
    """
    folder = Path(folder) if folder is not None else Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def origin_tags() -> dict[str, str]:
    """Tags of a new run: who started it, and from which code."""
    revision = _revision()
    tags = {"mlflow.source.name": "clip2scene", "mlflow.source.type": "LOCAL", "git_revision": revision}
    if revision != "unknown":
        tags["mlflow.source.git.commit"] = revision.removesuffix("-dirty")
    with suppress(OSError, KeyError):  # a container's user may have no name
        tags["mlflow.user"] = getpass.getuser()
    return tags


@functools.cache
def _revision() -> str:
    return git_revision()
