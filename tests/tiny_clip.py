"""Tiny CLIP models with random weights, in the folder layout that ``local-dir:`` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 3}
VISION: dict[str, dict[str, Any]] = {
    "token": VIT,
    "average": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.5},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def write_clip(folder: Path, kind: str, seed: int) -> None:
    """Write a model of ``kind`` ("token", "average" or "resnet") into a folder."""
    towers = {"embed_dim": 24, "vision_cfg": VISION[kind], "text_cfg": TEXT, "quick_gelu": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(24, VISION[kind], TEXT, quick_gelu=True)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which would hide a missing one
                parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": towers, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
