"""Checks that the files of tables exist below the dataset's root: one listing per folder, not one call per file."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from clip2scene.data.clouds import check_relative, inside
from clip2scene.data.index import DataError


class DatasetFiles:
    """The files below a dataset's root: nuScenes has half a million in some thirty folders, often on a network disk."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._folders: dict[str, dict[str, bool]] = {}

    def existing(self, relative: object, source: str) -> str:
        """The normalised POSIX path of a file, which must exist below the root.

        Args:
            relative: the path as a table gives it.
            source: the record that names it, for the message.

        Raises:
            DataError: there is no such file, or it is outside the root (by ``..``, an absolute path or a link).
        """
        path = PurePosixPath(check_relative(relative, source))
        files = self._listing(path.parent.as_posix(), source)
        if path.name not in files:
            raise DataError(f"{source}: file {path.as_posix()} is missing below {self._root}")
        if files[path.name]:
            self._refuse_escape(path.as_posix(), source)
        return path.as_posix()

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
            self._refuse_escape(folder, source)
            try:
                with os.scandir(self._root / folder) as entries:
                    self._folders[folder] = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                self._folders[folder] = {}
            except OSError as error:
                raise DataError(f"{self._root / folder}: cannot list the folder ({error.strerror})") from error
        return self._folders[folder]

    def _refuse_escape(self, relative: str, source: str) -> None:
        if inside(self._root, relative) is None:
            raise DataError(
                f"{source}: path {relative!r} leaves the dataset's root through a link; allowed: files in {self._root}"
            )
