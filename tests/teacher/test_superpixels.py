"""SLIC superpixels, made once."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2scene.config import ContrastSettings
from clip2scene.data.index import Index, read_index, write_index
from clip2scene.data.nuscenes import build_index
from clip2scene.errors import DataError
from clip2scene.storage import Storage
from clip2scene.teacher import superpixels
from clip2scene.teacher.superpixels import (
    SuperpixelStore,
    segment_images,
    segments_at,
    slic_segments,
    superpixel_digest,
)

SETTINGS = ContrastSettings(superpixels_per_image=20)
HEIGHT, WIDTH = 56, 100


@pytest.fixture(scope="module")
def index(streetworld_root: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The index of a copy of the street world, so that tests may break its images."""
    root = tmp_path_factory.mktemp("superpixels") / "world"
    shutil.copytree(streetworld_root[0], root)
    return build_index(root, streetworld_root[1])


def segment(index, path, *, workers=0, frames=slice(2), settings=SETTINGS):
    segment_images(index, index.frames[frames], settings, HEIGHT, WIDTH, path, workers, storage=Storage(path))


def opened(path):
    return SuperpixelStore.open(path, Storage(path))


@pytest.fixture(scope="module")
def made(index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    segment(index, path)
    return path


def written(path: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in (path / "frames").iterdir()}


def test_segments_are_contiguous_and_cover_every_pixel(index, made):
    store = pickle.loads(pickle.dumps(opened(made)))
    maps = store.read(index.frames[0].frame_id)
    assert set(maps) == {camera.name for camera in index.frames[0].cameras}
    for map_HW in maps.values():
        assert map_HW.shape == (HEIGHT, WIDTH)
        assert map_HW.dtype == np.uint16
        sizes = np.bincount(map_HW.ravel())
        assert (sizes > 0).all()
        assert 5 <= len(sizes) <= 30


def test_segments_follow_edges():
    image = np.zeros((120, 200, 3), np.uint8)
    image[:, 90:] = (255, 200, 0)
    how = {"height": 60, "width": 100, "superpixels_per_image": 12, "compactness": 6.0}
    segments = slic_segments(image, how)
    assert not set(np.unique(segments[:, :44])) & set(np.unique(segments[:, 46:]))


def test_workers_make_the_same_and_only_what_is_missing(index, made, tmp_path, ray_cluster):
    again = tmp_path / "again"
    shutil.copytree(made, again)
    before = written(again)
    first, second = (frame.frame_id for frame in index.frames[:2])
    (again / "frames" / f"{first}.npz").unlink()
    segment(index, again, workers=2)
    after = written(again)
    assert after[f"{second}.npz"] == before[f"{second}.npz"]
    stores = opened(again), opened(made)
    for frame_id in (first, second):
        maps, expected = (store.read(frame_id) for store in stores)
        assert all((maps[camera] == expected[camera]).all() for camera in expected)
    segment(index, again, workers=2)
    assert written(again) == after


def test_more_frames_than_workers_are_all_segmented(index, tmp_path, ray_cluster):
    segment(index, tmp_path, workers=1, frames=slice(5))
    assert set(written(tmp_path)) == {f"{frame.frame_id}.npz" for frame in index.frames[:5]}


def test_a_task_is_sent_its_own_images_and_not_the_index(index, tmp_path, monkeypatch):
    frames = [replace(index.frames[0], frame_id=f"frame-{number}") for number in range(200)]
    write_index(replace(index, frames=tuple(frames)), tmp_path / "index.parquet")
    many = read_index(tmp_path / "index.parquet")
    assert len(pickle.dumps(many.frames[0])) > 200_000
    sizes = []

    def segmented(*job):
        sizes.append(len(pickle.dumps(job)))
        return f"frame-{len(sizes) - 1}", ""

    monkeypatch.setattr(superpixels, "_segment_frame", segmented)
    segment(many, tmp_path / "store", frames=slice(None))
    assert len(sizes) == 200
    assert max(sizes) < 5000


def test_an_interrupted_run_continues(index, made, tmp_path, monkeypatch):
    images = []

    @contextlib.contextmanager
    def interrupted(*_, **__):
        def stop(_):
            raise KeyboardInterrupt

        yield stop

    @contextlib.contextmanager
    def counted(*_, **__):
        yield images.append

    monkeypatch.setattr(superpixels, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        segment(index, tmp_path)
    before = written(tmp_path)
    assert list(before) == [f"{index.frames[0].frame_id}.npz"]
    with pytest.raises(DataError, match="no finished superpixels there"):
        opened(tmp_path)
    # What a kill in the midst of writing leaves aside is never read, and goes.
    (tmp_path / "frames" / f".{index.frames[1].frame_id}.npz.123").write_bytes(b"half")
    monkeypatch.setattr(superpixels, "progress", counted)
    segment(index, tmp_path)
    assert images == [6]
    after = written(tmp_path)
    assert before.items() <= after.items()
    assert set(after) == set(written(made))


def test_a_damaged_frame_is_refused_and_made_again(index, made, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(made, path)
    frame_id = index.frames[0].frame_id
    file = path / "frames" / f"{frame_id}.npz"
    whole = file.read_bytes()
    for damaged in (b"", whole[:50], whole[:-1], whole[:2000] + bytes(2000) + whole[4000:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"npz: damaged superpixels") as caught:
            opened(path).read(frame_id)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole[:-1])
    segment(index, path)
    assert opened(path).read(frame_id)
    with pytest.raises(DataError, match="the frame has no superpixels"):
        opened(path).read("other")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "clip2scene-superpixels-0"}'])
def test_damaged_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json: not the manifest of superpixels"):
        opened(tmp_path)


def test_a_broken_image_is_absent_until_it_is_repaired(index, tmp_path):
    frame = index.frames[3]
    image = index.root.path / frame.cameras[2].image_path
    whole = image.read_bytes()
    image.write_bytes(whole[:300])
    file = tmp_path / "frames" / f"{frame.frame_id}.npz"
    try:
        segment(index, tmp_path, frames=slice(3, 4))
        before = written(tmp_path)
        segment(index, tmp_path, frames=slice(3, 4))
        assert written(tmp_path) == before
    finally:
        image.write_bytes(whole)
    with np.load(file) as arrays:
        ((camera, reason),) = json.loads(str(arrays["about"]))["broken"].items()
    assert camera == frame.cameras[2].name
    assert "truncated" in reason
    assert camera not in opened(tmp_path).read(frame.frame_id)
    segment(index, tmp_path, frames=slice(3, 4))
    assert camera in opened(tmp_path).read(frame.frame_id)


def test_other_settings_have_another_address_and_are_refused_at_the_same(index, made):
    other = SETTINGS.model_copy(update={"compactness": 9.0})
    digest = superpixel_digest("index", SETTINGS, HEIGHT, WIDTH)
    assert digest == superpixel_digest("index", SETTINGS.model_copy(update={"temperature": 1.0}), HEIGHT, WIDTH)
    others = (("other", SETTINGS, HEIGHT), ("index", other, HEIGHT), ("index", SETTINGS, 64))
    assert digest not in {superpixel_digest(name, settings, height, WIDTH) for name, settings, height in others}
    before = written(made)
    with pytest.raises(DataError, match="superpixels of other settings"):
        segment(index, made, settings=other)
    assert written(made) == before


def test_segments_are_read_at_the_nearest_pixel():
    maps = torch.arange(2 * 3 * 4).reshape(2, 3, 4).to(torch.int32)
    position = torch.tensor([[0.0, 0.0], [0.24, 0.32], [0.26, 0.34], [0.99, 0.99], [1.0, 1.0], [0.5, 0.5]])
    image = torch.tensor([0, 0, 0, 0, 1, 1])
    segments = segments_at(maps, image, position)
    assert segments.dtype == torch.int64
    assert segments.tolist() == [0, 0, 5, 11, 23, 12 + 4 + 2]
    assert torch.equal(segments_at(torch.from_numpy(maps.numpy().astype(np.uint16)), image, position), segments)
