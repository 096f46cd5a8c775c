"""The shipped CLIP is an open_clip model of at most 8 MB that knows the classes; captions and training are sound."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional

import clip2scene.streetworld
from clip2scene.config import TeacherSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.streetworld import clip_training
from clip2scene.streetworld.captions import CROPS_PER_TILE, MAX_THINGS, PATCH_PX, SKY, TILE_PX, tiles_of_scene
from clip2scene.streetworld.clip_training import (
    CROP_PX,
    ClipSettings,
    Tokens,
    contrastive_loss,
    cut,
    in_context,
    normalise,
    train,
)
from clip2scene.teacher.clip import load_teacher
from clip2scene.teacher.prompts import TEMPLATES

SHIPPED = Path(clip2scene.streetworld.__file__).parent / "clip"


def test_the_shipped_model_is_small_and_says_what_it_sees() -> None:
    """Zero-shot on crops of a world that it was not trained on, by open_clip's own loading and tokenizer."""
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 8e6
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{SHIPPED}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{SHIPPED}")
    model.eval()
    words = vocabulary("nuscenes")
    tiles = [tile for number in range(2) for tile in tiles_of_scene(90, number, words, 2, Counter())]
    named = [(i, crop) for i, tile in enumerate(tiles) for crop in tile.crops if len(crop.content) == 1]
    named = [(i, crop) for i, crop in named if SKY not in crop.content]
    truth = torch.tensor([words.classes.index(next(iter(crop.content))) for _, crop in named])
    pixels = normalise(np.stack([tile.image for tile in tiles]))
    with torch.inference_mode():
        texts_CD = torch.stack(
            [
                functional.normalize(
                    model.encode_text(tokenize([f"a photo of a {name}." for name in names])).mean(0), dim=0
                )
                for names in words.prompts
            ]
        )
        windows = [(i, crop.row, crop.column, crop.side) for i, crop in named]
        images_BD = model.encode_image(cut(pixels, windows), normalize=True)
    assert len(named) > 30
    assert float(((images_BD @ texts_CD.T).argmax(1) == truth).float().mean()) > 0.5  # chance is 1 in 16


def test_captions_name_what_covers_the_crop() -> None:
    words = vocabulary("nuscenes")
    counted: Counter[str] = Counter()
    tiles = tiles_of_scene(91, 0, words, 1, counted)
    assert len(tiles) == 6
    assert sum(counted.values()) == 6 * (1 + CROPS_PER_TILE)  # one target for every tile and every crop
    names = {name for prompts in words.prompts for name in prompts} | {SKY}
    for tile in tiles:
        assert tile.image.shape == (TILE_PX, TILE_PX, 3)
        for crop in tile.crops:
            assert tile.pixels(crop).shape == (crop.side * PATCH_PX, crop.side * PATCH_PX, 3)
            nouns = crop.phrase.split(" and a ")
            assert set(nouns) <= names
            assert len(nouns) == len(crop.content) <= MAX_THINGS


def test_patches_in_context_are_those_that_the_teacher_reads() -> None:
    """The training's value path against the extraction's own."""
    teacher = load_teacher(TeacherSettings(model="streetworld", image_height_px=48, image_width_px=80))
    pixels = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    dense_BhwD = teacher(pixels)
    with torch.inference_mode():
        found_BD = in_context(teacher.clip, pixels, [(0, 0, 0, 1), (1, 1, 2, 2)])
    wanted_BD = torch.stack([dense_BhwD[0, 0, 0], dense_BhwD[1, 1:3, 2:4].mean(dim=(0, 1))])
    torch.testing.assert_close(found_BD, wanted_BD, atol=1e-4, rtol=1e-4)


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
    settings = ClipSettings(seed=5, world_seeds=(1001,), scenes_per_world=1, tiles_per_image=1, steps=3, batch_size=16)
    steps: list[int] = []
    for name in ("a", "b"):
        train(settings, tmp_path / name, lambda n, **fields: steps.append(n))
    assert sum(steps) == 2 * 4
    weights = [(tmp_path / name / "open_clip_model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'a'}")
    with torch.inference_mode():
        assert model.encode_image(torch.zeros(1, 3, CROP_PX, CROP_PX)).shape == (1, 64)


def test_the_defaults_rebuild_it_from_worlds_that_no_demo_uses() -> None:
    settings = ClipSettings()
    assert settings.seed == 0
    assert min(settings.world_seeds) >= 100


def test_the_command_prints_the_new_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    defaults = {"world_seeds": (1001,), "scenes_per_world": 1, "tiles_per_image": 1, "steps": 2, "batch_size": 8}
    monkeypatch.setattr(clip_training, "parse", lambda model, values, source: model(**defaults | values))
    assert clip_training.main(["--output", str(tmp_path / "made"), "--seed", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'made'}\n"
    assert "3/3 steps" in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(
    ("output", "seed", "sentence"),
    [
        ("there", "0", "clip_training: {folder}/there: exists; give a new folder, or remove this one"),
        ("file/below", "0", "clip_training: {folder}/file/below: cannot be written (File exists)"),
        ("new", "-1", "clip_training: command line: seed=-1: input should be greater than or equal to 0"),
    ],
)
def test_the_command_refuses_before_it_trains(output, seed, sentence, tmp_path: Path, capsys) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    assert clip_training.main(["--output", str(tmp_path / output), "--seed", seed]) == 1
    assert sentence.format(folder=tmp_path) in capsys.readouterr().err.splitlines()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(n: int = 1, **fields: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(ClipSettings(scenes_per_world=1), tmp_path / "made", interrupt)
    assert not list(tmp_path.iterdir())
