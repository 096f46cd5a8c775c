"""The commands as a user types them, in processes of their own."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time

import pytest

from clip2scene.cli import _interrupted_by
from clip2scene.data.index import read_index
from clip2scene.jobfile import load_job
from clip2scene.scores import class_scores_of, mean_scores_of
from clip2scene.tracking.run import client_of
from clip2scene.tracking.tracker import connect
from commands import REPOSITORY, begin, clip2scene, fail, succeed, wait_until

TINY = [
    "dataset.streetworld={train_scenes: 3, val_scenes: 2, keyframes_per_scene: 2, sweeps_between_keyframes: 2, "
    "lidar_beams: 16, lidar_azimuth_steps: 180, image_width_px: 208, image_height_px: 112}",
    "teacher={model: streetworld, image_width_px: 208, image_height_px: 112}",
    "extract.num_actors=1",
    "student={voxel_size_m: 1.0, channels: [8, 8, 16]}",
    "distill.epochs=2",
    "finetune.epochs=2",
    "finetune.label_fraction=0.5",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished tiny demo: (storage, what it printed)."""
    storage = tmp_path_factory.mktemp("demo") / "demo-output"
    return storage, succeed("run", "jobs/demo.yaml", "seed=3", f"storage={storage}", *TINY)


def test_demo_writes_its_report(demo):
    storage, printed = demo
    report = json.loads((storage / "report.json").read_text())
    assert report["seed"] == 3
    assert report["images_encoded"] == 5 * 2 * 6
    scores = ("teacher_2d_miou", "student_3d_miou", "majority_miou")
    assert all(0 < report[key] < 1 for key in scores)
    assert set(report["finetuned_miou"]) == {"pretrained", "scratch"}
    assert set(report["per_class"]) == {"teacher_2d", "student_3d", "pretrained", "scratch"}
    assert len(report["per_class"]["student_3d"]) == 16
    assert {"index", "extract", "distill", "evaluate", "finetune"} <= set(report["seconds"])
    assert report["label_fraction"] == 0.5
    assert {"protocol", "vocabulary", "digests"} <= set(report)
    assert f"clip2scene ui --storage {storage}" in printed
    assert "mIoU" in printed
    assert succeed("report", "--storage", storage).strip() in printed
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as database:
        logged = {name for (name,) in database.execute("select distinct key from metrics")}
    job = load_job(REPOSITORY / "jobs" / "demo.yaml")
    means = {name for name in logged if name.startswith(("miou/", "accuracy/"))}
    per_class = {name for name in logged if name.startswith("iou_")}
    assert means == set(mean_scores_of(job))
    assert per_class <= set(class_scores_of(job))
    assert {name.partition("/")[0] for name in per_class} == {name.partition("/")[0] for name in class_scores_of(job)}


def test_demo_is_tracked_as_a_parent_with_a_child_a_stage(demo):
    with sqlite3.connect(demo[0] / "mlflow" / "mlflow.db") as database:
        runs = dict(database.execute("select name, run_uuid from runs where status = 'FINISHED'"))
        parents = dict(database.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'"))
        epochs = database.execute(
            "select distinct step from metrics where run_uuid = ? and key = 'loss'", (runs["distill"],)
        ).fetchall()
    children = set(runs) - {"demo-seed3"}
    assert children == {
        "streetworld",
        "index",
        "extract",
        "distill",
        "evaluate",
        "finetune-pretrained",
        "finetune-scratch",
        "evaluate-finetuned",
    }
    assert {parents[runs[name]] for name in children} == {runs["demo-seed3"]}
    assert {step for (step,) in epochs} == {1, 2}
    figures = {path.name for path in (demo[0] / "mlflow" / "artifacts").rglob("*.png")}
    assert {"birds_eye.png", "losses.png", "confusion_student_3d.png", "images_truth.png", "classes.png"} <= figures


def test_a_second_run_finds_everything(demo, uri):
    """Same job again: nothing is encoded or trained again, and the scores are the same."""
    storage, _ = demo
    before = json.loads((storage / "report.json").read_text())
    students = {path: path.stat().st_mtime_ns for path in (storage / "students").iterdir()}
    succeed("run", "jobs/demo.yaml", "seed=3", f"storage={storage}", *TINY, "--tracking-uri", uri)
    after = json.loads((storage / "report.json").read_text())
    assert after["images_encoded"] == 0
    assert after["images_cached"] == before["images_encoded"]
    assert {path: path.stat().st_mtime_ns for path in (storage / "students").iterdir()} == students
    for key in ("teacher_2d_miou", "student_3d_miou", "finetuned_miou", "majority_miou", "per_class", "digests"):
        assert after[key] == before[key]


def test_a_proxy_is_not_asked_for_the_servers_of_this_machine(demo, tmp_path):
    proxy = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    others = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    (world,) = (demo[0] / "streetworld").glob("[!.]*")
    words = ["run", "jobs/demo.yaml", "seed=3", "stage=index", *TINY, f"dataset.root={world}", f"storage={tmp_path}"]
    done = clip2scene(*words, environment=others | proxy | {"no_proxy": "example.org"})
    assert done.returncode == 0, done.stderr[-3000:]


WAITS = """
import argparse, sys, time
from clip2scene import cli
from clip2scene.cluster.session import ray_session
from clip2scene.jobfile import load_job
from clip2scene.progress import progress
from clip2scene.tracking.tracker import connect

def wait(options):
    import ray
    tracker = connect(*sys.argv[1:])
    with ray_session(load_job("jobs/demo.yaml")), tracker.run("waits") as run, progress("waits", 2):
        run.set_tags({"waits": "yes"})
        ray.get(ray.remote(lambda: time.sleep(600)).remote())

cli._parsed = lambda _: argparse.Namespace(verb=wait)
sys.exit(cli.main())
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_its_status_and_its_run_as_killed(uri, kind):
    """SIGHUP comes from a terminal that closes, as when an SSH connection breaks."""
    experiment = f"ends by {kind.name}"
    tracker = connect(uri, experiment)
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, uri, experiment],
        cwd=REPOSITORY,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)

    def waits():
        while select.select([terminal], [], [], 0)[0]:
            os.read(terminal, 65536)  # or its progress bar would fill the buffer and block
        return tracker.find_run({"waits": "yes"})

    wait_until(waits, "its run is open", process=process)
    run_id = waits()
    time.sleep(1)  # until it waits for Ray
    if kind == signal.SIGTERM:
        process.terminate()
        assert process.wait(60) == 128 + kind
    os.close(terminal)
    assert process.wait(60) == 128 + kind
    assert client_of(uri).get_run(run_id).info.status == "KILLED"


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _interrupted_by([]):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.long
def test_a_distillation_killed_with_sigkill_goes_on_from_its_checkpoint(demo, tmp_path):
    storage = tmp_path / "demo-output"
    shutil.copytree(demo[0], storage, ignore=shutil.ignore_patterns("mlflow", "train", "students", "scores"))
    words = ["run", "jobs/demo.yaml", "seed=3", f"storage={storage}", "stage=distill", *TINY]
    words += ["distill.epochs=30", "resources.checkpoint_every_epochs=2"]
    driver = begin(log := tmp_path / "log", *words)
    written = "distill-*/checkpoint*/history.json"
    wait_until(lambda: list((storage / "train").glob(written)), "it has a checkpoint", 200, driver, log)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not list((storage / "students").glob("*.safetensors"))
    succeed(*words)
    assert len(list((storage / "students").glob("*.safetensors"))) == 1
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as database:
        rows = database.execute(
            "select run_uuid, step, value from metrics join runs using (run_uuid) "
            "where key = 'frames_per_second' and name = 'distill' order by start_time, step"
        ).fetchall()
        states = database.execute("select status, count(*) from runs group by status").fetchall()
    assert dict(states).keys() == {"FINISHED", "KILLED"}  # the second command closed what the first left open
    assert dict(states)["KILLED"] == 2
    killed, finished = ([row[1:] for row in rows if row[0] == run] for run in dict.fromkeys(row[0] for row in rows))
    assert [step for step, _ in finished] == list(range(1, 31))
    # Its first epochs are those of the killed run, with the speed that was measured there: they were not run again.
    known = killed[:2]  # or the first alone: it may be killed between the second checkpoint and its metrics
    assert known
    assert finished[: len(known)] == known


def test_index_and_inspect_follow_links_into_the_folders_that_they_are_given(streetworld_root, tmp_path):
    world, version = streetworld_root
    root, fast, index = tmp_path / "world", tmp_path / "fast", tmp_path / "index.parquet"
    root.mkdir()
    fast.symlink_to(world)
    for path in world.iterdir():
        (root / path.name).symlink_to(path)
    words = ["index", "nuscenes", "--root", root, "--version", version, "--output", index]
    for refused in (fail(*words), fail(*words, "--linked-folder", tmp_path / "other")):
        assert "leaves the dataset's root through a link, to " in refused
        assert refused.endswith("--linked-folder) allows other folders")
    succeed(*words, "--linked-folder", tmp_path / "other", "--linked-folder", fast)
    frame = read_index(index).frames[0].frame_id
    assert "leaves the dataset's root through a link" in fail("inspect", index, "--frame", frame)
    assert f"frame {frame}" in succeed("inspect", index, "--frame", frame, "--linked-folder", fast)


def test_inspect_shows_how_many_keyframes_it_has_read(streetworld_root, tmp_path):
    root, version = streetworld_root
    index = tmp_path / "index.parquet"
    succeed("index", "nuscenes", "--root", root, "--version", version, "--output", index)
    frames = [frame.frame_id for frame in read_index(index).frames]
    done = clip2scene("inspect", index)
    assert done.stderr.splitlines()[-1].startswith(f"inspect: {len(frames)}/{len(frames)} keyframes")
    assert done.stdout.count("frame ") == len(frames)
    assert clip2scene("inspect", index, "--frame", frames[0]).stderr == ""
