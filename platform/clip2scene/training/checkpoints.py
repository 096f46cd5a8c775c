"""Checkpoints of a run: numbered folders, each with the hashes of its files, so that a damaged one is passed over."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

CHECKPOINTS_KEPT = 2
"""The newest, and the one before in case the newest is damaged."""
SEAL = "seal.json"


def seal(folder: Path) -> None:
    """Record the hashes of a checkpoint's files, so that :func:`newest_intact` can check them."""
    digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(digests), encoding="utf-8")


def newest_intact(folders: Sequence[Path], note: Callable[[str], None]) -> Path | None:
    """The last checkpoint with its files as they were written; ``note`` gets a sentence for each passed over."""
    for folder in reversed(folders):
        if _is_intact(folder):
            return folder
        note(f"{folder}: this checkpoint is damaged; going on from the one before")
    return None


def _is_intact(folder: Path) -> bool:
    try:
        digests: dict[str, str] = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def numbered(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint_[0-9][0-9][0-9][0-9][0-9][0-9]"))
