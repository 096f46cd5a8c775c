"""``clip2scene sweep`` as a user types it: one extraction, early stopping, retries, and a driver that is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from clip2scene.cli import main
from clip2scene.jobfile import load_job
from clip2scene.stages import Stages
from commands import begin, succeed, wait_for

WORLD = (
    "{train_scenes: 7, val_scenes: 1, keyframes_per_scene: 1, sweeps_before_first: 2, lidar_beams: 16, "
    "lidar_azimuth_steps: 180, image_width_px: 208, image_height_px: 112}"
)
IMAGES = 7 * 6
"""Images of the training scenes; a sweep does not use those of ``val``."""
JOB = {
    "name": "tiny",
    "dataset": {"kind": "streetworld", "streetworld": yaml.safe_load(WORLD)},
    "teacher": {"model": "streetworld", "image_height_px": 112, "image_width_px": 208},
    "extract": {"num_actors": 1},
    "student": {"voxel_size_m": 1.0, "channels": [8, 8, 16]},
    "distill": {"num_sweeps": 2, "optimiser": {"kind": "adamw", "learning_rate": 0.01}},
    "resources": {"checkpoint_every_epochs": 1},
}
SPACE = {
    "sweep": "tiny",
    "parameters": {"distill.scr.tau": {"loguniform": [0.1, 2.0]}, "distill.stcr.lambda": {"loguniform": [0.1, 10.0]}},
    "num_trials": 4,
    "seed": 3,
    "scheduler": {"grace_epochs": 1},
    "budget": {"epochs": 3},
    # All cores per trial, so that trials run one after another and the scheduler always sees the same reports.
    "resources": {"threads_per_worker": os.cpu_count()},
}


@dataclass(frozen=True)
class Run:
    """One row of MLflow's table of runs."""

    run_id: str
    name: str
    status: str
    tags: dict[str, str]
    metrics: dict[tuple[str, int], list[float]]

    def final(self, name: str) -> float:
        (value,) = self.metrics[f"final/{name}", 0]
        return value

    @property
    def doubled(self) -> dict[tuple[str, int], list[float]]:
        """Metrics with several values at one step."""
        return {place: values for place, values in self.metrics.items() if len(values) > 1}


def runs_of(server: Path) -> tuple[Run, list[Run]]:
    """The sweep's run, and its trials' runs by number, in the folder of an MLflow server."""
    with sqlite3.connect(server / "mlflow.db") as database:
        runs = []
        for run_id, name, status in database.execute("select run_uuid, name, status from runs").fetchall():
            tags = dict(database.execute("select key, value from tags where run_uuid = ?", (run_id,)))
            metrics: dict[tuple[str, int], list[float]] = {}
            query = "select key, step, value from metrics where run_uuid = ?"
            for key, step, value in database.execute(query, (run_id,)):
                metrics.setdefault((key, step), []).append(value)
            runs.append(Run(run_id, name, status, tags, metrics))
    (parent,) = (run for run in runs if (run.tags.get("stage"), run.tags.get("sweep")) == ("sweep", "tiny"))
    trials = [run for run in runs if run.tags.get("mlflow.parentRunId") == parent.run_id]
    return parent, sorted(trials, key=lambda run: int(run.tags["trial"]))


def written(folder: Path, **space: object) -> list[object]:
    """Write a space and a job into a folder, and return the words of the command that sweeps them."""
    for name, values in (("space", SPACE | space), ("job", JOB | {"storage": str(folder / "storage")})):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return ["sweep", folder / "space.yaml", "--job", folder / "job.yaml"]


def take_inputs(source: Path, storage: Path) -> None:
    """Copy the trials' inputs from another sweep's storage."""
    for name in ("streetworld", "indexes", "texts", "features"):
        shutil.copytree(source / name, storage / name)


def kill_trials(driver: subprocess.Popen[bytes]) -> None:
    """Kill the processes of the trials that run."""
    for process in psutil.Process(driver.pid).children(recursive=True):
        if process.is_running() and process.name().startswith("ray::ImplicitFunc"):
            process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, uri):
    """A finished sweep, kept by the tests' MLflow server: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    return folder, succeed(*written(folder), "--tracking-uri", uri)


def test_every_image_is_encoded_once_however_many_trials(undisturbed, mlflow_folder):
    parent, trials = runs_of(mlflow_folder)
    assert parent.metrics["images_encoded", 0] == [IMAGES]
    assert parent.metrics["images_wanted", 0] == [IMAGES]
    assert len(trials) == 4
    stores = list((undisturbed[0] / "storage" / "features").iterdir())
    assert [len(list((store / "frames").iterdir())) for store in stores] == [IMAGES / 6]


def test_trials_are_children_with_their_settings_and_an_objective_per_epoch(undisturbed, mlflow_folder):
    parent, trials = runs_of(mlflow_folder)
    assert parent.status == "FINISHED"
    assert parent.tags["selection"] == "labels of the verifying scenes"
    assert {trial.status for trial in trials} == {"FINISHED"}
    assert {trial.tags["state"] for trial in trials} == {"finished", "stopped"}
    for trial in trials:
        epochs = int(trial.final("epochs"))
        assert [step for key, step in sorted(trial.metrics) if key == "miou"] == list(range(1, epochs + 1))
        assert trial.metrics["miou", epochs] == [trial.final("miou")]
        assert {("train/loss", 1), ("label_free", 1), ("agreement", 1), ("consistency", 1)} <= set(trial.metrics)
    assert sum(trial.final("epochs") for trial in trials) == parent.metrics["epochs_run", 0][0] < 4 * 3


def test_the_best_job_runs_as_it_is(undisturbed, mlflow_folder):
    folder, printed = undisturbed
    best = folder / "storage" / "sweeps" / "tiny" / "best.yaml"
    assert f"clip2scene run {best}" in printed
    job = yaml.safe_load(best.read_text())
    parent, trials = runs_of(mlflow_folder)
    finished = max((t for t in trials if t.tags["state"] == "finished"), key=lambda trial: trial.final("miou"))
    assert f"trial {int(finished.tags['trial']):02d}" in best.read_text()
    assert job["distill"]["scr"]["tau"] != 0.5
    assert job["distill"]["epochs"] == SPACE["budget"]["epochs"]
    assert parent.metrics["best/miou", 0] == pytest.approx([finished.final("miou")])
    assert parent.tags["best_trial"] == f"{int(finished.tags['trial']):02d}"
    assert float(parent.tags["best.distill.scr.tau"]) == job["distill"]["scr"]["tau"]
    assert "clip2scene sweep" in parent.tags["mlflow.note.content"]
    assert len(Stages(load_job(best)).train_frames) == IMAGES // 6 - 1  # without the verifying scene


def test_a_finished_sweep_is_not_run_again_and_another_of_its_name_is_refused(undisturbed, mlflow_folder, uri, capsys):
    folder, printed = undisturbed
    before = runs_of(mlflow_folder)
    again = succeed(*written(folder), "--tracking-uri", uri)
    assert runs_of(mlflow_folder)[1] == before[1]
    assert again.splitlines()[:8] == printed.splitlines()[:8]
    assert main([str(word) for word in written(folder, seed=4)]) == 1
    assert "another sweep of this name" in capsys.readouterr().err


def test_a_driver_killed_with_sigkill_is_resumed_to_the_same_end(undisturbed, mlflow_folder, tmp_path, capsys):
    storage = tmp_path / "storage"
    take_inputs(undisturbed[0] / "storage", storage)
    # Tune saves its state after every event, so it restores its trials in another order: that of their last reports.
    environment = os.environ | {"TUNE_GLOBAL_CHECKPOINT_S": "0"}
    driver = begin(log := tmp_path / "log", *written(tmp_path), environment=environment)
    wait_for("trial 02: epoch 1/3", log, driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    printed = succeed("sweep", "--resume", "tiny", "--storage", storage)
    assert main(["report", "tiny", "--storage", str(storage)]) == 0
    assert capsys.readouterr().out.splitlines()[:8] == printed.splitlines()[:8]
    (_, expected), (parent, trials) = runs_of(mlflow_folder), runs_of(storage / "mlflow")
    assert parent.metrics["images_encoded", 0] == [0]
    assert [trial.tags["trial"] for trial in trials] == ["0", "1", "2", "3"]
    # One value per metric and step, equal to the last bit: one thread order, one seed, a checkpoint every epoch.
    assert [run.doubled for run in (parent, *trials)] == [{}] * 5
    for trial, other in zip(trials, expected, strict=True):
        assert trial.final("epochs") == other.final("epochs")
        assert trial.final("miou") == other.final("miou")
    best, best_expected = (
        (folder / "sweeps" / "tiny" / "best.yaml").read_text().splitlines()[2:]
        for folder in (storage, undisturbed[0] / "storage")
    )
    assert [line for line in best if "storage" not in line] == [line for line in best_expected if "storage" not in line]


@pytest.mark.long
def test_a_finished_sweep_is_extended_by_more_trials_and_an_interrupted_extension_goes_on(
    undisturbed, mlflow_folder, tmp_path
):
    storage = tmp_path / "storage"
    take_inputs(undisturbed[0] / "storage", storage)
    succeed(*written(tmp_path, num_trials=2))
    first = runs_of(storage / "mlflow")
    driver = begin(log := tmp_path / "log", *written(tmp_path))
    wait_for("trial 03: epoch 1/3", log, driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    printed = succeed("sweep", "--resume", "tiny", "--storage", storage)
    (_, expected), (parent, trials) = runs_of(mlflow_folder), runs_of(storage / "mlflow")
    assert parent.run_id == first[0].run_id
    assert trials[:2] == first[1]
    assert [trial.doubled for trial in trials] == [{}] * 4
    # The scheduler knew what the first two had reported, so all is as if four had been asked for at once.
    for trial, other in zip(trials, expected, strict=True):
        assert (trial.final("epochs"), trial.final("miou")) == (other.final("epochs"), other.final("miou"))
    assert "search: 4 trials" in printed
    assert [parent.metrics[name, 0][-1] for name in ("trials", "trials_left")] == [4, 0]
    assert "trial 02: starts" in log.read_text()
    assert not any(f"trial {number:02d}: starts" in log.read_text() for number in (0, 1))
    assert succeed(*written(tmp_path)).splitlines()[:8] == printed.splitlines()[:8]
    assert runs_of(storage / "mlflow")[1] == trials


@pytest.mark.long
def test_a_sweep_pauses_when_its_hours_are_over_and_goes_on_with_the_same_command(undisturbed, tmp_path):
    storage = tmp_path / "storage"
    take_inputs(undisturbed[0] / "storage", storage)
    words = written(tmp_path, scheduler={"kind": "none"}, budget={"epochs": 500, "hours": 30 / 3600})
    epochs = []
    for attempt in range(2):
        printed = succeed(*words)
        parent, trials = runs_of(storage / "mlflow")
        assert parent.status == "FINISHED"
        assert [(trial.tags["state"], trial.status) for trial in trials] == [("paused", "KILLED")]
        assert "4 of 4 trials failed or lacked time (budget.hours); the same command goes on with them" in printed
        epochs.append(trials[0].metrics["so_far/epochs", 0][attempt])
        assert trials[0].metrics["so_far/miou", 0][attempt] == trials[0].metrics["miou", int(epochs[-1])][0]
        assert parent.metrics["epochs_run", 0][attempt] == epochs[-1]
        assert (storage / "sweeps" / "tiny" / "best.yaml").is_file()
    assert 0 < epochs[0] < epochs[1] < 500
    # It went on from its checkpoint: each epoch is there once.
    assert [step for key, step in sorted(trials[0].metrics) if key == "miou"] == list(range(1, int(epochs[1]) + 1))
    assert not any(key == "miou" for key, _ in trials[0].doubled)


@pytest.mark.long
def test_a_trial_that_failed_goes_on_with_the_same_command(undisturbed, mlflow_folder, tmp_path):
    storage = tmp_path / "storage"
    take_inputs(undisturbed[0] / "storage", storage)
    never_again = SPACE["resources"] | {"max_failures": 0}
    words = written(tmp_path, num_trials=2, scheduler={"kind": "none"}, resources=never_again)
    driver = begin(log := tmp_path / "log", *words)
    wait_for("trial 00: epoch 1/3", log, driver)
    kill_trials(driver)
    assert driver.wait(240) == 1, log.read_text()[-3000:]
    parent, trials = runs_of(storage / "mlflow")
    assert [trial.tags["state"] for trial in trials] == ["failed", "finished"]
    assert "1 of 2 trials failed or lacked time (budget.hours); the same command goes on with them" in log.read_text()
    checkpoints = storage / "sweeps" / "tiny" / "trials"
    assert checkpoints.is_dir()
    succeed(*words)
    again, trials = runs_of(storage / "mlflow")
    assert (again.run_id, again.status) == (parent.run_id, "FINISHED")
    assert [(trial.status, trial.tags["state"]) for trial in trials] == [("FINISHED", "finished")] * 2
    assert [trial.doubled for trial in trials] == [{}] * 2
    assert trials[0].final("miou") == runs_of(mlflow_folder)[1][0].final("miou")
    assert not checkpoints.exists()


@pytest.mark.long
def test_a_trial_that_dies_is_tried_again_and_one_that_diverges_is_no_failure(undisturbed, tmp_path):
    storage = tmp_path / "storage"
    take_inputs(undisturbed[0] / "storage", storage)
    variants = {"as it is": {}, "wild": {"distill.optimiser.learning_rate": 1e30}}
    words = written(
        tmp_path,
        parameters={},
        variants=variants,
        num_trials=1,
        scheduler={"kind": "none"},
        metric="label_free",
        labels=False,
    )
    driver = begin(log := tmp_path / "log", *words)
    wait_for("trial 00: epoch 1/3", log, driver)
    kill_trials(driver)
    assert driver.wait(240) == 0, log.read_text()[-3000:]
    assert log.read_text().count("trial 00: starts") == 2
    parent, (kept, diverged) = runs_of(storage / "mlflow")
    assert (kept.tags["state"], diverged.tags["state"]) == ("finished", "diverged")
    assert [step for key, step in sorted(kept.metrics) if key == "label_free"] == [1, 2, 3]
    assert kept.doubled == {}
    assert "the loss is not finite after epoch 1" in diverged.tags["reason"]
    assert ("final/label_free", 0) not in diverged.metrics
    assert parent.tags["selection"] == "no labels"
    assert not any(key == "miou" for run in (kept, diverged) for key, _ in run.metrics)
