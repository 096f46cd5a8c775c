"""Jobs of the stage ``predict`` with a network of random weights, in this process and without Ray."""

from __future__ import annotations

from pathlib import Path

import torch

from clip2scene.config import Job, StudentSettings
from clip2scene.jobfile import load_job
from clip2scene.predictions import Predictions, predict
from clip2scene.stages import Stages
from clip2scene.student.checkpoint import save_checkpoint
from clip2scene.student.network import Student
from commands import REPOSITORY
from tiny_training import STUDENT


def network_file(
    path: Path,
    settings: StudentSettings = STUDENT,
    about: dict | None = None,
    *,
    num_classes: int | None = None,
    dim: int | None = None,
) -> Path:
    """A fine-tuned network of ``num_classes``, or a student in a space of ``dim``, with random weights."""
    torch.manual_seed(0)
    model = Student(settings, embedding_dim=dim, num_classes=num_classes)
    save_checkpoint(path, model.state_dict(), settings, {"digest": "", "history": []} | (about or {}))
    return path


def job_of(kind: str, root: Path, storage: Path, *words: str) -> Job:
    """A job of the stage ``predict``, to which ``words`` are further overrides."""
    settings = [f"student={{voxel_size_m: {STUDENT.voxel_size_m}, channels: {list(STUDENT.channels or ())}}}"]
    settings += [f"dataset.kind={kind}", f"dataset.root={root}", f"storage={storage}", "resources.num_workers=0"]
    return load_job(REPOSITORY / "jobs" / "demo.yaml", [*settings, "stage=predict", *words])


def predicted(kind: str, root: Path, storage: Path, *words: str) -> Predictions:
    """The predictions of such a job."""
    return predict(Stages(job_of(kind, root, storage, *words)))
