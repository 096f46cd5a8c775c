"""Tiny CLIP models with random weights, in the folder layout that ``local-dir:`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 16, "layers": 3}
VISION: dict[str, dict[str, Any]] = {
    "token": VIT,
    "average": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.5},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64},
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a tiny CLIP: ``tiny_clip("token" | "average" | "resnet", seed=0)``."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            folder = tmp_path_factory.mktemp(f"clip-{kind}-{seed}")
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
            made[kind, seed] = folder
        return made[kind, seed]

    return make
