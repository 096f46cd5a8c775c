"""Text embeddings of classes: the label space t_c of the paper (85 templates averaged per class).

Shapes: C classes, S sentences of one class, D = size of CLIP's joint embedding.
"""

from __future__ import annotations

from typing import Literal

import open_clip
import torch
from torch import Tensor
from torch.nn import functional

from clip2scene.config import PromptTemplates
from clip2scene.data.vocabulary import Vocabulary
from clip2scene.errors import ConfigError
from clip2scene.teacher.clip import DenseClip

_SCENE_TEMPLATES = (
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)
TEMPLATES: tuple[str, ...] = (*(str(fill("{}")) for fill in open_clip.OPENAI_IMAGENET_TEMPLATES), *_SCENE_TEMPLATES)
"""OpenAI's 80 ImageNet templates and five about a scene (as in MaskCLIP): 85; ``{}`` is the class's name."""
_SETS: dict[str, tuple[str, ...]] = {
    "clip85": TEMPLATES,
    "plain": ("{}",),
    "depth_map": ("point cloud depth map of a {}.",),
}
Templates = Literal[PromptTemplates, "depth_map"]
"""``depth_map`` is PointCLIP's sentence (Zhang et al., CVPR 2022)."""


def sentences(names: tuple[str, ...], templates: Templates) -> list[str]:
    """Every template filled with every name of one class.

    Raises:
        ConfigError: no set of templates of that name.
    """
    if templates not in _SETS:
        raise ConfigError(f"prompts.templates={templates!r}: unknown; allowed: {', '.join(_SETS)}")
    return [template.format(name) for name in names for template in _SETS[templates]]


def text_embeddings(teacher: DenseClip, vocabulary: Vocabulary, templates: Templates) -> Tensor:
    """Text embedding t_c of every class: the mean over its templates and names of L2-normalised embeddings, normalised.

    Returns:
        (C, D) float32 of unit length, on the CPU.

    Raises:
        ConfigError: an unknown set of templates, or a tokenizer that cannot be loaded.
    """
    rows = []
    for names in vocabulary.prompts:
        embeddings_SD = functional.normalize(teacher.encode_text(sentences(names, templates)), dim=-1)
        rows.append(functional.normalize(embeddings_SD.mean(dim=0), dim=-1))
    # Cloned: a tensor made under inference mode could never be saved for a backward pass.
    return torch.stack(rows).cpu().clone()
