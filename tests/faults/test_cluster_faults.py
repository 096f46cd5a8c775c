"""A cluster of three nodes that loses one while a job runs on it, and a job whose driver is killed.

Scores are compared to the last bit with a run on one machine: keyframes and random numbers come from seed, epoch and
step alone, and a sum over the ranks has one order, wherever they run.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from clusters import NOBODY, Up, begin, up, words_of
from commands import clip2scene, tell_recovery, wait_for, wait_until

pytestmark = pytest.mark.long

EPOCHS, FRAMES = 40, 24
JOB = [
    "jobs/demo.yaml",
    "stage=evaluate",
    "seed=3",
    "dataset.streetworld={train_scenes: 3, val_scenes: 1, keyframes_per_scene: 6, sweeps_between_keyframes: 1, "
    "lidar_beams: 16, lidar_azimuth_steps: 180}",
    "student={voxel_size_m: 1.0, channels: [8, 8, 16]}",
    "extract={num_actors: 3, frames_per_batch: 1}",
    f"distill.epochs={EPOCHS}",
    "distill.batch_size=3",
    "finetune.batch_size=3",
    # More than fit on a node of two CPUs, so that at least one is not on the head node.
    "resources={num_workers: 3, checkpoint_every_epochs: 1}",
]
SAME = ("teacher_2d_miou", "student_3d_miou", "per_class")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def undisturbed(folder) -> dict[str, object]:
    done = clip2scene("run", *words(folder, "undisturbed"), environment=NOBODY)
    assert done.returncode == 0, done.stderr[-3000:]
    return report(folder / "undisturbed")


@pytest.fixture
def cluster(undisturbed, tmp_path) -> Iterator[Up]:
    with up(tmp_path / "cluster", tmp_path / "up.log", nodes=3) as cluster:
        yield cluster


def words(folder: Path, name: str) -> list[str]:
    return [*JOB, f"dataset.root={folder / 'world'}", f"storage={folder / name}"]


def report(storage: Path) -> dict[str, object]:
    values = json.loads((storage / "report.json").read_text())
    return {key: values[key] for key in SAME}


def holding(cluster: Up, worker: str) -> list[psutil.Process]:
    """Raylets of nodes other than the head that have a worker process of that name."""
    found = []
    for process in cluster.family():
        with contextlib.suppress(psutil.Error):
            is_node = process.name() == "raylet" and "--head" not in process.cmdline()
            if is_node and any(worker in " ".join(words_of(child)) for child in process.children()):
                found.append(process)
    return found


def processes(cluster: Up, name: str) -> list[psutil.Process]:
    return [process for process in cluster.family() if name in " ".join(words_of(process))]


def frames(storage: Path) -> int:
    return len(list(storage.glob("features/*/frames/*.safetensors")))


def checkpoints(storage: Path) -> set[str]:
    return {path.name for path in storage.glob("train/*/checkpoint_*")}


def doubled(cluster: Up) -> list[tuple[str, str, int, int]]:
    """Metrics of the method with several values at one step of a run."""
    with contextlib.closing(sqlite3.connect(cluster.storage / "mlflow" / "mlflow.db")) as database:
        rows = "SELECT run_uuid, key, step, COUNT(*) FROM metrics WHERE key NOT LIKE 'system/%' "
        assert database.execute("SELECT COUNT(*) FROM metrics WHERE key LIKE '%loss%'").fetchone()[0] >= EPOCHS
        return database.execute(rows + "GROUP BY run_uuid, key, step HAVING COUNT(*) > 1").fetchall()


def epoch_times_s(cluster: Up) -> list[float]:
    """When each epoch of the distillation was logged in MLflow."""
    with contextlib.closing(sqlite3.connect(cluster.storage / "mlflow" / "mlflow.db")) as database:
        query = "SELECT timestamp FROM metrics JOIN runs USING (run_uuid) WHERE name = 'distill' AND key = 'loss'"
        return sorted(time_ms / 1000 for (time_ms,) in database.execute(query))


@contextlib.contextmanager
def submitted(cluster: Up, folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    log = folder / f"{name}.log"
    process = begin(log, "submit", *words(folder, name), environment=cluster.environment)
    try:
        wait_for("Running entrypoint", log, process)
        yield process, log
    finally:
        process.kill()


def test_a_node_lost_during_extraction(cluster, folder, undisturbed):
    storage = folder / "extraction"
    with submitted(cluster, folder, "extraction") as (process, log):
        wait_until(lambda: frames(storage) and holding(cluster, "Encoder"), "two nodes encode", timeout_s=300)
        holding(cluster, "Encoder")[0].send_signal(signal.SIGKILL)
        lost_at_s, before = time.monotonic(), frames(storage)
        wait_until(lambda: list(storage.glob("features/*/manifest.json")), "all is encoded", timeout_s=300)
        tell_recovery(lost_at_s)
        assert process.wait(500) == 0, log.read_text()[-3000:]
    assert 0 < before < FRAMES
    assert report(storage) == undisturbed
    assert doubled(cluster) == []
    assert len(processes(cluster, "raylet/raylet")) == 2


def test_a_node_lost_during_training(cluster, folder, undisturbed):
    storage = folder / "training"
    with submitted(cluster, folder, "training") as (process, log):
        wait_until(lambda: len(checkpoints(storage)) > 1, "two epochs are done", timeout_s=400)
        victims = holding(cluster, "RayTrainWorker")
        assert victims
        victims[0].send_signal(signal.SIGKILL)
        assert process.wait(500) == 0, log.read_text()[-3000:]
    times_s = epoch_times_s(cluster)
    assert len(times_s) == EPOCHS
    waited_s = max(later - earlier for earlier, later in itertools.pairwise(times_s))
    assert waited_s > 5, "an epoch takes a second: the loss came when all was done"
    tell_recovery(time.monotonic() - waited_s)
    assert report(storage) == undisturbed
    assert doubled(cluster) == []
    assert processes(cluster, "RayTrainWorker") == []


def test_a_driver_is_killed_and_its_job_submitted_again(cluster, folder, undisturbed):
    storage = folder / "driver"
    with submitted(cluster, folder, "driver") as (process, _):
        wait_until(lambda: len(checkpoints(storage)) > 1, "two epochs are done", timeout_s=400)
        (driver,) = [p for p in processes(cluster, f"storage={storage}") if "clip2scene.cli" in words_of(p)]
        driver.send_signal(signal.SIGKILL)
        killed_at_s = time.monotonic()
        assert process.wait(100) != 0
        wait_until(lambda: not processes(cluster, "RayTrainWorker"), "its workers have ended")
        before = checkpoints(storage)
        again = begin(folder / "again.log", "submit", *words(folder, "driver"), environment=cluster.environment)
        wait_until(lambda: checkpoints(storage) - before, "another epoch is done", timeout_s=300)
        tell_recovery(killed_at_s)
        assert again.wait(500) == 0, (folder / "again.log").read_text()[-3000:]
    assert "is already running" not in (folder / "again.log").read_text()
    assert report(storage) == undisturbed
    assert doubled(cluster) == []
