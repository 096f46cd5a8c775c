from __future__ import annotations

import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest

from clip2scene.errors import DataError, StorageError
from clip2scene.storage import Storage
from clip2scene.teacher import store
from clip2scene.teacher.store import FeatureStore

MANIFEST = {
    "teacher": "t1",
    "grid": [2, 3],
    "dim": 4,
    "frames": 1,
    "images": 2,
    "broken": [],
}


def features(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store.write_frame(tmp_path, "f1", {"A": features(1), "B": features(2)}, {"C": "missing"}, "t1", Storage(tmp_path))
    store.write_manifest(tmp_path, MANIFEST, Storage(tmp_path))
    return tmp_path


def test_round_trip(path: Path) -> None:
    opened = FeatureStore.open(path, Storage(path), teacher_digest="t1")
    read = opened.read("f1")
    assert list(read) == ["A", "B"]
    assert read["A"].dtype == np.float16
    np.testing.assert_array_equal(read["B"], features(2).astype(np.float16))
    assert (opened.grid, opened.dim) == ((2, 3), 4)
    assert store.read_entry(path, "f1", Storage(path)) == store.FrameEntry("t1", ("A", "B"), {"C": "missing"})
    assert store.stored_frames(path, Storage(path)) == ["f1"]
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.read("f1")["A"], read["A"])
    assert FeatureStore(path, store.read_manifest(path), opened.storage) == opened


def test_a_frame_that_is_written_again_has_the_same_bytes(path: Path, tmp_path: Path) -> None:
    first = (path / "frames" / "f1.safetensors").read_bytes()
    for _ in range(8):
        store.write_frame(
            tmp_path, "f1", {"B": features(2), "A": features(1)}, {"C": "missing"}, "t1", Storage(tmp_path)
        )
        assert (path / "frames" / "f1.safetensors").read_bytes() == first


def test_relative_path_survives_a_change_of_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    opened = FeatureStore.open(path.name, Storage(path.name))
    monkeypatch.chdir("/")
    assert list(opened.read("f1")) == ["A", "B"]


def test_missing_frame_or_store(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f2\.safetensors: the frame is not in the feature store"):
        FeatureStore.open(path, Storage(path)).read("f2")
    with pytest.raises(DataError, match="no finished feature store there"):
        FeatureStore.open(tmp_path / "nowhere", Storage(tmp_path))


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_truncated_frame(path: Path, keep: int) -> None:
    file = path / "frames" / "f1.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"f1\.safetensors: damaged frame"):
        FeatureStore.open(path, Storage(path)).read("f1")
    with pytest.raises(DataError, match=r"f1\.safetensors: damaged frame"):
        store.read_entry(path, "f1", Storage(path))


@pytest.mark.parametrize(
    ("before", "after"),
    [("[0,48]", "[8,48]"), ("[0,48]", "[0,-8]"), ('"F16"', '"F32"'), ("[2,3,4]", "[2,3,5]"), ('{"dtype"', '["dtype"')],
)
def test_damaged_header(path: Path, before: str, after: str) -> None:
    file = path / "frames" / "f1.safetensors"
    file.write_bytes(file.read_bytes().replace(before.encode(), after.encode(), 1))
    with pytest.raises(DataError, match=r"f1\.safetensors: (features of A|damaged frame)"):
        FeatureStore.open(path, Storage(path)).read("f1")


def test_frame_of_another_shape_or_kind(path: Path) -> None:
    store.write_frame(path, "f2", {"A": features(1)[:1]}, {}, "t1", Storage(path))
    with pytest.raises(DataError, match=r"features of A are F16 \(1, 3, 4\)"):
        FeatureStore.open(path, Storage(path)).read("f2")
    from safetensors.numpy import save_file

    save_file({"A": features(1)}, path / "frames" / "f3.safetensors")
    with pytest.raises(DataError, match=r"f3\.safetensors: damaged frame"):
        FeatureStore.open(path, Storage(path)).read("f3")


def test_store_of_another_teacher(path: Path) -> None:
    with pytest.raises(DataError, match="store from another teacher: its features are of t1, expected t2"):
        FeatureStore.open(path, Storage(path), teacher_digest="t2")
    store.write_frame(path, "f2", {"A": features(1)}, {}, "t2", Storage(path))
    with pytest.raises(DataError, match=r"f2\.safetensors: store from another teacher"):
        FeatureStore.open(path, Storage(path)).read("f2")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "clip2scene-features-0"}'])
def test_damaged_manifest(path: Path, text: str) -> None:
    (path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: not "):
        FeatureStore.open(path, Storage(path))


@pytest.mark.parametrize("frame_id", ["", ".", "..", "../f", "a/b", "a\\b", "a\0b", ".hidden", "a\nb", "x" * 201])
def test_frame_ids_are_plain_file_names(path: Path, frame_id: str) -> None:
    with pytest.raises(DataError, match="cannot name a file"):
        FeatureStore.open(path, Storage(path)).read(frame_id)
    with pytest.raises(DataError, match="cannot name a file"):
        store.write_frame(path, frame_id, {}, {}, "t1", Storage(path))


def test_features_that_do_not_fit_are_refused(path: Path) -> None:
    with pytest.raises(DataError, match="not finite in float16"):
        store.write_frame(path, "f2", {"A": features(1) * 1e9}, {}, "t1", Storage(path))
    assert store.stored_frames(path, Storage(path)) == ["f1"]


def test_full_disk_leaves_nothing_half_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The temporary file is a link to the device that is always full.
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=0))
    (path / "frames" / ".f2.safetensors.00000000").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"f2\.safetensors: cannot be written \(No space left on device\)"):
        store.write_frame(path, "f2", {"A": features(1)}, {}, "t1", Storage(path))
    assert sorted(file.name for file in (path / "frames").iterdir()) == ["f1.safetensors"]


def test_leftovers_of_killed_writers_are_removed(path: Path) -> None:
    (path / "frames" / ".f2.safetensors.123").write_bytes(b"half")
    (path / ".manifest.json.123").write_bytes(b"half")
    (path / ".lock").touch()
    assert store.stored_frames(path, Storage(path)) == ["f1"]
    store.remove_leftovers(path)
    assert [file.name for file in (path / "frames").iterdir()] == ["f1.safetensors"]
    assert {file.name for file in path.iterdir()} == {"frames", "manifest.json", ".lock"}
