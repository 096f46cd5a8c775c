"""The shipped CLIP is an open_clip model of at most 8 MB that knows the classes; its training runs from crops and captions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional

import clip2scene.streetworld
from clip2scene.config import StreetworldClipSettings, load_job
from clip2scene.data.vocabulary import vocabulary
from clip2scene.streetworld.captions import CROP_PX, FAIR_SHARE, SKY, crops_of_scene
from clip2scene.streetworld.clip_training import Tokens, contrastive_loss, normalise, train
from clip2scene.teacher.prompts import TEMPLATES

SHIPPED = Path(clip2scene.streetworld.__file__).parent / "clip"
JOBS = Path(__file__).resolve().parents[2] / "jobs"


def test_the_shipped_model_is_small_and_says_what_it_sees() -> None:
    """Zero-shot on crops of a world that it was not trained on, by open_clip's own loading and tokenizer."""
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8e6
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{SHIPPED}")
    model.eval()
    words = vocabulary("nuscenes")
    crops = [crop for number in range(2) for crop in crops_of_scene(90, number, words, 8, 400, 224, Counter())]
    named = [crop for crop in crops if len(crop.content) == 1 and SKY not in crop.content]
    truth = torch.tensor([words.classes.index(next(iter(crop.content))) for crop in named])
    with torch.inference_mode():
        texts_CD = torch.stack(
            [
                functional.normalize(model.encode_text(tokenize([f"a photo of a {name}." for name in names])).mean(0), dim=0)
                for names in words.prompts
            ]
        )
        images_BD = model.encode_image(normalise(np.stack([crop.image for crop in named])), normalize=True)
    assert len(named) > 15
    assert float(((images_BD @ texts_CD.T).argmax(1) == truth).float().mean()) > 0.5  # chance is 1 in 16


def test_captions_name_what_covers_the_crop() -> None:
    words = vocabulary("nuscenes")
    counted: Counter[str] = Counter()
    crops = crops_of_scene(91, 0, words, 6, 400, 224, counted)
    assert 20 < len(crops) <= 36
    assert sum(counted.values()) == len(crops)
    names = {name for prompts in words.prompts for name in prompts} | {SKY}
    for crop in crops:
        assert crop.image.shape == (CROP_PX, CROP_PX, 3)
        nouns = crop.phrase.split(" and a ")
        assert set(nouns) <= names
        assert len(nouns) == len(crop.content) <= 1 / FAIR_SHARE


def test_tokens_are_those_of_open_clip() -> None:
    sentences = [template.format("traffic cone and a construction vehicle and a rail track") for template in TEMPLATES]
    assert torch.equal(Tokens()(sentences), open_clip.SimpleTokenizer(context_length=32)(sentences))


def test_equal_captions_do_not_repel() -> None:
    images = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    contents = torch.tensor([4, 4, 7])
    good = contrastive_loss(images, images, contents, torch.tensor(50.0))
    bad = contrastive_loss(images, images.flip(0), contents, torch.tensor(50.0))
    assert float(good) == pytest.approx(2 * np.log(2) / 3, abs=1e-4)  # two positives share the probability
    assert float(bad) > 10


def test_training_writes_a_loadable_model_and_repeats_itself(tmp_path: Path) -> None:
    settings = StreetworldClipSettings(world_seeds=(1001,), scenes_per_world=1, crops_per_image=6, steps=3, batch_size=12)
    steps: list[int] = []
    results = [train(settings, 5, tmp_path / name, lambda n, **fields: steps.append(n)) for name in ("a", "b")]
    assert results[0] == results[1]
    assert sum(steps) == 2 * 4
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'a'}")
    with torch.inference_mode():
        assert model.encode_image(torch.zeros(1, 3, CROP_PX, CROP_PX)).shape == (1, 64)


def test_the_job_rebuilds_it_from_worlds_that_no_demo_uses() -> None:
    job = load_job(JOBS / "streetworld_clip.yaml")
    assert job.stage == "streetworld_clip"
    assert min(job.streetworld_clip.world_seeds) >= 100
