"""Switchable self-training (S3): a point's pseudo-label comes from its pixel or from its own prediction.

Legend: N points.
"""

from __future__ import annotations

import numpy as np
import torch

from clip2scene.config import S3Settings


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """The CPU generator of one step's draws on one rank."""
    # Mixed into 32 bits, because torch's CPU generator ignores the higher bits of its seed.
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(1)
    return torch.Generator().manual_seed(int(mixed[0]))


def switch_generator(settings: S3Settings, seed: int, step: int, rank: int) -> torch.Generator:
    """The generator of one step's switch: the same on every rank, unless ``synchronised`` is off."""
    return step_generator(seed, step, 0 if settings.synchronised else rank)


def switch_labels(
    pixel_labels_N: torch.Tensor,
    predictions_N: torch.Tensor,
    settings: S3Settings,
    epoch: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Labels to train on: the pixels', and after ``start_epoch`` epochs a random mixture with the predictions.

    The paper gives neither the probability nor the granularity of the switch, so both are settings. With probability 1
    every label is the point's own prediction ("ST" in Table 3), as a draw is always below 1.

    Args:
        pixel_labels_N: (N,) int64.
        predictions_N: (N,) int64, the points' own current classes.
        settings: start epoch, probability of the prediction, ``point`` or ``batch``.
        epoch: epochs finished so far.
        generator: a CPU generator, see :func:`switch_generator`.
    """
    if epoch < settings.start_epoch or settings.probability == 0:
        return pixel_labels_N
    size = 1 if settings.granularity == "batch" else pixel_labels_N.shape[0]
    device = pixel_labels_N.device
    # A copy from memory that is not pinned may wait for the GPU.
    draw = torch.rand(size, generator=generator, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return torch.where(draw < settings.probability, predictions_N, pixel_labels_N)
