"""A clock that jumps back an hour while a job runs, for every process of it, by libfaketime."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from pathlib import Path

import pytest
from servers import wait_until

from clusters import NOBODY, begin
from commands import clip2scene

pytestmark = pytest.mark.long

JOB = [
    "jobs/demo.yaml",
    "stage=evaluate",
    "seed=3",
    "dataset.streetworld={train_scenes: 2, val_scenes: 1, keyframes_per_scene: 2, sweeps_between_keyframes: 1, "
    "lidar_beams: 16, lidar_azimuth_steps: 180}",
    "student={voxel_size_m: 1.0, channels: [8, 8, 16]}",
    "distill.epochs=6",
    "resources={num_workers: 2, checkpoint_every_epochs: 1}",
]
SAME = ("teacher_2d_miou", "student_3d_miou", "per_class")
LIBRARY = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")


@pytest.fixture
def clock(tmp_path) -> tuple[Path, dict[str, str]]:
    """A file that says how far the clock is off, and the environment in which it is so."""
    if not LIBRARY.is_file():
        pytest.skip("no libfaketime here (apt-get install faketime)")
    file = tmp_path / "clock"
    file.write_text("+0\n")
    settings = {"FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return file, NOBODY | settings | {"LD_PRELOAD": str(LIBRARY)}


def test_a_clock_that_jumps_back_an_hour_changes_no_score_and_loses_no_metric(clock, tmp_path):
    file, environment = clock
    now = ["date", "+%s"]
    here, log = tmp_path / "undisturbed", tmp_path / "jumped.log"
    world = f"dataset.root={tmp_path / 'world'}"
    done = clip2scene("run", *JOB, world, f"storage={here}", environment=NOBODY)
    assert done.returncode == 0, done.stderr[-3000:]

    storage = tmp_path / "jumped"
    process = begin(log, environment, "run", *JOB, world, f"storage={storage}")
    try:
        wait_until(lambda: len(list(storage.glob("train/distill-*/checkpoint_*"))) > 1, "two epochs are done", 400)
        before_s = int(subprocess.run(now, env=environment, capture_output=True, check=True).stdout)
        file.write_text("-3600\n")
        assert int(subprocess.run(now, env=environment, capture_output=True, check=True).stdout) < before_s - 3000
        assert process.wait(400) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (here, storage)]
    assert all(reports[0][key] == reports[1][key] for key in SAME)
    assert metrics(storage) == metrics(here)


def metrics(storage: Path) -> list[tuple[str, str, int, float]]:
    """What MLflow keeps of the job, but for what a clock measures."""
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as database:
        assert {status for (status,) in database.execute("select status from runs")} == {"FINISHED"}
        rows = database.execute(
            "select name, key, step, value from metrics join runs using (run_uuid) "
            "where key not like 'system/%' and key not like '%second%' and is_nan = 0"
        ).fetchall()
    assert [row for row in rows if row[1] == "loss"]
    return sorted(row for row in rows if not row[1].startswith(("images_encoded", "images_cached")))
