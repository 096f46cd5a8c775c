from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip2scene.config import ConfigError
from clip2scene.data.index import DataError, Frame, Index
from clip2scene.data.splits import split_frames, split_scenes


@pytest.mark.parametrize(
    ("name", "scenes"), [("train", 700), ("val", 150), ("test", 150), ("mini_train", 8), ("mini_val", 2)]
)
def test_official_splits_have_the_official_sizes(name: str, scenes: int) -> None:
    assert len(split_scenes(name)) == scenes


def test_parametrizing_and_verifying_divide_the_training_scenes() -> None:
    verifying, parametrizing = split_scenes("verifying"), split_scenes("parametrizing")
    assert (len(parametrizing), len(verifying)) == (600, 100)
    assert verifying | parametrizing == split_scenes("train")
    assert not verifying & parametrizing


def test_unknown_split_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"split 'training': unknown; allowed: train, val, .*verifying") as caught:
        split_scenes("training")
    assert "\n" not in str(caught.value)


def test_split_frames_keeps_order_and_refuses_an_empty_split() -> None:
    frames = tuple(
        Frame(f"{scene}/{k}", scene, k, "cloud", np.eye(4), (), (), None)
        for scene in ("scene-0003", "scene-0061")
        for k in range(2)
    )
    index = Index("nuscenes", Path("root"), "v1.0-mini", frames)
    assert split_frames(index, "mini_train") == frames[2:]
    assert split_frames(index, "val") == frames[:2]
    with pytest.raises(DataError, match=r"split 'test' has no keyframe in the index of root .*scene-0003, scene-0061"):
        split_frames(index, "test")


def test_importing_splits_and_clouds_does_not_import_the_devkit() -> None:
    code = (
        "import sys, clip2scene.data.splits, clip2scene.data.clouds, clip2scene.data.nuscenes\n"
        "import clip2scene.geometry.inspect\n"
        "sys.exit(any(name.split('.')[0] in {'nuscenes', 'torch', 'matplotlib'} for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
