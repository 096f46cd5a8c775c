"""Paths below the dataset's root, which no path of a table or an index may leave."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from clip2scene.errors import DataError


def resolve(root: Path, relative: str) -> Path:
    """The path of a file that an index names; refused if it is outside the dataset's root (also through a link).

    Args:
        root: the dataset's folder.
        relative: POSIX path below it, from the dataset's tables.

    Raises:
        DataError: the path is empty, absolute, climbs with ``..`` or follows a link out of the root.
    """
    return _inside(root, check_relative(relative, "the index"), "the index")


def check_relative(path: object, source: str) -> str:
    """The path, if it stays below the root that it is relative to (links aside).

    Args:
        path: a path as a table gives it.
        source: the table, for the message.

    Raises:
        DataError: it is not a string, empty, absolute, or contains ``..``.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{source}: {path!r} is not a path of a file; allowed: a relative path with forward slashes")
    if path.startswith("/") or (".." in path and ".." in path.split("/")):
        raise DataError(f"{source}: path {path!r} leaves the dataset's root; allowed: paths below it, relative to it")
    return path


class DatasetFiles:
    """The files below a dataset's root, known from one listing per folder instead of one call per file.

    nuScenes has half a million in some thirty folders, often on a network disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._folders: dict[str, dict[str, bool]] = {}

    def existing(self, relative: object, source: str, hint: str = "") -> str:
        """The normalised POSIX path of a file, which must exist below the root.

        Args:
            relative: the path as a table gives it.
            source: the record that names it, for the message.
            hint: what the message adds if the file is missing.

        Raises:
            DataError: there is no such file, or it is outside the root (by ``..``, an absolute path or a link).
        """
        path = PurePosixPath(check_relative(relative, source))
        files = self._listing(path.parent.as_posix(), source)
        if path.name not in files:
            missing = f"{source}: file {path.as_posix()} is missing below {self._root}"
            raise DataError(f"{missing}; {hint}" if hint else missing)
        if files[path.name]:
            _inside(self._root, path.as_posix(), source)
        return path.as_posix()

    def holds(self, relative: str) -> bool:
        """Whether a file exists, by its POSIX path below the root.

        Raises:
            DataError: its folder cannot be listed, or is outside the root.
        """
        folder, _, name = relative.rpartition("/")
        return name in self._listing(folder, relative)

    def names(self, folder: str, pattern: str) -> list[str]:
        """Sorted names of a folder's files that fully match a regular expression; none if there is no such folder.

        Args:
            folder: POSIX path below the root.
            pattern: for the whole name.

        Raises:
            DataError: the folder cannot be listed, or is outside the root.
        """
        return sorted(name for name in self._listing(folder, folder) if re.fullmatch(pattern, name))

    def _listing(self, folder: str, source: str) -> dict[str, bool]:
        """Names of the folder's files, and whether each is a link."""
        if folder not in self._folders:
            _inside(self._root, folder, source)
            try:
                with os.scandir(self._root / folder) as entries:
                    self._folders[folder] = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                self._folders[folder] = {}
            except OSError as error:
                raise DataError(f"{self._root / folder}: cannot list the folder ({error.strerror})") from error
        return self._folders[folder]


def _inside(root: Path, relative: str, source: str) -> Path:
    """The path with all links resolved; refused if it is then not below the root."""
    # os.path.realpath, as Path.resolve raises on a loop of links.
    path = Path(os.path.realpath(root / relative))
    if not path.is_relative_to(os.path.realpath(root)):
        raise DataError(
            f"{source}: path {relative!r} leaves the dataset's root through a link; allowed: files in {root}"
        )
    return path
