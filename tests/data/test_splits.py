from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Frame, Index
from clip2scene.data.splits import missing_of_split, nuscenes_scenes, scenes_of_split, split_frames
from clip2scene.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "scenes"), [("train", 700), ("val", 150), ("test", 150), ("mini_train", 8), ("mini_val", 2)]
)
def test_official_splits_have_the_official_sizes(name: str, scenes: int) -> None:
    assert len(nuscenes_scenes(name)) == scenes


def test_parametrizing_and_verifying_divide_the_training_scenes() -> None:
    verifying, parametrizing = nuscenes_scenes("verifying"), nuscenes_scenes("parametrizing")
    assert (len(parametrizing), len(verifying)) == (600, 100)
    assert verifying | parametrizing == nuscenes_scenes("train")
    assert not verifying & parametrizing


def test_unknown_split_says_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match=r"split 'training': unknown; allowed: train, val, .*verifying") as caught:
        nuscenes_scenes("training")
    assert "\n" not in str(caught.value)


def test_split_frames_keeps_order_and_refuses_an_empty_split() -> None:
    frames = tuple(
        Frame(f"{scene}/{k}", scene, k, "cloud", np.eye(4), (), (), None)
        for scene in ("scene-0003", "scene-0061")
        for k in range(2)
    )
    index = Index("nuscenes", DataRoot(Path("root")), "v1.0-mini", frames)
    assert split_frames(index, "mini_train") == frames[2:]
    assert split_frames(index, "val") == frames[:2]
    with pytest.raises(DataError, match=r"split 'test' has no keyframe in the index of root .*scene-0003, scene-0061"):
        split_frames(index, "test")


def _index(dataset: str, scenes: list[str], root: Path = Path("root")) -> Index:
    frames = tuple(Frame(f"{scene}_0", scene, 0, "cloud", np.eye(4), (), (), None) for scene in scenes)
    return Index(dataset, DataRoot(root), dataset, frames)


def test_sequences_of_semantickitti() -> None:
    index = _index("semantickitti", [f"{n:02}" for n in range(22)])
    split = {
        name: [frame.scene for frame in split_frames(index, name)]
        for name in ("train", "val", "test", "parametrizing", "verifying")
    }
    assert split["train"] == ["00", "01", "02", "03", "04", "05", "06", "07", "09", "10"]
    assert split["val"] == ["08"]
    assert split["test"] == [f"{n}" for n in range(11, 22)]
    assert split["verifying"] == ["06"]
    assert split["parametrizing"] == ["00", "01", "02", "03", "04", "05", "07", "09", "10"]
    with pytest.raises(ConfigError, match=r"'mini_val': unknown for semantickitti; allowed: train, val, test, param"):
        split_frames(index, "mini_val")


@pytest.mark.parametrize("folder", ["", "splits", "Tasks/Benchmark"])
def test_scenes_of_scannet_are_read_from_the_users_lists(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    train = [f"scene{n:04}_00" for n in range(20)]
    (tmp_path / folder / "scannetv2_train.txt").write_text("\n".join(reversed(train)) + "\n\n")
    (tmp_path / folder / "scannetv2_val.txt").write_text("scene0700_01\r\n")
    index = _index("scannet", ["scene0002_00", "scene0006_00", "scene0700_01"], tmp_path)
    assert scenes_of_split("scannet", tmp_path, "train") == frozenset(train)
    assert scenes_of_split("scannet", tmp_path, "verifying") == {"scene0006_00", "scene0013_00"}
    assert scenes_of_split("scannet", tmp_path, "parametrizing") == frozenset(train) - {"scene0006_00", "scene0013_00"}
    assert [frame.scene for frame in split_frames(index, "val")] == ["scene0700_01"]


def test_missing_and_damaged_list_of_scannet(tmp_path: Path) -> None:
    index = _index("scannet", ["scene0000_00"], tmp_path)
    with pytest.raises(DataError, match=r"\Ascannetv2_test.txt: .* is missing; it is looked for in .*splits, [^\n]*\Z"):
        split_frames(index, "test")
    path = tmp_path / "scannetv2_val.txt"
    damaged = {b"scene1\n": "'scene1' is not a scene", b"\n": "'nothing' is not a scene", b"\xff": "cannot be read"}
    for data, message in damaged.items():
        path.write_bytes(data)
        with refused(f"scannetv2_val.txt: {message}"):
            split_frames(index, "val")


def test_what_of_a_split_is_missing() -> None:
    assert missing_of_split(_index("nuscenes", sorted(nuscenes_scenes("mini_val"))), "mini_val") is None
    assert missing_of_split(_index("nuscenes", sorted(nuscenes_scenes("mini_val"))[:1]), "mini_val") == "1 of 2 scenes"
    sequence = Index("semantickitti", DataRoot(Path("root")), "", _index("semantickitti", ["08"] * 4071).frames)
    assert missing_of_split(sequence, "val") is None
    assert missing_of_split(_index("semantickitti", ["08"] * 3), "val") == "3 of 4071 scans"
    assert missing_of_split(_index("semantickitti", ["00", "08"]), "train") == "1 of 19130 scans"
    assert missing_of_split(_index("semantickitti", ["11"]), "test") == "1 of 20351 scans"
