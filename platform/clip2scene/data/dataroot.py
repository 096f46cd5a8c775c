"""Paths below the dataset's root, which no path of a table or an index may leave."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clip2scene.errors import DataError


@dataclass(frozen=True)
class DataRoot:
    """The folder of a dataset, and the folders outside of it to which links in it may lead; workers get a copy."""

    path: Path
    linked_folders: tuple[Path, ...] = ()

    @classmethod
    def at(cls, path: str | Path, linked_folders: Iterable[str | Path] = ()) -> DataRoot:
        """With absolute paths, as workers run in other folders."""
        return cls(Path(path).resolve(), tuple(Path(folder).resolve() for folder in linked_folders))

    def path_of(self, relative: str, source: str = "the index") -> Path:
        """The absolute path of a file or folder, under the name that it has here: a cloud's name tells its format.

        Args:
            relative: POSIX path below the root, from an index or the dataset's tables.
            source: what names it, for the message.

        Raises:
            DataError: the path is empty, absolute, climbs with ``..``, or leads through links to neither the root nor
                one of the linked folders.
        """
        path = self.path / check_relative(relative, source)
        # os.path.realpath, as Path.resolve raises on a loop of links.
        end = Path(os.path.realpath(path))
        allowed = (self.path, *self.linked_folders)
        if not any(end.is_relative_to(os.path.realpath(folder)) for folder in allowed):
            raise DataError(
                f"{source}: path {relative!r} leaves the dataset's root through a link, to {end}; allowed: files in "
                f"{', '.join(map(str, allowed))}; dataset.linked_folders (`clip2scene index`, `inspect`: "
                "--linked-folder) allows other folders"
            )
        return path


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

    def __init__(self, root: DataRoot) -> None:
        self._root = root
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
            missing = f"{source}: file {path.as_posix()} is missing below {self._root.path}"
            raise DataError(f"{missing}; {hint}" if hint else missing)
        if files[path.name]:
            self._root.path_of(path.as_posix(), source)
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
            self._root.path_of(folder, source)
            try:
                with os.scandir(self._root.path / folder) as entries:
                    self._folders[folder] = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                self._folders[folder] = {}
            except OSError as error:
                raise DataError(f"{self._root.path / folder}: cannot list the folder ({error.strerror})") from error
        return self._folders[folder]
