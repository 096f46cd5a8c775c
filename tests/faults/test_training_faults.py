"""A training that is killed, or that loses a checkpoint, ends with the weights of an uninterrupted one.

"The same" is to the last bit: the order of keyframes and every random number come from seed, epoch and step alone, the
workers have one thread each, and a sum over two ranks has one order.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from clip2scene.config import ResourceSettings
from clip2scene.training.fit import fit
from clip2scene.training.launch import worker_group
from commands import tell_recovery, wait_until
from tiny_training import truncate

pytestmark = pytest.mark.long

EPOCHS = 4
TWO = ResourceSettings(num_workers=2, max_failures=1, cached_frames=8, checkpoint_every_epochs=1)


def run(training, folder, **callbacks):
    return fit(training, name="run", folder=folder, **callbacks)


def on_two(tiny):
    return tiny.distillation(epochs=EPOCHS, resources=TWO)


def assert_same(fitted, undisturbed):
    def numbers(history):
        return [{key: value for key, value in row.items() if key != "frames_per_second"} for row in history]

    assert numbers(fitted.history) == numbers(undisturbed.history)
    assert fitted.weights.keys() == undisturbed.weights.keys()
    assert all(torch.equal(fitted.weights[key], value) for key, value in undisturbed.weights.items())


def speeds(fitted):
    """Speeds are measured again when an epoch is trained again."""
    return [row["frames_per_second"] for row in fitted.history]


def checkpoints(folder):
    return sorted(path for path in (folder / "run").glob("checkpoint_*") if path.is_dir())


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    return run(tiny.distillation(epochs=EPOCHS), tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def undisturbed_on_two(tiny, tmp_path_factory, ray_cluster):
    folder = tmp_path_factory.mktemp("undisturbed-on-two")
    return folder, run(on_two(tiny), folder)


def tell_of_epoch(first_new, since_s=None):
    """An ``on_epoch`` that reports the time from the fault to the first epoch after it."""
    since_s = [time.monotonic()] if since_s is None else since_s

    def on_epoch(epoch, metrics):
        if epoch == first_new:
            tell_recovery(since_s[0])

    return on_epoch


DIES = """
import os, pickle, signal, sys
from pathlib import Path
from clip2scene.training import fit

whole, writes = fit._Learner.write, []

def write(learner, folder, history):
    writes.append(folder)
    if len(writes) < 3:
        return whole(learner, folder, history)
    (folder / "model.safetensors").write_bytes(b"the first bytes of it")
    os.kill(os.getpid(), signal.SIGKILL)

fit._Learner.write = write
training = pickle.loads(Path(sys.argv[1]).read_bytes())
fit.fit(training, name="run", folder=Path(sys.argv[2]))
"""


@pytest.mark.usefixtures("no_orphans")
def test_killed_while_it_writes_a_checkpoint(tiny, tmp_path, undisturbed):
    import pickle

    training = tiny.distillation(epochs=EPOCHS)
    (tmp_path / "training").write_bytes(pickle.dumps(training))
    killed = subprocess.run([sys.executable, "-c", DIES, tmp_path / "training", tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (half,) = (tmp_path / "run").glob(".checkpoint.*")
    assert [path.name for path in half.iterdir()] == ["model.safetensors"]
    history = json.loads((checkpoints(tmp_path)[-1] / "history.json").read_text())
    assert len(history) == 2

    again = run(training, tmp_path, on_epoch=tell_of_epoch(3))
    assert_same(again, undisturbed)
    assert speeds(again)[:2] == [row["frames_per_second"] for row in history]
    assert not list((tmp_path / "run").glob(".checkpoint.*"))
    assert len(checkpoints(tmp_path)) == 2


def stop_after(epochs):
    def on_epoch(epoch, metrics):
        if epoch == epochs:
            raise KeyboardInterrupt

    return on_epoch


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, undisturbed, capsys):
    training = tiny.distillation(epochs=EPOCHS)
    with pytest.raises(KeyboardInterrupt):
        run(training, tmp_path, on_epoch=stop_after(EPOCHS))
    before = checkpoints(tmp_path)
    truncate(before[-1] / "optimiser.pt")
    first = json.loads((before[0] / "history.json").read_text())
    again = run(training, tmp_path, on_epoch=tell_of_epoch(len(first) + 1))
    assert f"{before[-1]}: this checkpoint is damaged" in capsys.readouterr().err
    assert_same(again, undisturbed)
    assert speeds(again)[: len(first)] == [row["frames_per_second"] for row in first]


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers that descend from this test run."""
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if "RayTrainWorker" in process.name() or "RayTrainWorker" in _words(process)]


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_worker_killed_in_the_middle_of_an_epoch(tiny, tmp_path, undisturbed_on_two):
    _, undisturbed = undisturbed_on_two
    victims: list[int] = []
    steps: list[int] = []
    killed_at_s: list[float] = []

    def kill_in_epoch_three(count):
        steps.append(count)
        # At two steps per epoch, after five the third epoch is half done, and two have their checkpoints.
        if sum(steps) == 5 and not victims:
            workers = train_workers()
            assert len(workers) == 2
            victims.append(workers[-1].pid)
            killed_at_s.append(time.monotonic())
            workers[-1].send_signal(signal.SIGKILL)

    told = tell_of_epoch(3, killed_at_s)
    fitted = run(on_two(tiny), tmp_path, on_steps=kill_in_epoch_three, on_epoch=told)
    assert victims
    assert_same(fitted, undisturbed)
    # Ray Train returns a moment before its processes end.
    wait_until(lambda: not psutil.pid_exists(victims[0]) and not train_workers(), "its workers have ended", 20)


def test_two_workers_go_on_from_the_checkpoint_before_a_damaged_one(tiny, tmp_path, undisturbed_on_two, capsys):
    folder, undisturbed = undisturbed_on_two
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    truncate(checkpoints(tmp_path)[-1] / "model.safetensors")
    again = run(on_two(tiny), tmp_path)
    assert "this checkpoint is damaged" in capsys.readouterr().err
    assert_same(again, undisturbed)
    # Only the last epoch was trained again.
    assert speeds(again)[:-1] == speeds(undisturbed)[:-1]


def test_a_worker_killed_in_its_second_work_does_not_repeat_the_first(tiny, tmp_path, undisturbed_on_two):
    _, undisturbed = undisturbed_on_two
    heard: list[str] = []
    victims: list[int] = []

    def kill_in_epoch_three(epoch, metrics):
        heard.append(f"second {epoch}")
        if epoch == 2 and not victims:
            victims.extend(worker.pid for worker in train_workers())
            train_workers()[0].send_signal(signal.SIGKILL)

    training = on_two(tiny)
    with worker_group(TWO):
        first = run(training, tmp_path / "first", on_epoch=lambda epoch, _: heard.append(f"first {epoch}"))
        served_first = {worker.pid for worker in train_workers()}
        second = run(training, tmp_path / "second", on_epoch=kill_in_epoch_three)
        served_last = {worker.pid for worker in train_workers()}
    assert set(victims) == served_first
    assert not served_first & served_last
    assert heard == [f"{work} {epoch}" for work in ("first", "second") for epoch in range(1, EPOCHS + 1)]
    assert_same(first, undisturbed)
    assert_same(second, undisturbed)
    wait_until(lambda: not train_workers(), "its workers have ended", 20)
