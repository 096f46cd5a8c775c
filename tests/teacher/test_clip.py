from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

from clip2scene.config import TeacherSettings
from clip2scene.errors import ConfigError
from clip2scene.teacher.clip import DenseClip, load_teacher
from clip2scene.teacher.weights import load_model

TinyClip = Callable[..., Path]


def tiny(folder: Path, **changes: Any) -> TeacherSettings:
    values = {"model": f"local-dir:{folder}", "image_height_px": 64, "image_width_px": 96, **changes}
    return TeacherSettings(**values)


def pixels(teacher: DenseClip, count: int = 2) -> torch.Tensor:
    images = np.random.default_rng(0).integers(0, 256, (count, 50, 70, 3), dtype=np.uint8)
    return torch.stack([teacher.preprocess(image) for image in images])


@pytest.mark.parametrize("kind", ["token", "average"])
def test_value_path_is_the_last_block_under_a_diagonal_mask(kind: str, tiny_clip: TinyClip) -> None:
    teacher = load_teacher(tiny(tiny_clip(kind), keep_last_residual=True, keep_last_mlp=True))
    value_path = load_teacher(tiny(tiny_clip(kind)))
    images = pixels(teacher)
    visual: Any = teacher.clip.visual
    with torch.inference_mode():
        read = visual.forward_intermediates(images, indices=[1], output_fmt="NLC", output_extra_tokens=True)
        tokens = torch.cat([read["image_intermediates_prefix"][0], read["image_intermediates"][0]], dim=1)
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).fill_diagonal_(0)
        block = visual.transformer.resblocks[-1]
        whole = visual.ln_post(block(tokens, attn_mask=mask)[:, 1:]) @ visual.proj
        attended = block.ls_1(block.attention(block.ln_1(tokens), attn_mask=mask))[:, 1:]
        bare = visual.ln_post(attended) @ visual.proj
    assert teacher.grid == (4, 6)
    torch.testing.assert_close(teacher(images), whole.reshape(2, 4, 6, 24), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(value_path(images), bare.reshape(2, 4, 6, 24), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(whole, bare, atol=1e-2)


def test_the_only_patch_of_a_pooled_model_is_open_clips_own_embedding(tiny_clip: TinyClip) -> None:
    settings = tiny(
        tiny_clip("average"), image_height_px=16, image_width_px=16, keep_last_residual=True, keep_last_mlp=True
    )
    teacher = load_teacher(settings)
    visual: Any = teacher.clip.visual
    # With the class token equal to the only patch, any attention over the two gives the patch's own value.
    visual.class_embedding.data = visual.conv1(torch.zeros(1, 3, 16, 16)).flatten().detach()
    visual.positional_embedding.data[0] = visual.positional_embedding.data[1]
    images = torch.zeros(1, 3, 16, 16)
    with torch.inference_mode():
        expected = visual(images)
    torch.testing.assert_close(teacher(images).reshape(1, 24), expected, atol=2e-6, rtol=1e-5)


def test_resnet_is_two_pointwise_convolutions_on_the_last_map(tiny_clip: TinyClip) -> None:
    teacher = load_teacher(tiny(tiny_clip("resnet"), image_height_px=64, image_width_px=160))
    images = pixels(teacher)
    visual: Any = teacher.clip.visual
    with torch.inference_mode():
        last = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        value, out = visual.attnpool.v_proj, visual.attnpool.c_proj
        values = functional.conv2d(last, value.weight[:, :, None, None], value.bias)
        expected = functional.conv2d(values, out.weight[:, :, None, None], out.bias)
    assert teacher.grid == (2, 5)
    torch.testing.assert_close(teacher(images), expected.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


def test_positions_are_interpolated_as_open_clip_does(tiny_clip: TinyClip) -> None:
    folder = tiny_clip("token")
    expected: Any = open_clip.create_model(f"local-dir:{folder}", force_image_size=(64, 96))
    visual: Any = load_teacher(tiny(folder)).clip.visual
    torch.testing.assert_close(visual.positional_embedding.data, expected.visual.positional_embedding.data)


def test_positions_are_interpolated_where_only_the_shape_differs(tiny_clip: TinyClip) -> None:
    folder = tiny_clip("token")
    visual: Any = load_teacher(tiny(folder, image_height_px=32, image_width_px=128)).clip.visual
    square = load_file(folder / "open_clip_model.safetensors")["visual.positional_embedding"]
    assert visual.positional_embedding.shape == square.shape
    # 2 x 8 from 4 x 4: the height is halved, so rows are mixed.
    assert not torch.allclose(visual.positional_embedding[1:], square[1:], atol=1e-2)


def test_vit_b_16_of_the_paper() -> None:
    settings = TeacherSettings(pretrained="random")
    teacher = load_teacher(settings)
    features = teacher(torch.zeros(1, 3, 224, 416))
    assert (teacher.grid, teacher.dim) == ((14, 26), 512)
    assert features.shape == (1, 14, 26, 512)
    assert features.dtype == torch.float32
    assert features.isfinite().all()


def test_preprocessing_is_the_models_own_on_the_whole_frame(tiny_clip: TinyClip) -> None:
    teacher = load_teacher(tiny(tiny_clip("token")))
    image = np.random.default_rng(1).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    cfg = open_clip.transform.PreprocessCfg(
        size=(64, 96), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), resize_mode="squash"
    )
    expected = open_clip.transform.image_transform_v2(cfg, is_train=False)(Image.fromarray(image))
    torch.testing.assert_close(teacher.preprocess(image), expected)
    raw = load_teacher(tiny(tiny_clip("token"), clip_normalisation=False)).preprocess(image)
    mean, std = torch.tensor(cfg.mean)[:, None, None], torch.tensor(cfg.std)[:, None, None]
    torch.testing.assert_close(raw, expected * std + mean)


def test_is_frozen(tiny_clip: TinyClip) -> None:
    teacher = load_teacher(tiny(tiny_clip("token")))
    with pytest.raises(RuntimeError, match="the teacher is frozen"):
        teacher.train()
    teacher.eval()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_bf16_is_close_and_comes_back_as_float32(tiny_clip: TinyClip) -> None:
    exact, rough = load_teacher(tiny(tiny_clip("token"))), load_teacher(tiny(tiny_clip("token"), precision="bf16"))
    images = pixels(exact)
    assert rough(images).dtype == torch.float32
    assert functional.cosine_similarity(exact(images), rough(images), dim=-1).min() > 0.99


def test_digest_covers_weights_and_reading_and_nothing_else(tiny_clip: TinyClip, tmp_path: Path) -> None:
    folder = tiny_clip("token")
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    same = load_teacher(tiny(folder)).digest
    assert load_teacher(tiny(copied, seed=5)).digest == same
    changes: list[dict[str, Any]] = [
        {"keep_last_residual": True},
        {"keep_last_mlp": True},
        {"clip_normalisation": False},
        {"image_width_px": 64},
        {"precision": "bf16"},
    ]
    others = {load_teacher(tiny(folder, **change)).digest for change in changes}
    others.add(load_teacher(tiny(tiny_clip("token", seed=1))).digest)
    assert len(others | {same}) == len(changes) + 2


def test_the_text_tower_has_a_digest_of_its_own(tiny_clip: TinyClip, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip("token"), tmp_path / "other")
    file = folder / "open_clip_model.safetensors"
    weights = load_file(file)
    weights["token_embedding.weight"][0, 0] += 1
    save_file(weights, file)
    first, other = load_teacher(tiny(tiny_clip("token"))), load_teacher(tiny(folder))
    assert first.digest == other.digest
    assert first.text_digest != other.text_digest
    assert first.text_digest == load_teacher(tiny(tiny_clip("token"), clip_normalisation=False)).text_digest


def test_the_text_digest_covers_how_the_weights_are_read(tiny_clip: TinyClip, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip("token"), tmp_path / "other")
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    before = load_teacher(tiny(folder)).text_digest
    assert before == load_teacher(tiny(tiny_clip("token"))).text_digest  # wherever the folder lies
    config["model_cfg"]["text_cfg"]["heads"] *= 2
    file.write_text(json.dumps(config))
    assert load_teacher(tiny(folder)).text_digest != before


@pytest.mark.parametrize(("tag", "expected"), [({}, True), ({"quick_gelu": False}, False)])
def test_a_tag_that_does_not_tell_the_activation_has_the_models(
    tiny_clip: TinyClip, monkeypatch: pytest.MonkeyPatch, tag: dict[str, bool], expected: bool
) -> None:
    folder = tiny_clip("token")
    towers = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    assert towers["quick_gelu"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", towers)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, pretrained: {"url": "", **tag})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda about: folder / "open_clip_model.safetensors")
    loaded = load_model(TeacherSettings(model="tiny", pretrained="published"))
    assert loaded.architecture["quick_gelu"] is loaded.text_architecture["quick_gelu"] is expected


def test_random_weights_follow_the_seed_and_leave_the_callers_generator() -> None:
    settings = TeacherSettings(model="RN50", pretrained="random", image_height_px=32, image_width_px=32)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = load_teacher(settings).digest
    assert torch.equal(torch.rand(1), expected)
    assert load_teacher(settings).digest == first
    assert load_teacher(settings.model_copy(update={"seed": 1})).digest != first


def test_checkpoint_beside_its_configuration_takes_its_preprocessing(tiny_clip: TinyClip, tmp_path: Path) -> None:
    folder = tiny_clip("token")
    # The architecture by name, the weights by path: what a user with a downloaded checkpoint types.
    configs = tmp_path / "configs"
    configs.mkdir()
    towers = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (configs / "tiny-clip2scene-test.json").write_text(json.dumps(towers))
    open_clip.add_model_config(configs)
    weights = load_file(folder / "open_clip_model.safetensors")
    lone, torch_file = tmp_path / "lone.safetensors", tmp_path / "lone.pt"
    save_file(weights, lone)
    torch.save({"state_dict": weights}, torch_file)
    image = np.zeros((64, 96, 3), dtype=np.uint8)

    def load(path: Path) -> DenseClip:
        return load_teacher(tiny(folder, model="tiny-clip2scene-test", pretrained=str(path)))

    assert load(folder / "open_clip_model.safetensors").digest == load_teacher(tiny(folder)).digest
    clip_mean, clip_std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = -torch.tensor(clip_mean) / torch.tensor(clip_std)
    torch.testing.assert_close(load(lone).preprocess(image)[:, 0, 0], expected)
    assert load(lone).digest == load(torch_file).digest


@pytest.mark.parametrize("given", [".", "~"])
def test_a_teacher_is_loaded_again_from_another_folder(
    given: str, tiny_clip: TinyClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_clip("token")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    teacher = load_teacher(tiny(Path(given), pretrained=f"{given}/unused.safetensors"))
    assert teacher.settings.model == f"local-dir:{folder}"
    assert teacher.settings.pretrained == f"{folder}/unused.safetensors"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_teacher(teacher.settings).digest == teacher.digest


class _NotATensor:
    pass


def test_mistakes_are_one_sentence(tiny_clip: TinyClip, tmp_path: Path) -> None:
    folder = tiny_clip("token")
    wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
    shutil.copy(tiny_clip("resnet") / "open_clip_model.safetensors", wrong)
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "open_clip_model.safetensors").write_bytes(b"no safetensors")
    empty = Path(shutil.copytree(folder, tmp_path / "empty"))
    (empty / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": {"visual.proj": _NotATensor()}}, tmp_path / "pickle.pt")
    cases: list[tuple[TeacherSettings, str]] = [
        (tiny(folder, image_width_px=100), "teacher.image_width_px=100 must be a multiple of 16"),
        (tiny(tiny_clip("resnet"), image_height_px=48), "teacher.image_height_px=48 must be a multiple of 32"),
        (TeacherSettings(model="ViT-B16"), "no such open_clip model; close to it: ViT-B-16"),
        (TeacherSettings(pretrained="openia"), "unknown for ViT-B-16; allowed: openai"),
        (TeacherSettings(pretrained=str(tmp_path / "none.pt")), "this file does not exist"),
        (TeacherSettings(model="coca_ViT-B-32", pretrained="random"), "no value path to read densely"),
        (tiny(tmp_path / "nowhere"), "cannot read .*open_clip_config.json"),
        (tiny(wrong), "not a checkpoint of the architecture"),
        (tiny(damaged), "not a readable checkpoint"),
        (tiny(empty), "no weights in"),
        (TeacherSettings(pretrained=str(tmp_path / "pickle.pt")), "not a readable checkpoint"),
    ]
    for settings, sentence in cases:
        with pytest.raises(ConfigError, match=sentence) as raised:
            load_teacher(settings)
        assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"cannot be downloaded .*; without a network give a local checkpoint"
    ) as raised:
        load_teacher(TeacherSettings())
    assert "\n" not in str(raised.value)
