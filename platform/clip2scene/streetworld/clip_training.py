"""Train the small CLIP that ships with streetworld: an open_clip model and the CLIP objective (Radford et al., 2021).

Symmetric InfoNCE between crops and captions; captions of equal content are all positives of each other, so that twenty
"a photo of a car" in one batch do not repel each other. A crop is embedded in two ways, and both are drawn to its
caption: by itself, as in CLIP, and as the average of its patches in the surrounding tile, read as MaskCLIP reads them
(the last block's value path), which is how the model will be used on whole images.

``python -m clip2scene.streetworld.clip_training --output FOLDER`` rebuilds the shipped model.

Legend: B crops of a batch, T tiles, H x W pixels, D size of the joint embedding.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from clip2scene.config import Settings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import Clip2sceneError, ConfigError, one_line
from clip2scene.jobfile import parse
from clip2scene.paths import from_home
from clip2scene.progress import Advance, progress, uncounted
from clip2scene.storage import write_json, writing
from clip2scene.streetworld.captions import CROPS_PER_TILE, PATCH_PX, TILE_PX, Tile, tiles_of_scene
from clip2scene.teacher.clip import value_path
from clip2scene.teacher.prompts import TEMPLATES

CROP_PX = 48
"""Side of a crop as the model's input."""
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
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05


class ClipSettings(Settings):
    """Training of the small CLIP, from crops and captions only."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of initial weights and of all draws."""
    world_seeds: tuple[int, ...] = Field((1001, 1002, 1003, 1004), min_length=1)
    """Worlds that crops are cut from; no world that scores are computed on should be among them."""
    scenes_per_world: int = Field(28, ge=1)
    """Scenes per world, with six images each."""
    tiles_per_image: int = Field(3, ge=1)
    """Tiles per image, with eight crops each."""
    steps: int = Field(3000, ge=1)
    """Training steps."""
    batch_size: int = Field(128, ge=8)
    """Crops per step."""
    learning_rate: float = Field(1.2e-3, gt=0)
    """Peak learning rate of AdamW: it rises for 100 steps, then falls to 0 along half a cosine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the model into a new folder; a user's mistake is one sentence on stderr and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m clip2scene.streetworld.clip_training",
        description="Train the small CLIP that ships with streetworld again, from crops and captions only.",
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="new folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and draws; the shipped model has 0 (default)")
    options = parser.parse_args(arguments)
    try:
        settings, output = parse(ClipSettings, {"seed": options.seed}, "command line"), from_home(options.output)
        total = len(settings.world_seeds) * settings.scenes_per_world + settings.steps
        with progress("streetworld clip", total) as advance:
            train(settings, output, advance)
    except (Clip2sceneError, OSError) as error:
        print(f"clip_training: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clip_training: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(output.resolve())
    return 0


def train(settings: ClipSettings, output: Path, advance: Advance = uncounted) -> None:
    """Render crops, train, and write the model to the new folder ``output`` in half precision.

    The files are ``open_clip_config.json`` and ``open_clip_model.safetensors``; the folder appears complete or not at
    all. ``advance`` is called with 1 after each rendered scene and each step, with the loss as a field.

    Raises:
        ConfigError: the folder exists.
        StorageError: it cannot be written.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists; give a new folder, or remove this one")
    with writing(output) as aside:
        aside.mkdir()  # a folder that cannot be written is refused before minutes of training
        tiles: list[Tile] = []
        cut_before: Counter[str] = Counter()
        words = vocabulary("nuscenes")
        for world in settings.world_seeds:
            for number in range(settings.scenes_per_world):
                tiles += tiles_of_scene(world, number, words, settings.tiles_per_image, cut_before)
                advance(1)
        _save(fit(tiles, settings, advance), aside)


def fit(tiles: list[Tile], settings: ClipSettings, advance: Advance = uncounted) -> open_clip.CLIP:
    """A model trained on crops of the tiles."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng([settings.seed, 4])
    model = open_clip.CLIP(**MODEL_CFG)
    # No positions: a crop does not tell where it was cut, and the dense grid is not the crop's.
    model.visual.positional_embedding.requires_grad_(False).zero_()
    tokens = Tokens()
    contents = {content: i for i, content in enumerate(dict.fromkeys(c.content for tile in tiles for c in tile.crops))}
    images = np.stack([tile.image for tile in tiles])
    tiles_per_batch = min(max(settings.batch_size // CROPS_PER_TILE, 1), len(tiles))
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY, fused=True
    )
    for step in range(settings.steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate
        batch = rng.choice(len(tiles), tiles_per_batch, replace=False)
        crops = [(i, crop) for i, number in enumerate(batch) for crop in tiles[number].crops]
        sentences = [str(TEMPLATES[int(rng.integers(len(TEMPLATES)))]).format(crop.phrase) for _, crop in crops]
        mirrored = rng.random(len(batch)) < 0.5
        pixels = _augment(rng, images[batch], mirrored)
        # Only every second crop also by itself, which halves the work.
        alone = slice(int(rng.integers(2)), None, 2)
        last = TILE_PX // PATCH_PX
        columns = [last - crop.side - crop.column if mirrored[i] else crop.column for i, crop in crops]
        windows = [(i, crop.row, column, crop.side) for (i, crop), column in zip(crops, columns, strict=True)]
        inside_BD = functional.normalize(in_context(model, pixels, windows), dim=-1)
        alone_BD = model.encode_image(cut(pixels, windows[alone]), normalize=True)
        texts_BD = model.encode_text(tokens(sentences), normalize=True)
        same_B = torch.tensor([contents[crop.content] for _, crop in crops])
        scale = model.logit_scale.exp()
        loss = contrastive_loss(inside_BD, texts_BD, same_B, scale)
        loss = loss + contrastive_loss(alone_BD, texts_BD[alone], same_B[alone], scale)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        advance(1, loss=f"{float(loss.detach()):.3f}")
    return model.eval()


def in_context(model: open_clip.CLIP, tiles: Tensor, windows: list[tuple[int, int, int, int]]) -> Tensor:
    """Embeddings (B, D) of crops, as averages over their patches in tiles (T, 3, H, W); no positions are added.

    ``windows`` are (tile, row, column, side) in patches.
    """
    visual: Any = model.visual
    patches_TWhw = visual.conv1(tiles)
    rows, columns = patches_TWhw.shape[2:]
    x_TLW = patches_TWhw.flatten(2).transpose(1, 2)
    x_TLW = visual.ln_pre(torch.cat([visual.class_embedding.expand(len(x_TLW), 1, -1), x_TLW], dim=1))
    for block in visual.transformer.resblocks[:-1]:
        x_TLW = block(x_TLW)
    last = visual.transformer.resblocks[-1]
    values_TLW = value_path(last.attn, last.ln_1(x_TLW[:, 1:]))
    dense_ThwD = (visual.ln_post(values_TLW) @ visual.proj).unflatten(1, (rows, columns))
    return torch.stack([dense_ThwD[i, r : r + side, c : c + side].mean(dim=(0, 1)) for i, r, c, side in windows])


def cut(tiles: Tensor, windows: list[tuple[int, int, int, int]]) -> Tensor:
    """The crops themselves, resized to the model's input: (B, 3, CROP_PX, CROP_PX)."""
    pieces = []
    for i, row, column, side in windows:
        top, left, size = PATCH_PX * row, PATCH_PX * column, PATCH_PX * side
        piece = tiles[i : i + 1, :, top : top + size, left : left + size]
        if size != CROP_PX:
            piece = functional.interpolate(piece, (CROP_PX, CROP_PX), mode="bilinear", antialias=size > CROP_PX)
        pieces.append(piece)
    return torch.cat(pieces)


class Tokens:
    """open_clip's tokenizer with a cache of words: it is slow, splits at blanks anyway, and captions repeat words."""

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
    """Symmetric InfoNCE of unit vectors (B, D), in which all pairs of equal content are positives; a scalar."""
    logits_BB = scale * images_BD @ texts_BD.T
    targets_BB = (contents_B[:, None] == contents_B[None]).float()
    targets_BB = targets_BB / targets_BB.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits_BB, targets_BB) + functional.cross_entropy(logits_BB.T, targets_BB)) / 2


def normalise(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to the model's input (B, 3, H, W) float32."""
    mean, std = (torch.tensor(PREPROCESS_CFG[key], dtype=torch.float32).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _augment(rng: np.random.Generator, images: np.ndarray, mirrored: np.ndarray) -> Tensor:
    """Mirror the images of that mask, and change brightness, contrast and colour slightly."""
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    gain = rng.uniform(0.85, 1.15, (len(images), 1, 1, 1)) * rng.uniform(0.95, 1.05, (len(images), 1, 1, 3))
    shift = rng.uniform(-15, 15, (len(images), 1, 1, 1))
    return normalise((images * gain.astype(np.float32) + shift.astype(np.float32)).clip(0, 255).astype(np.uint8))


def _save(model: open_clip.CLIP, folder: Path) -> None:
    """Write the two files of open_clip's ``local-dir:`` format."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    write_json(folder / "open_clip_config.json", {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG})


if __name__ == "__main__":
    raise SystemExit(main())
