from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clip2scene.config import TeacherSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import ConfigError
from clip2scene.teacher.clip import load_teacher
from clip2scene.teacher.prompts import TEMPLATES, sentences, text_embeddings

TinyClip = Callable[..., Path]


def test_templates() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 85
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert sentences(("bus",), "clip85")[0] == open_clip.OPENAI_IMAGENET_TEMPLATES[0]("bus")
    assert "There is a traffic cone in the scene." in sentences(("traffic cone",), "clip85")
    assert sentences(("pedestrian", "person"), "plain") == ["pedestrian", "person"]
    with pytest.raises(ConfigError, match="allowed: clip85, plain"):
        sentences(("bus",), "clip80")  # type: ignore[arg-type]


@pytest.mark.parametrize("templates", ["clip85", "plain"])
def test_embeddings_equal_a_plain_loop(templates: Any, tiny_clip: TinyClip) -> None:
    folder = tiny_clip("average")
    teacher = load_teacher(TeacherSettings(model=f"local-dir:{folder}", image_height_px=64, image_width_px=64))
    words = vocabulary("nuscenes")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    filled = TEMPLATES if templates == "clip85" else ("{}",)
    for label in (3, 6):  # one name, and two
        total = torch.zeros(24)
        for name in words.prompts[label]:
            for template in filled:
                with torch.no_grad():
                    embedding = model.encode_text(tokenize([template.replace("{}", name)]))[0]
                total += embedding / embedding.norm()
        expected = total / total.norm()
        actual = text_embeddings(teacher, words, templates)
        torch.testing.assert_close(actual[label], expected, atol=1e-5, rtol=1e-4)
    assert actual.shape == (16, 24)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.norm(dim=1), torch.ones(16))
    assert torch.cdist(actual, actual).fill_diagonal_(1).min() > 1e-4
    # Fit for losses: an ordinary tensor, not one of inference mode.
    assert not actual.is_inference()
