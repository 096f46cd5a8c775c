"""Pre-training without labels in the one training loop, by CLIP2Scene (section 3) or a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from clip2scene.config import DistillSettings
from clip2scene.student.network import Forward, Student
from clip2scene.training.fit import Training
from clip2scene.training.objectives import LOSSES, Step
from clip2scene.training.samples import Sample


@dataclass(frozen=True)
class Distillation(Training):
    """Minimises the loss of ``settings.method``; see :mod:`clip2scene.training.objectives`."""

    settings: DistillSettings
    text_CD: torch.Tensor
    """Class embeddings t_c, L2-normalised, float32."""

    def __post_init__(self) -> None:
        if self.source.label_vocabulary is not None:
            raise ValueError("annotation-free training must not read labels")
        has_superpixels = self.source.superpixels is not None
        assert self.settings.method != "slidr" or has_superpixels, "slidr needs a source with superpixels"

    def build(self) -> nn.Module:
        """A student with the heads into the teacher's space that the loss trains: ``scr``, and ``stcr`` beside it."""
        settings = self.settings
        two = settings.method == "clip2scene" and bool(settings.scr.weight and settings.stcr.weight)
        heads: tuple[Literal["scr", "stcr"], ...] = ("scr", "stcr") if two else ("scr",)
        return Student(self.student, embedding_dim=self.text_CD.shape[1], heads=heads)

    def loss(self, model: Forward, batch: Sample, epoch: int, step: int) -> dict[str, torch.Tensor]:
        """``loss``; for CLIP2Scene its terms ``scr`` and ``stcr``; ``agreement`` for all methods that use images."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        about_step = Step(
            settings=self.settings,
            voxel_size_m=self.student.voxel_size_m,
            text_CD=self.text_CD.to(batch.points_NI.device, non_blocking=True),
            seed=self.seed,
            epoch=epoch,
            number=step,
            rank=torch.distributed.get_rank() if distributed else 0,
        )
        return LOSSES[self.settings.method](model, batch, about_step)
