"""A tiny labelled dataset with a feature store of random features."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clip2scene.config import (
    ContrastSettings,
    DistillSettings,
    FinetuneSettings,
    OptimiserSettings,
    ResourceSettings,
    StudentSettings,
    TrainingSettings,
)
from clip2scene.data.index import Index
from clip2scene.data.nuscenes import build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.storage import Storage
from clip2scene.teacher import store
from clip2scene.teacher.store import FeatureStore
from clip2scene.training.distill import Distillation
from clip2scene.training.finetune import Finetuning
from clip2scene.training.samples import SampleSource

STUDENT = StudentSettings(voxel_size_m=1.0, channels=(8, 8, 16))
CONTRAST = ContrastSettings(max_pairs=256, superpixels_per_image=20)
ADAMW = OptimiserSettings(kind="adamw", learning_rate=5e-3)


def truncate(path: Path) -> None:
    """Cut off half of a file, as a crash of its machine may."""
    os.truncate(path, path.stat().st_size // 2)


@dataclass(frozen=True)
class Tiny:
    index: Index
    store: FeatureStore
    text_CD: torch.Tensor

    def distillation(self, settings: DistillSettings | None = None, **changes: object) -> Distillation:
        """``changes`` are fields of the training or of its settings."""
        values = {
            "seed": 0,
            "frames": self.index.frames[:4],
            "source": SampleSource(self.index.root, self.store, num_sweeps=2),
            "resources": ResourceSettings(num_workers=0, cached_frames=8, checkpoint_every_epochs=1),
            "student": STUDENT,
            "text_CD": self.text_CD,
        }
        return Distillation(**_with(values, settings or DistillSettings(), changes))

    def finetuning(self, settings: FinetuneSettings | None = None, **changes: object) -> Finetuning:
        """``changes`` are fields of the training or of its settings."""
        values = {
            "seed": 0,
            "frames": self.index.frames[:2],
            "source": SampleSource(self.index.root, label_vocabulary=vocabulary("nuscenes")),
            "resources": ResourceSettings(num_workers=0, cached_frames=8, checkpoint_every_epochs=4),
            "student": STUDENT,
            "num_classes": 16,
            "pretrained": None,
        }
        return Finetuning(**_with(values, settings or FinetuneSettings(), changes))


def _with(values: dict, settings: TrainingSettings, changes: dict) -> dict:
    own = {"epochs": 4, "batch_size": 2, "optimiser": ADAMW}
    own |= {key: value for key, value in changes.items() if key in type(settings).model_fields}
    others = {key: value for key, value in changes.items() if key not in own}
    return values | others | {"settings": settings.model_copy(update=own)}


def make_tiny(root: Path, version: str, folder: Path) -> Tiny:
    """Write random features of the dataset's images into a folder."""
    index, rng = build_index(root, version), np.random.default_rng(0)
    for frame in index.frames:
        features = {c.name: rng.standard_normal((4, 7, 12)).astype(np.float16) for c in frame.cameras}
        store.write_frame(folder, frame.frame_id, features, {}, "random", Storage(folder))
    images = sum(len(frame.cameras) for frame in index.frames)
    about = {"teacher": "random", "grid": [4, 7], "dim": 12, "frames": len(index.frames), "images": images}
    store.write_manifest(folder, about | {"broken": []}, Storage(folder))
    text_CD = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((16, 12)).astype(np.float32)), dim=1)
    return Tiny(index, FeatureStore.open(folder, Storage(folder)), text_CD)
