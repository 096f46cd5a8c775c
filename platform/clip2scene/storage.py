"""Where artifacts lie and how they get there: digest-addressed, written aside and renamed, so never half there.

A storage is a folder, or an object store (``s3://BUCKET/PREFIX``) with a folder on every machine that caches it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip2scene.config import digest_of
from clip2scene.remote import ObjectStore, StorageError, is_remote

__all__ = ["Storage", "StorageError", "folder_of", "is_remote", "is_seen", "locked", "writing"]

CACHE = "CLIP2SCENE_CACHE"
"""Environment variable with the folder below which object stores are cached; the same path on every machine."""
_DEFAULT_CACHE = "~/.cache/clip2scene"
LOCK = ".lock"
"""File in a folder, locked by the process that fills the folder."""
_SEEN_WITHIN_S = 5.0
_log = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it when the block ends well, and vanishes when it does not.

    Raises:
        StorageError: the disk is full or refuses.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # two containers may have the same process ids
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


@contextmanager
def locked(folder: Path, doing: str, *, name: str = LOCK) -> Iterator[None]:
    """Hold a lock, which is released even if this process is killed: a second command waits, and then finds all done.

    Args:
        folder: holds the lock's file; made if it is missing.
        doing: what the run that holds the lock does (``fills this store``), for the message to the one that waits.
        name: of the lock's file.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("%s: another run %s; waiting for it", folder, doing)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # Lustre without the option flock, some FUSE
            _log.warning("%s: no locks there (%s); start nothing twice at a time", folder, error.strerror)
        yield


def is_seen(path: Path) -> bool:
    """Whether a file that another node has made is here, or is within some seconds: a network may show it late."""
    deadline_s = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def folder_of(storage: str | Path) -> Path:
    """The folder of a job's ``storage`` on this machine: itself, or the cache of the object store.

    Raises:
        ConfigError: a URI that is none of an object store, or holds a password.
    """
    if not is_remote(storage):
        return Path(storage).expanduser().resolve()
    store = ObjectStore.of(str(storage))
    cache = Path(os.environ.get(CACHE) or _DEFAULT_CACHE).expanduser().resolve()
    return cache / digest_of(store.key(""), store.endpoint)


class Storage:
    """Artifacts: ``<kind>/<digest>`` holds one that is finished. Small, and cheap to send to a worker.

    Paths are always of the folder on this machine. Of an object store it holds what was asked for here: what is
    finished is put there first and appears here second, so what is here need not be looked for there.

    Args:
        root: a folder, made when it is not there; or the URI of an object store, which must be.

    Raises:
        ConfigError: see :func:`folder_of`.
        StorageError: the folder cannot be made, or the object store cannot be reached, refuses, or has no such bucket.
    """

    def __init__(self, root: str | Path):
        self.root = folder_of(root)
        self.remote = ObjectStore.of(str(root)) if is_remote(root) else None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"storage={root}: cannot make this folder ({error.strerror})") from error
        if self.remote is not None:
            self.remote.check()

    def path(self, kind: str, name: str) -> Path:
        """Where an artifact lies or will lie."""
        return self.root / kind / name

    def name(self, path: Path) -> str:
        """Of the object that a path is the copy of."""
        return path.relative_to(self.root).as_posix()

    def where(self, path: Path) -> str:
        """A path as the user finds it: the object's URI, or the file."""
        return str(path) if self.remote is None else f"s3://{self.remote.key(self.name(path))}"

    def fetch(self, path: Path, *, anew: bool = False) -> bool:
        """Whether a file is there; it is brought from the object store if it is not here yet.

        Args:
            path: of the file.
            anew: bring it though it is here: it lies under a name that others write again.

        Raises:
            StorageError: the disk is full, or the object store cannot be reached or refuses.
        """
        if self.remote is None or (path.exists() and not anew):
            return path.exists()
        try:
            with writing(path) as aside:
                self.remote.get(self.name(path), aside)
        except FileNotFoundError:
            return False
        return True

    def keep(self, file: Path, path: Path) -> None:
        """Put a finished file into the object store as what is about to lie at ``path``; a folder needs nothing.

        Raises:
            StorageError: the object store cannot be reached or refuses.
        """
        if self.remote is not None:
            self.remote.put(file, self.name(path))

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """As :func:`writing`, and kept."""
        with writing(path) as aside:
            yield aside
            self.keep(aside, path)

    def names(self, folder: Path) -> list[str]:
        """Names of the files right below a folder, the object store's where there is one.

        Copies here that are not what lies there any more (it was removed or written anew) are dropped.

        Raises:
            OSError: the folder cannot be read.
            StorageError: the object store cannot be reached or refuses.
        """
        here = list(os.scandir(folder)) if folder.exists() else []
        if self.remote is None:
            return [entry.name for entry in here]
        there = self.remote.sizes(self.name(folder))
        for entry in here:
            if not entry.name.startswith(".") and entry.stat().st_size != there.get(entry.name):
                Path(entry.path).unlink()
        return list(there)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there.

        Raises:
            StorageError: the object store cannot be reached or refuses.
        """
        if self.remote is not None:
            self.remote.remove(self.name(path))
        path.unlink(missing_ok=True)

    def write_json(self, path: Path, values: Any) -> None:
        """Write JSON atomically."""
        with self.writing(path) as aside:
            aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
