from __future__ import annotations

import json
import math
import multiprocessing
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest

from clip2scene.config import DistillSettings
from clip2scene.errors import ConfigError, TrackingError
from clip2scene.tracking import provenance
from clip2scene.tracking.provenance import git_revision, is_gone, origin_tags, process_tags, user_name
from clip2scene.tracking.run import Run, client_of, flatten
from clip2scene.tracking.tracker import Tracker, connect
from commands import wait_until


@pytest.fixture(scope="module")
def tracker(uri):
    return connect(uri, "tests")


@pytest.fixture(scope="module")
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def test_nested_runs_are_read_back(tracker, client):
    with (
        tracker.run("pipeline", tags={"stage": "pipeline"}) as parent,
        tracker.run("distill", parent=parent, params={"distill": {"epochs": 3}}, tags={"stage": "distill"}) as run,
    ):
        assert client.get_run(run.run_id).info.status == "RUNNING"
        for epoch in range(3):
            run.log_metrics({"loss": 1.0 / (epoch + 1), "iou/car": math.nan, "worst": math.inf}, step=epoch)
        run.log_dataset("streetworld v1.0-trainval", "0123456789abcdef", "/data/world", "training")
        run.log_text("hello\n", "notes/hello.txt")
        run.log_dict({"miou": 0.5}, "report.json")

    kept = client.get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == "distill"
    assert kept.data.params == {"distill.epochs": "3"}
    assert kept.data.tags["mlflow.parentRunId"] == parent.run_id
    assert kept.data.tags["stage"] == "distill"
    assert kept.data.tags["git_revision"] == git_revision()
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run.run_id, "loss")]
    assert losses == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert math.isnan(kept.data.metrics["iou/car"])
    assert math.isnan(kept.data.metrics["worst"])
    (used,) = kept.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("streetworld v1.0-trainval", "0123456789abcdef")
    assert json.loads(used.dataset.source) == {"uri": "/data/world"}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    assert sorted(item.path for item in client.list_artifacts(run.run_id)) == ["notes", "report.json"]
    assert [item.path for item in client.list_artifacts(run.run_id, "notes")] == ["notes/hello.txt"]


def test_many_runs_name_a_new_dataset_at_the_same_moment(uri):
    tracker, together = connect(uri, "dataset"), threading.Barrier(8)

    def log(digest):
        with tracker.run("run", system_metrics=False) as run:
            together.wait(timeout=60)
            run.log_dataset("nuscenes", digest, "/data", "training")
        return client_of(uri).get_run(run.run_id).inputs.dataset_inputs

    with ThreadPoolExecutor(8) as pool:
        for digest in map(str, range(5)):
            assert [len(inputs) for inputs in pool.map(log, [digest] * 8)] == [1] * 8


def test_figures_and_files_are_artifacts(tracker, client, tmp_path):
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2, 1), dpi=50, facecolor="#ff0000")
    (tmp_path / "scores.json").write_text("{}")
    with tracker.run("figures", system_metrics=False) as run:
        run.log_figure(figure, "figures/red.png")
        run.log_artifact(tmp_path / "scores.json", "tables")
    path = client.download_artifacts(run.run_id, "figures/red.png", str(tmp_path))
    with Image.open(path) as image:
        assert image.size == (100, 50)
        assert np.asarray(image.convert("RGB"))[25, 50].tolist() == [255, 0, 0]
    assert [item.path for item in client.list_artifacts(run.run_id, "tables")] == ["tables/scores.json"]


def test_a_resumed_run_keeps_its_id_and_its_first_parameters(tracker, client):
    with tracker.run("finetune", params={"a": 1}, tags={"digest": "d1"}, system_metrics=False) as first:
        first.log_metrics({"loss": 2.0}, step=0)
    assert tracker.find_run({"digest": "d1"}) == first.run_id
    assert tracker.find_run({"digest": "d2"}) is None
    params = {"a": 2, "b": [1, 2]}
    with tracker.run("finetune", run_id=first.run_id, params=params, system_metrics=False) as second:
        second.log_metrics({"loss": 1.0}, step=1)
    assert second == first
    kept = client.get_run(first.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"a": "1", "b": "[1, 2]"}
    assert kept.data.tags["resumed.a"] == "2"
    assert [metric.value for metric in client.get_metric_history(first.run_id, "loss")] == [2.0, 1.0]


def test_more_parameters_and_metrics_than_one_request_takes(tracker, client):
    with tracker.run("many", params={f"p{i:03}": i for i in range(250)}, system_metrics=False) as run:
        run.log_metrics({f"m{i:04}": float(i) for i in range(1500)})
    kept = client.get_run(run.run_id).data
    assert len(kept.params) == 250
    assert len(kept.metrics) == 1500


def test_a_parameter_that_mlflow_would_cut_is_refused(tracker):
    with (
        tracker.run("long", system_metrics=False) as run,
        pytest.raises(ConfigError, match=r"^list\.x: 6001 characters"),
    ):
        run.log_params({"list": {"x": "x" * 6001}})


def test_a_failed_run_is_marked_with_its_error(tracker, client):
    runs = []

    def fail(error):
        with tracker.run("fails", system_metrics=False) as run:
            runs.append(run)
            raise error

    with pytest.raises(RuntimeError, match="no more\nmemory"):
        fail(RuntimeError("no more\nmemory"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    failed, killed = (client.get_run(run.run_id) for run in runs)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["error"] == "RuntimeError: no more memory"
    assert killed.info.status == "KILLED"
    with tracker.run("fails", run_id=runs[0].run_id, system_metrics=False):
        pass
    assert "error" not in client.get_run(runs[0].run_id).data.tags


def _write(run: Run, writer: int) -> None:
    for step in range(10):
        run.log_metrics({f"writer{writer}/{name}": float(step) for name in ("a", "b")}, step=step)


def test_four_processes_write_to_one_run(tracker, client):
    with tracker.run("shared", system_metrics=False) as run:
        context = multiprocessing.get_context("spawn")
        writers = [context.Process(target=_write, args=(run, writer)) for writer in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    for writer in range(4):
        for name in ("a", "b"):
            history = client.get_metric_history(run.run_id, f"writer{writer}/{name}")
            assert [(metric.step, metric.value) for metric in history] == [(step, float(step)) for step in range(10)]


def test_system_metrics_are_kept_while_the_run_is_open(tracker, client, monkeypatch):
    monkeypatch.setattr("clip2scene.tracking.tracker.SYSTEM_METRICS_INTERVAL_S", 0.1)
    with tracker.run("system") as run:
        (monitor,) = [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]
        monitor.join(1.0)
    metrics = client.get_run(run.run_id).data.metrics
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(metrics)
    assert not monitor.is_alive()


def test_concurrent_connections_make_one_experiment(uri):
    found: list[Tracker] = []
    threads = [threading.Thread(target=lambda: found.append(connect(uri + "/", "raced"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({tracker.experiment_id for tracker in found}) == 1


def test_handles_pickle(tracker):
    run = Run(tracker.uri, "0" * 32)
    assert pickle.loads(pickle.dumps((tracker, run))) == (tracker, run)


def test_wrong_addresses_and_runs(tracker, uri, client):
    with pytest.raises(ConfigError, match="must be the address of an MLflow server"):
        connect("sqlite:///mlflow.db", "x")
    with pytest.raises(TrackingError, match=r"no MLflow server answers at http://127\.0\.0\.1:1$"):
        connect("http://127.0.0.1:1", "x")
    with pytest.raises(TrackingError, match="knows no run"):
        tracker.run("x", run_id="f" * 32).__enter__()
    client.delete_experiment(connect(uri, "deleted").experiment_id)
    with pytest.raises(ConfigError, match="'deleted' was deleted"):
        connect(uri, "deleted")


LEFT = """
import os, signal, sys
from clip2scene.tracking.tracker import connect
tracker = connect(*sys.argv[1:])
with tracker.run("left", system_metrics=False) as run, tracker.run("below", parent=run, system_metrics=False):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_runs_of_a_process_that_was_killed_are_closed_and_no_others(uri, client, monkeypatch):
    tracker = connect(uri, "left open")

    def states():
        return {run.info.run_name: run.info.status for run in client.search_runs([tracker.experiment_id])}

    assert subprocess.run([sys.executable, "-c", LEFT, uri, "left open"], check=False).returncode == -signal.SIGKILL
    with tracker.run("continued", system_metrics=False) as continued:
        client.set_tag(continued.run_id, "process.pid", "1")  # as if another process had begun it
    with (
        tracker.run("open", system_metrics=False),
        tracker.run("continued", run_id=continued.run_id, system_metrics=False),
    ):
        left = {"left": "RUNNING", "below": "RUNNING", "open": "RUNNING", "continued": "RUNNING"}
        for elsewhere in ("socket.gethostname", "clip2scene.tracking.provenance.user_name"):
            with monkeypatch.context() as patch:
                patch.setattr(elsewhere, lambda: "somebody else")
                tracker.close_lost()
            assert states() == left
        tracker.close_lost()
        assert states() == left | {"left": "KILLED", "below": "KILLED"}


def test_a_process_with_the_number_of_one_that_is_gone_is_another():
    tags = origin_tags() | process_tags()
    assert not is_gone(tags)
    assert is_gone(tags | {"process.started": str(float(tags["process.started"]) - 3600)})
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "the child ends")
    started = psutil.Process(child.pid).create_time()
    assert is_gone(tags | {"process.pid": str(child.pid), "process.started": str(started)})
    child.wait()


def test_flatten_settings():
    flat = flatten({"distill": DistillSettings(epochs=3).model_dump(mode="json", by_alias=True), "sizes": (1, 2)})
    assert flat["distill.epochs"] == "3"
    assert flat["distill.stcr.lambda"] == "1.0"
    assert flat["distill.max_steps"] == "null"
    assert flat["distill.augment.flip"] == "true"
    assert flat["distill.s3.granularity"] == "point"
    assert flat["sizes"] == "[1, 2]"


def test_git_revision(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path)
    revision = git_revision.__wrapped__
    assert revision() == "unknown"
    git("init")
    assert revision() == "unknown"
    git("commit", "--allow-empty", "-m", "first")
    assert revision() == "unknown"  # of another project, whose checkout holds the environment that holds this package
    (tmp_path / "__init__.py").touch()
    git("add", "__init__.py")
    git("commit", "-m", "second")
    commit = revision()
    assert len(commit) == 40
    (tmp_path / "own_job.yaml").touch()
    assert revision() == commit
    (tmp_path / "__init__.py").write_text("changed = True\n")
    assert revision() == f"{commit}-dirty"
    (tmp_path / "REVISION").write_text("1234-dirty\n")
    assert revision() == "1234-dirty"


def test_a_container_whose_user_has_no_name(monkeypatch):
    def no_name():
        raise KeyError("getpwuid(): uid not found: 1000")

    monkeypatch.setattr("getpass.getuser", no_name)
    assert user_name() is None
    assert "mlflow.user" not in origin_tags()
