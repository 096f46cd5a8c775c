"""Supervised training of a pre-trained or random student on a fraction of the labels.

Legend: N points, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clip2scene.config import FinetuneSettings
from clip2scene.data.index import Frame
from clip2scene.errors import ConfigError
from clip2scene.losses.lovasz import lovasz_softmax
from clip2scene.student.network import Forward, Student
from clip2scene.training.fit import Training
from clip2scene.training.samples import Sample


@dataclass(frozen=True)
class Finetuning(Training):
    """Cross-entropy over the labelled points, with or without Lovász-Softmax; ignored points do not count."""

    settings: FinetuneSettings
    num_classes: int
    pretrained: dict[str, torch.Tensor] | None
    """Weights of the distilled student to take the backbone from; None for random initialisation."""

    def build(self) -> nn.Module:
        """A student with a classifier; a linear probe's backbone is frozen."""
        model = Student(self.student, num_classes=self.num_classes)
        if self.pretrained is not None:
            prefix = "backbone."
            backbone = {k.removeprefix(prefix): v for k, v in self.pretrained.items() if k.startswith(prefix)}
            model.backbone.load_state_dict(backbone)
        if self.settings.mode == "linear_probe":
            model.freeze_backbone()
        return model

    def learning_rate_scale(self, parameter: str) -> float:
        """The new classifier may move faster than the backbone."""
        return self.settings.head_learning_rate_scale if parameter.startswith("heads.") else 1.0

    def loss(self, model: Forward, batch: Sample, epoch: int, step: int) -> dict[str, torch.Tensor]:
        """``loss`` and ``accuracy`` on labelled points; also ``lovasz`` if that is part of the loss."""
        logits_NC = model(batch.points_NI, batch.cloud_N)["classifier"].float()
        labels_N = batch.labels_N.long() - 1
        counted_N = labels_N >= 0
        loss = cross_entropy(logits_NC, labels_N, ignore_index=-1, reduction="sum") / counted_N.sum().clamp(min=1)
        right = ((logits_NC.argmax(1) == labels_N) & counted_N).sum() / counted_N.sum().clamp(min=1)
        if self.settings.loss == "cross_entropy":
            return {"loss": loss, "accuracy": right}
        lovasz = lovasz_softmax(logits_NC, labels_N)
        return {"loss": loss + lovasz, "lovasz": lovasz, "accuracy": right}


def choose_labelled(frames: tuple[Frame, ...], settings: FinetuneSettings) -> tuple[Frame, ...]:
    """The keyframes with labels that may be used: every n-th keyframe or every n-th scene.

    Keyframes begin with the first, as in CLIP2Scene's released code, and scenes with the n-th, as in SLidR's
    (``downstream/dataloader_nuscenes.py``). SLidR's scenes are in the order of nuScenes' table, ours of names.

    Args:
        frames: training keyframes in scene and time order.
        settings: with n, and whether keyframes or scenes count.

    Raises:
        ConfigError: fewer than n scenes.
    """
    every = settings.every
    if settings.protocol == "clip2scene_frame":
        return frames[::every]
    scenes = list(dict.fromkeys(frame.scene for frame in frames))
    if len(scenes) < every:
        raise ConfigError(
            f"finetune.label_fraction={settings.label_fraction:g}: one scene in {every}, and the training split has "
            f"{len(scenes)}"
        )
    scenes = scenes[every - 1 :: every]
    return tuple(frame for frame in frames if frame.scene in set(scenes))
