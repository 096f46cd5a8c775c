"""What goes wrong: errors whose text is one sentence for the user, and how other errors become part of one."""

from __future__ import annotations


class Clip2sceneError(Exception):
    """Base of errors with one sentence for the user: what was wrong, where, and what is allowed."""


class ConfigError(Clip2sceneError, ValueError):
    """A job file, an override or an argument is invalid."""


class DataError(Clip2sceneError, ValueError):
    """A dataset file is missing, damaged, or contradicts the dataset's tables."""


class StorageError(Clip2sceneError, RuntimeError):
    """The storage cannot be written or read."""


class TrainingError(Clip2sceneError, RuntimeError):
    """A run that ended without its result."""


class DivergedError(TrainingError):
    """The loss is not finite any more: the settings are at fault, not the machine."""


class TrackingError(Clip2sceneError, RuntimeError):
    """A tracking server that does not start, does not answer or refuses a request."""


class ClusterError(Clip2sceneError, RuntimeError):
    """The cluster does not answer, or refuses a request."""


def one_line(error: object, characters: int = 500) -> str:
    """An error's text as part of a sentence: without line breaks, and cut where it is longer."""
    return " ".join(str(error).split())[:characters]


def last_line(error: object) -> str:
    """An error's last line: usually the actual error of a remote traceback; the class name if there is no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
