"""Where artifacts lie and how they are written: addressed by digest, and never visible half-written.

A storage is a folder, or an object store (``s3://BUCKET/PREFIX``) with a folder on every machine as its cache.
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
from clip2scene.errors import StorageError
from clip2scene.paths import from_home
from clip2scene.remote import ObjectStore, is_remote

CACHE = "CLIP2SCENE_CACHE"
"""Environment variable: the folder that holds the caches of object stores, at the same path on every machine."""
_DEFAULT_CACHE = "~/.cache/clip2scene"
LOCK = ".lock"
"""File in a folder, locked by the process that fills the folder."""
_SEEN_WITHIN_S = 5.0
_log = logging.getLogger(__name__)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that is renamed to it after the block, or deleted if the block fails.

    Raises:
        StorageError: the disk is full, or the path may not be written.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")  # two containers may have the same process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    try:
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
def locked(folder: Path, doing: str | None = None, *, name: str = LOCK) -> Iterator[None]:
    """Hold a lock, which is released even if this process is killed: a second command waits, and then finds all done.

    Args:
        folder: holds the lock's file; made if it is missing.
        doing: what the run that holds the lock does (``fills this store``), for the message to the one that waits;
            nothing is said when not given.
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
            if doing is not None:
                _log.warning("%s: another run %s; waiting for it", folder, doing)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # Lustre without the option flock, some FUSE
            if doing is not None:
                _log.warning("%s: no locks there (%s); do not start a command twice at once", folder, error.strerror)
        yield


def write_json(path: Path, values: Any) -> None:
    """Write JSON plainly; :meth:`Storage.write_json` and :func:`writing` do so atomically."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def appears(path: Path) -> bool:
    """Whether a file of another node is visible here, now or within some seconds: a network disk may show it late."""
    deadline_s = time.monotonic() + _SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


def folder_of(storage: str | Path) -> Path:
    """The folder of a job's ``storage`` on this machine: the storage itself, or the cache of the object store.

    Raises:
        ConfigError: the URI is not one of an object store, or holds a password; or ``~NAME`` is no user.
    """
    if not is_remote(storage):
        return from_home(storage).resolve()
    store = ObjectStore.of(str(storage))
    cache = from_home(os.environ.get(CACHE) or _DEFAULT_CACHE).resolve()
    return cache / digest_of(store.key(""), store.endpoint)


class Storage:
    """Artifacts, each finished one at ``<kind>/<digest>``. Small, and cheap to send to a worker.

    Paths are always paths in the folder on this machine. With an object store, that folder holds what was fetched or
    made here. A finished file is uploaded before it appears here, so a file that is here is also there.

    Args:
        root: a folder, made if it is missing; or the URI of an object store, which must exist.

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
        """Name of the object that a path is the copy of."""
        return path.relative_to(self.root).as_posix()

    def where(self, path: Path) -> str:
        """Where the user finds a path: the object's URI, or the file."""
        return str(path) if self.remote is None else f"s3://{self.remote.key(self.name(path))}"

    def fetch(self, path: Path, *, refresh: bool = False) -> bool:
        """Whether a file exists; it is downloaded from the object store if it is not here yet.

        Args:
            path: of the file.
            refresh: download it even if it is here, as others overwrite files of this name.

        Raises:
            StorageError: the disk is full, or the object store cannot be reached or refuses.
        """
        if self.remote is None or (path.exists() and not refresh):
            return path.exists()
        try:
            with writing(path) as aside:
                self.remote.get(self.name(path), aside)
        except FileNotFoundError:
            return False
        return True

    def keep(self, file: Path, path: Path) -> None:
        """Upload a finished file to the object store, for ``path``; does nothing if the storage is a folder.

        Raises:
            StorageError: the object store cannot be reached or refuses.
        """
        if self.remote is not None:
            self.remote.put(file, self.name(path))

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """As :func:`writing`, with an upload to the object store before the file appears here."""
        with writing(path) as aside:
            yield aside
            self.keep(aside, path)

    def names(self, folder: Path) -> list[str]:
        """Names of the files directly in a folder, of the object store if there is one.

        Local copies that the object store no longer has (the object was removed or overwritten) are deleted.

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
        """Remove a file, if it exists.

        Raises:
            StorageError: the object store cannot be reached or refuses.
        """
        if self.remote is not None:
            self.remote.remove(self.name(path))
        path.unlink(missing_ok=True)

    def write_json(self, path: Path, values: Any) -> None:
        """Write JSON atomically."""
        with self.writing(path) as aside:
            write_json(aside, values)
