"""Where artifacts lie and how they get there: digest-addressed, written aside and renamed, so never half there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip2scene.config import Clip2sceneError


class StorageError(Clip2sceneError, RuntimeError):
    """The storage cannot take what must be written."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it when the block ends well, and vanishes when it does not.

    Raises:
        StorageError: the disk is full or refuses.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        aside.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise StorageError(f"{path}: cannot be written ({os.strerror(error.errno)})") from error
        raise
    finally:
        if aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


class Storage:
    """A folder of artifacts: ``<kind>/<digest>`` holds one that is finished."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().resolve()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"storage={root}: cannot make this folder ({error.strerror})") from error

    def path(self, kind: str, name: str) -> Path:
        """Where an artifact lies or will lie."""
        return self.root / kind / name

    def write_json(self, path: Path, values: Any) -> None:
        """Write JSON atomically."""
        with writing(path) as aside:
            aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
