"""Which settings of a job are paths, and what makes them absolute.

``~`` is expanded like a relative path, on the machine where the user types it: elsewhere it would be another folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from clip2scene.config import Job, TeacherSettings
from clip2scene.errors import ConfigError
from clip2scene.remote import is_remote

LOCAL_DIR = "local-dir:"
"""In ``teacher.model``, what the folder of a model is preceded by."""
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
"""Suffixes of a ``teacher.pretrained`` that is a file."""


def from_home(path: str | Path) -> Path:
    """The path, in the user's home where it begins with ``~``.

    Raises:
        ConfigError: it begins with ``~NAME``, and there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: this machine has no such user; allowed: ~/ for your own home") from error


def absolute(path: str) -> str:
    """The same path for processes that start in another folder; URIs and absolute paths stay as they are."""
    return path if is_remote(path) or Path(path).is_absolute() else str(from_home(path).resolve())


def absolute_teacher(teacher: TeacherSettings) -> TeacherSettings:
    """The same teacher for processes that start in another folder."""
    model, pretrained = teacher.model, teacher.pretrained
    if model.startswith(LOCAL_DIR):
        model = LOCAL_DIR + absolute(model.removeprefix(LOCAL_DIR))
    if Path(pretrained).suffix in CHECKPOINTS:
        pretrained = absolute(pretrained)
    return teacher.model_copy(update={"model": model, "pretrained": pretrained})


Paths = str | list[str]
"""The value of a setting that is a path, or a list of them."""


def as_text(value: Paths) -> str:
    """The value as in ``key=value`` on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def relative_paths(job: Job) -> dict[str, tuple[Paths, Paths]]:
    """Every setting of a job with a path that is not absolute, by its dotted key: as given, and made absolute."""
    teacher = absolute_teacher(job.teacher)
    given = {"storage": job.storage, "dataset.root": job.dataset.root}
    given |= {"finetune.checkpoint": job.finetune.checkpoint, "predict.checkpoint": job.predict.checkpoint}
    pairs: dict[str, tuple[Paths, Paths]] = {
        key: (path, absolute(path)) for key, path in given.items() if path is not None
    }
    linked = list(job.dataset.linked_folders)
    pairs["dataset.linked_folders"] = (linked, list(map(absolute, linked)))
    pairs |= {f"teacher.{key}": (getattr(job.teacher, key), getattr(teacher, key)) for key in ("model", "pretrained")}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
