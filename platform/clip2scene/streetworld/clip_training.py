"""Train the small CLIP that ships with streetworld: an open_clip model and the CLIP objective (Radford et al., 2021).

Symmetric InfoNCE between crops and captions; captions of equal content are all positives of each other, so that twenty
"a photo of a car" in one batch do not repel each other. B crops a batch, D = size of the joint embedding.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clip2scene.config import StreetworldClipSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.streetworld.captions import CROP_PX, Crop, crops_of_scene
from clip2scene.teacher.prompts import TEMPLATES

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": CROP_PX, "layers": 4, "width": 128, "head_width": 32, "patch_size": 16, "pool_type": "avg",
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 2},
}  # fmt: skip
"""open_clip's description of the model."""
PREPROCESS_CFG: dict[str, Any] = {
    "size": [CROP_PX, CROP_PX],
    "mode": "RGB",
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
IMAGE_SIZE_PX = (400, 224)
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05


def train(
    settings: StreetworldClipSettings, seed: int, output: Path, progress: Callable[..., None] | None = None
) -> dict[str, float]:
    """Render crops, train, and write the model to ``output`` in half precision.

    The files are ``open_clip_config.json`` and ``open_clip_model.safetensors``. ``progress`` is called with 1 after
    each rendered scene and each step, with the loss as a field.

    Returns:
        The last loss and the number of crops.
    """
    crops: list[Crop] = []
    seen_before: Counter[str] = Counter()
    words = vocabulary("nuscenes")
    for world in settings.world_seeds:
        for number in range(settings.scenes_per_world):
            crops += crops_of_scene(world, number, words, settings.crops_per_image, *IMAGE_SIZE_PX, seen_before)
            if progress is not None:
                progress(1)
    model, loss = fit(crops, settings, seed, progress)
    save(model, output)
    return {"loss": loss, "crops": float(len(crops))}


def fit(
    crops: list[Crop], settings: StreetworldClipSettings, seed: int, progress: Callable[..., None] | None = None
) -> tuple[open_clip.CLIP, float]:
    """A model trained on the crops, and its last loss."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 4])
    model = open_clip.CLIP(**MODEL_CFG)
    # No position: a crop says nothing about where it was cut, and the dense grid is another one than the crop's.
    model.visual.positional_embedding.data.zero_().requires_grad_(False)
    tokens = Tokens()
    images = np.stack([crop.image for crop in crops])
    numbers = {content: number for number, content in enumerate(dict.fromkeys(crop.content for crop in crops))}
    contents = torch.tensor([numbers[crop.content] for crop in crops])
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    value = math.nan
    for step in range(settings.steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        batch = rng.choice(len(crops), min(settings.batch_size, len(crops)), replace=False)
        sentences = [str(TEMPLATES[int(rng.integers(len(TEMPLATES)))]).format(crops[i].phrase) for i in batch]
        features_BD = model.encode_image(_augment(rng, images[batch]), normalize=True)
        text_BD = model.encode_text(tokens(sentences), normalize=True)
        loss = contrastive_loss(features_BD, text_BD, contents[batch], model.logit_scale.exp())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        value = float(loss.detach())
        if progress is not None:
            progress(1, loss=f"{value:.3f}")
    return model.eval(), value


class Tokens:
    """open_clip's tokenizer, which splits at blanks anyway, remembering words: it is slow, and captions repeat theirs."""

    def __init__(self) -> None:
        self._tokenizer = open_clip.SimpleTokenizer()
        self._known: dict[str, list[int]] = {}

    def __call__(self, sentences: list[str]) -> Tensor:
        """Token ids (B, context length) of sentences, as the model's own tokenizer gives them."""
        rows = torch.zeros(len(sentences), MODEL_CFG["text_cfg"]["context_length"], dtype=torch.long)
        for row, sentence in zip(rows, sentences, strict=True):
            ids = [self._tokenizer.sot_token_id, *(i for word in sentence.split() for i in self._word(word))]
            ids = [*ids[: len(row) - 1], self._tokenizer.eot_token_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = self._tokenizer.encode(word)
        return self._known[word]


def contrastive_loss(images_BD: Tensor, texts_BD: Tensor, contents_B: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit vectors (B, D), every pair of equal content a positive; a scalar."""
    logits_BB = scale * images_BD @ texts_BD.T
    targets_BB = (contents_B[:, None] == contents_B[None]).float()
    targets_BB = targets_BB / targets_BB.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits_BB, targets_BB) + functional.cross_entropy(logits_BB.T, targets_BB)) / 2


def normalise(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to the model's input (B, 3, H, W) float32."""
    mean, std = (torch.tensor(PREPROCESS_CFG[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _augment(rng: np.random.Generator, images: np.ndarray) -> Tensor:
    """Mirror images, and shift brightness, contrast and colour slightly."""
    flipped = np.where(rng.random((len(images), 1, 1, 1)) < 0.5, images[:, :, ::-1], images)
    gain = (rng.uniform(0.85, 1.15, (len(images), 1, 1, 1)) * rng.uniform(0.95, 1.05, (len(images), 1, 1, 3))).astype(
        np.float32
    )
    shift = rng.uniform(-15, 15, (len(images), 1, 1, 1)).astype(np.float32)
    return normalise((flipped * gain + shift).clip(0, 255).astype(np.uint8))


def save(model: open_clip.CLIP, output: Path) -> None:
    """Write the two files of open_clip's ``local-dir:`` format into ``output``, each aside and then renamed."""
    output.mkdir(parents=True, exist_ok=True)
    aside = output / f".{os.getpid()}"
    aside.mkdir()
    try:
        weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, str(aside / "open_clip_model.safetensors"))
        config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
        (aside / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for path in aside.iterdir():
            path.replace(output / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
