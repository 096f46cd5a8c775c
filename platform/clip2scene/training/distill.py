"""Pre-training without labels: SCR + StCR + S3 over K sweeps (CLIP2Scene, section 3).

Legend: N points of all sweeps, P point-pixel pairs, C classes, D width of the teacher's space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize

from clip2scene.config import DistillSettings, StudentSettings
from clip2scene.geometry.interpolation import bilinear
from clip2scene.losses.scr import semantic_consistency
from clip2scene.losses.stcr import grid_cells, spatial_temporal_consistency
from clip2scene.losses.switching import switch_labels
from clip2scene.student.network import Student
from clip2scene.training.fit import Training
from clip2scene.training.samples import Sample


@dataclass(frozen=True)
class Distillation(Training):
    """The total loss is ``SCR + StCR``; each has a linear head of its own."""

    student: StudentSettings
    settings: DistillSettings
    text_CD: torch.Tensor
    """Class embeddings t_c, L2-normalised, float32."""

    def __post_init__(self) -> None:
        if self.source.label_vocabulary is not None:
            raise ValueError("annotation-free training must not read labels")

    def build(self) -> nn.Module:
        """A student with both heads into the teacher's space."""
        return Student(self.student, embedding_dim=self.text_CD.shape[1])

    def loss(self, model: nn.Module, batch: Sample, epoch: int, step: int) -> dict[str, torch.Tensor]:
        """``loss``, ``scr``, ``stcr``, and ``agreement``: share of pairs where student and teacher say the same."""
        settings = self.settings
        text_CD = self.text_CD.to(batch.points_N4.device)
        heads = model(batch.points_N4, batch.cloud_N)
        scr_PD = self._features(heads["scr"][batch.pair_point_P])
        stcr_PD = self._features(heads["stcr"][batch.pair_point_P])
        with torch.no_grad():
            pixels_PD = self._features(bilinear(batch.features_MhwD, batch.pair_image_P, batch.pair_position_P2))
            pixel_labels_P = (pixels_PD @ text_CD.T).argmax(1)
            predictions_P = (scr_PD @ text_CD.T).argmax(1)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            labels_P = switch_labels(pixel_labels_P, predictions_P, settings.s3, epoch, generator)
            cells_P = grid_cells(batch.pair_xyz_P3, batch.pair_frame_P, settings.stcr.grid_size_m)
        scr = semantic_consistency(scr_PD, labels_P, text_CD, settings.scr.tau)
        stcr = spatial_temporal_consistency(stcr_PD, pixels_PD, pixel_labels_P, cells_P, text_CD, settings.stcr.lambda_)
        return {
            "loss": settings.scr.weight * scr + settings.stcr.weight * stcr,
            "scr": scr,
            "stcr": stcr,
            "agreement": (predictions_P == pixel_labels_P).float().mean(),
        }

    def _features(self, features_PD: torch.Tensor) -> torch.Tensor:
        features_PD = features_PD.float()
        return normalize(features_PD, dim=1) if self.settings.normalise_features else features_PD
