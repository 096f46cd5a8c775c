"""A trained student in one safetensors file, with its settings, its heads and where it came from as metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clip2scene.config import StudentSettings
from clip2scene.errors import DataError, one_line

FORMAT = "clip2scene-student-1"


@dataclass(frozen=True)
class Checkpoint:
    """Weights and origin of a student."""

    weights: dict[str, torch.Tensor]
    about: dict[str, Any]
    """``student`` settings, ``digest`` of the run that made it, ``history`` (one row of metrics per epoch)."""


def save_checkpoint(
    path: Path, weights: dict[str, torch.Tensor], settings: StudentSettings, about: dict[str, Any]
) -> None:
    """Write the file; the caller renames it into place."""
    metadata = {"format": FORMAT, "student": settings.model_dump(mode="json"), **about}
    save_file(weights, path, metadata={"clip2scene": json.dumps(metadata)})


def load_checkpoint(path: Path, settings: StudentSettings) -> Checkpoint:
    """Read a student of exactly these settings.

    Raises:
        DataError: there is no such file, or it is not a student, or one of another architecture (the message names the
            setting).
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("clip2scene", "{}"))
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such checkpoint") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable safetensors checkpoint ({one_line(error)})") from error
    if about.get("format") != FORMAT:
        raise DataError(f"{path}: not a clip2scene student (format {about.get('format')!r}, expected {FORMAT!r})")
    made_with, expected = about.get("student", {}), settings.model_dump(mode="json")
    for key in expected | made_with:
        if key not in expected:
            ours = "this version has no such setting"
        elif key in made_with and made_with[key] == expected[key]:
            continue
        else:
            ours = f"this job has student.{key}={expected[key]}"
        theirs = f"with student.{key}={made_with[key]}" if key in made_with else f"before there was a student.{key}"
        raise DataError(f"{path}: a student of another architecture: trained {theirs}, {ours}")
    return Checkpoint(weights, about)
