from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from clip2scene.config import ExtractSettings
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Index
from clip2scene.errors import ConfigError, DataError
from clip2scene.storage import Storage, locked
from clip2scene.teacher import store
from clip2scene.teacher.clip import DenseClip, load_teacher
from clip2scene.teacher.encoder import Encoder, frame_row
from clip2scene.teacher.extract import ExtractionError, ExtractReport, _share, extract
from clip2scene.teacher.store import FeatureStore
from commands import TESTS, tell_recovery
from two_cameras import HEIGHT, WIDTH, make_index, teacher_settings

TinyClip = Callable[..., Path]


def written(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every frame's file, which change when a file is written again."""
    stats = {id_: store.frame_file(path, id_).stat() for id_ in store.stored_frames(path, Storage(path))}
    return {id_: (stat.st_ino, stat.st_mtime_ns) for id_, stat in stats.items()}


class Run:
    """An extraction in which three of ten images are broken."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.root, self.path = folder / "data", folder / "store"
        self.index = make_index(self.root, 5)
        self.teacher = load_teacher(teacher_settings(model))
        self.settings = ExtractSettings(num_actors=2, frames_per_batch=2, max_broken_fraction=0.5)
        (self.root / "CAM_LEFT-1.jpg").unlink()
        truncated = self.root / "CAM_RIGHT-1.jpg"
        truncated.write_bytes(truncated.read_bytes()[:300])
        Image.new("RGB", (WIDTH, HEIGHT + 1)).save(self.root / "CAM_LEFT-3.jpg")
        self.report = self.extract()
        self.written = written(self.path)

    def extract(self, **changes: Any) -> ExtractReport:
        settings = self.settings.model_copy(update=changes)
        return extract(self.index, self.index.frames, self.teacher, settings, self.path, storage=Storage(self.path))


@pytest.fixture(scope="module")
def run(ray_cluster: None, tiny_clip: TinyClip, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("extract"), tiny_clip("average"))


def test_every_image_is_encoded_by_the_teacher(run: Run) -> None:
    assert run.report.images_encoded == 7
    assert run.report.images_cached == 0
    teacher = run.teacher
    opened = FeatureStore.open(run.path, Storage(run.path), teacher_digest=teacher.digest)
    for frame in run.index.frames:
        features = opened.read(frame.frame_id)
        images = {c.name: np.array(Image.open(run.root / c.image_path)) for c in frame.cameras if c.name in features}
        for name, image in images.items():
            expected = teacher(teacher.preprocess(image)[None])[0].numpy()
            np.testing.assert_allclose(features[name].astype(np.float32), expected, atol=2e-3, rtol=2e-3)
    assert opened.read("frame-1") == {}
    assert list(opened.read("frame-3")) == ["CAM_RIGHT"]


def test_broken_images_are_quarantined_with_their_reasons(run: Run) -> None:
    reasons = {(image.frame_id, image.camera): image.reason for image in run.report.broken}
    assert set(reasons) == {("frame-1", "CAM_LEFT"), ("frame-1", "CAM_RIGHT"), ("frame-3", "CAM_LEFT")}
    assert "missing image" in reasons["frame-1", "CAM_LEFT"]
    assert "truncated" in reasons["frame-1", "CAM_RIGHT"]
    assert "96 x 65 pixels, the index says 96 x 64" in reasons["frame-3", "CAM_LEFT"]
    manifest = store.read_manifest(run.path)
    assert [store.BrokenImage(**image) for image in manifest["broken"]] == list(run.report.broken)
    assert (manifest["frames"], manifest["images"], manifest["teacher"]) == (5, 7, run.teacher.digest)
    assert (manifest["grid"], manifest["dim"]) == ([4, 6], 24)


def test_a_second_run_computes_nothing(run: Run) -> None:
    report = run.extract()
    assert (report.images_encoded, report.images_cached, report.broken) == (0, 7, run.report.broken)
    assert written(run.path) == run.written


def test_too_many_broken_images_end_the_run_after_the_manifest(run: Run) -> None:
    (run.path / "manifest.json").unlink()
    with pytest.raises(ExtractionError, match=r"3 of 10 images are broken, .*=0\.2 allows 2 .*missing image") as raised:
        run.extract(max_broken_fraction=0.2)
    assert "\n" not in str(raised.value)
    assert store.read_manifest(run.path)["images"] == 7
    assert len(run.extract(max_broken_fraction=0.3).broken) == 3


def test_a_store_can_be_read_while_it_grows(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    shutil.copytree(run.path, path)
    store.frame_file(path, "frame-4").unlink()
    opened = []

    def encode(*_: object) -> dict[str, store.FrameEntry]:
        opened.append(FeatureStore.open(path, Storage(path), teacher_digest=run.teacher.digest).read("frame-0"))
        return {"frame-4": store.FrameEntry(run.teacher.digest, ("CAM_LEFT", "CAM_RIGHT"), {})}

    monkeypatch.setattr("clip2scene.teacher.extract._encode_all", encode)
    extract(run.index, run.index.frames, run.teacher, run.settings, path, storage=Storage(path))
    assert [len(features) for features in opened] == [2]


def test_store_of_another_teacher_is_left_alone(run: Run) -> None:
    other = load_teacher(run.teacher.settings.model_copy(update={"keep_last_mlp": True}))
    with pytest.raises(DataError, match="store from another teacher"):
        extract(run.index, run.index.frames, other, run.settings, run.path, storage=Storage(run.path))
    assert written(run.path) == run.written
    assert FeatureStore.open(run.path, Storage(run.path)).read("frame-0")


def test_more_gpus_than_there_are(run: Run, tmp_path: Path) -> None:
    # As many batches as actors, and far more of both than any machine's GPUs.
    settings = ExtractSettings(num_actors=64, gpus_per_actor=1, frames_per_batch=1)
    frames = tuple(replace(run.index.frames[0], frame_id=f"frame-{number}") for number in range(64))
    with pytest.raises(ConfigError, match=r"extract.gpus_per_actor=1: with 1 GPU each there is room for"):
        extract(run.index, frames, run.teacher, settings, tmp_path, storage=Storage(tmp_path))


def test_a_second_run_at_once_waits_and_finds_everything_done(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    reports: list[ExtractReport] = []
    second = threading.Thread(target=lambda: reports.append(run.extract()))
    with (run.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        while "waiting for it" not in caplog.text:
            assert second.is_alive()
            time.sleep(0.01)
        assert not reports
    second.join(timeout=60)
    assert reports[0].images_encoded == 0


def test_an_actor_with_other_weights_reports_it(run: Run) -> None:
    encoder = Encoder(run.teacher.settings, run.settings, run.index.root, run.path, "other", Storage(run.path))
    row = {key: np.array([value]) for key, value in frame_row(run.index.frames[0]).items()}
    result = encoder(row)
    assert result["frame_id"] == ["frame-0"]
    assert "cannot load the teacher: the weights of local-dir" in json.loads(result["status"][0])["error"]


def test_an_actor_that_does_not_see_the_store_reports_it(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("clip2scene.storage._SEEN_WITHIN_S", 0.0)
    elsewhere = tmp_path / "store"  # as on a machine that does not share the folder
    digest = run.teacher.digest
    encoder = Encoder(run.teacher.settings, run.settings, run.index.root, elsewhere, digest, Storage(tmp_path))
    result = encoder({key: np.array([value]) for key, value in frame_row(run.index.frames[0]).items()})
    assert "does not see this folder of the driver's" in json.loads(result["status"][0])["error"]
    assert not elsewhere.exists()


def test_an_actor_whose_gpu_is_full_reports_it(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".lock").touch()
    encoder = Encoder(
        run.teacher.settings, run.settings, run.index.root, tmp_path / "store", run.teacher.digest, Storage(tmp_path)
    )

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(DenseClip, "forward", full)
    result = encoder({key: np.array([value]) for key, value in frame_row(run.index.frames[0]).items()})
    assert result["frame_id"] == ["frame-0"]
    error = json.loads(result["status"][0])["error"]
    assert error.endswith("cannot encode images: CUDA out of memory. Tried to allocate 2 GiB")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("cpus_of_nodes", "actors", "most", "share"),
    [
        ([2], 1, 1, 1.0),
        ([2], 2, 1, 0.5),
        ([8], 2, 4, 3.5),
        ([2, 2], 1, 4, 2.0),  # no node has the three that are left of all
        ([4, 4], 3, 4, 2.0),  # 7 / 3 for each would leave one without a place
        ([64, 8, 8], 2, 16, 16.0),
        ([1], 1, 4, 0.0),
        ([], 2, 4, 0.0),
    ],
)
def test_every_actor_finds_its_cpus_on_one_node(
    cpus_of_nodes: list[float], actors: int, most: float, share: float
) -> None:
    assert _share([{"CPU": cpus} for cpus in cpus_of_nodes], actors, most) == share


def test_every_actor_finds_its_cpus_beside_a_gpu() -> None:
    large, small, without = {"CPU": 16.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}, {"CPU": 64.0}
    assert _share([large, without], 1, 4, gpus=1) == 4.0
    assert _share([large, small], 2, 4, gpus=1) == 2.0  # with four each, both would fit on the large node's CPUs alone
    assert _share([large, small], 2, 4, gpus=0.5) == 4.0


@pytest.mark.parametrize("readers", [None, ThreadPoolExecutor(2)], ids=["read in turn", "read ahead, as with a GPU"])
def test_frames_of_many_images_are_encoded_in_parts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: ThreadPoolExecutor | None
) -> None:
    monkeypatch.setattr("clip2scene.teacher.encoder._IMAGES_AT_ONCE", 1)
    digest = run.teacher.digest
    with locked(tmp_path / "store", "fills this store"):
        encoder = Encoder(
            run.teacher.settings, run.settings, run.index.root, tmp_path / "store", digest, Storage(tmp_path)
        )
    encoder._readers = readers
    rows = [frame_row(frame) for frame in run.index.frames]
    result = encoder({key: np.array([row[key] for row in rows]) for key in rows[0]})
    assert sum(len(json.loads(status)["cameras"]) for status in result["status"]) == run.report.images_encoded
    finished = FeatureStore.open(run.path, Storage(run.path), teacher_digest=digest)
    for frame_id in result["frame_id"]:
        whole, parts = finished.read(frame_id), replace(finished, path=tmp_path / "store").read(frame_id)
        assert whole.keys() == parts.keys()
        for camera, features_hwD in whole.items():
            np.testing.assert_allclose(parts[camera], features_hwD, atol=2e-3)


def _actors_of_ours() -> list[psutil.Process]:
    """Ray Data's actors that descend from this test run."""
    ours = psutil.Process().children(recursive=True)
    found = []
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


DRIVER = """
import contextlib, os, signal, sys
from pathlib import Path
import ray
sys.path.insert(0, sys.argv[1])
from two_cameras import make_index, teacher_settings
from clip2scene.config import ExtractSettings
from clip2scene.storage import Storage
from clip2scene.teacher.clip import load_teacher
from clip2scene.teacher.encoder import Encoder, frame_row
from clip2scene.teacher import extract as module

@contextlib.contextmanager
def kill_ourselves_after_three_frames(*_, **__):
    counted = []
    def advance(n):
        counted.append(n)
        if len(counted) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    yield advance

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
root = Path(sys.argv[2])
index = make_index(root, int(sys.argv[4]))
(root / "CAM_LEFT-0.jpg").rename(root / "away.jpg")
settings = ExtractSettings(num_actors=1, frames_per_batch=1)
teacher = load_teacher(teacher_settings(Path(sys.argv[3])))
storage = Storage(root)
module.progress = kill_ourselves_after_three_frames
module.extract(index, index.frames, teacher, settings, root / "store", storage=storage)
"""
NUM_FRAMES = 40


@pytest.mark.long
def test_killed_driver_and_killed_actor(
    ray_cluster: None, tiny_clip: TinyClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first run has a Ray of its own with a single CPU, which must be enough; it dies with its driver.
    arguments = [str(TESTS), str(tmp_path), str(tiny_clip("token")), str(NUM_FRAMES)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    killed = subprocess.run([sys.executable, "-c", DRIVER, *arguments], env=environment, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL
    path = tmp_path / "store"
    with pytest.raises(DataError, match="no finished feature store"):
        FeatureStore.open(path, Storage(path))
    before = written(path)
    assert 3 <= len(before) < NUM_FRAMES
    assert list(store.read_entry(path, "frame-0", Storage(path)).broken) == ["CAM_LEFT"]

    # Since then one image was repaired and one stored frame was damaged; the second run loses its only actor.
    (tmp_path / "away.jpg").rename(tmp_path / "CAM_LEFT-0.jpg")
    damaged = store.frame_file(path, "frame-1")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    totals: list[tuple[str, int]] = []
    victims: list[int] = []
    killed_at_s: list[float] = []

    @contextlib.contextmanager
    def kill_actor_at_first_frame(description: str, total: int, **_: Any) -> Iterator[Callable[[int], None]]:
        totals.append((description, total))

        def advance(_: int) -> None:
            if len(killed_at_s) == 1:
                tell_recovery(killed_at_s[0])
                killed_at_s.append(0)
            if description == "extract" and not victims:
                (actor,) = _actors_of_ours()
                victims.append(actor.pid)
                actor.send_signal(signal.SIGKILL)
                killed_at_s.append(time.monotonic())

        yield advance

    # The same index as in the first run; the images it draws are not used.
    index = make_index(tmp_path / "again", NUM_FRAMES)
    index = Index(index.dataset, DataRoot(tmp_path), index.version, index.frames)
    settings = ExtractSettings(num_actors=1, frames_per_batch=1)
    teacher = load_teacher(teacher_settings(tiny_clip("token")))
    monkeypatch.setattr("clip2scene.teacher.extract.progress", kill_actor_at_first_frame)
    report = extract(index, index.frames, teacher, settings, path, storage=Storage(path))
    assert len(victims) == 1
    missing = NUM_FRAMES - len(before) + 2
    assert (report.images_encoded, report.images_cached, report.broken) == (2 * missing, 2 * (len(before) - 2), ())
    assert totals == [("check store", len(before)), ("extract", 2 * missing)]
    after = written(path)
    assert {id_ for id_ in before if after[id_] == before[id_]} == set(before) - {"frame-0", "frame-1"}
    opened = FeatureStore.open(path, Storage(path))
    assert all(len(opened.read(frame.frame_id)) == 2 for frame in index.frames)
