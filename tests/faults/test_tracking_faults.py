"""A tracking server or its database goes away: nothing is lost or duplicated, and the work goes on."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from clip2scene.errors import TrackingError
from clip2scene.jobfile import load_job
from clip2scene.pipeline import Pipeline
from clip2scene.tracking.outbox import Outbox
from clip2scene.tracking.run import client_of
from clip2scene.tracking.sweep.record import read_sweep_run
from clip2scene.tracking.sweep.runs import FORMAT, TrialRun, sweep_run
from clip2scene.tracking.tracker import Tracker, connect
from commands import REPOSITORY, tell_recovery, wait_until
from servers import MlflowServer, write_metrics

OUTAGE_S = 30.0
WRITERS, STEPS, NAMES = 8, 40, ("loss", "scr", "stcr")


@pytest.fixture
def few_retries(monkeypatch):
    """With MLflow's own retries, tests would wait a minute for a server that stays away on purpose."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server, few_retries):
    """A server that the test may kill; the next test gets it running again."""
    one_server.start()
    return one_server


@pytest.fixture(scope="module")
def server_on_postgres(postgres, tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow-on-postgres"), postgres.uri)
    yield server
    server.kill()


@contextmanager
def writing_at_once(tracker: Tracker, count: int, steps: int) -> Iterator[list[Any]]:
    """Run that many processes, which start at the same time; all must succeed by the end of the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "servers"])
    barrier = context.Barrier(count)
    writers = [
        context.Process(target=write_metrics, args=(tracker, writer, barrier, NAMES, steps)) for writer in range(count)
    ]
    for writer in writers:
        writer.start()
    yield writers
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * count


def assert_all_kept(server: MlflowServer, tracker: Tracker, count: int, steps: int) -> None:
    runs = client_of(server.uri).search_runs([tracker.experiment_id])
    assert sorted(run.data.tags["writer"] for run in runs) == [str(writer) for writer in range(count)]
    for run in runs:
        writer = int(run.data.tags["writer"])
        assert run.info.status == "FINISHED"
        assert run.data.params == {"writer": str(writer)}
        for name in NAMES:
            assert server.metrics(run.info.run_id, name) == [(step, writer + step / 1000) for step in range(steps)]


@pytest.mark.usefixtures("no_orphans")
def test_eight_processes_write_to_postgres_at_once(server_on_postgres, tmp_path):
    tracker = connect(server_on_postgres.uri, "eight", tmp_path / "outbox")
    with writing_at_once(tracker, WRITERS, STEPS):
        pass
    assert_all_kept(server_on_postgres, tracker, WRITERS, STEPS)
    assert Outbox(tmp_path / "outbox").run_ids() == []


@pytest.mark.long
def test_postgres_crashes_and_starts_again_while_two_write(server_on_postgres, postgres, tmp_path):
    tracker = connect(server_on_postgres.uri, "restarted", tmp_path / "outbox")
    client = client_of(server_on_postgres.uri)

    def writing() -> bool:
        runs = client.search_runs([tracker.experiment_id])
        return len(runs) == 2 and all("loss" in run.data.metrics for run in runs)

    with writing_at_once(tracker, 2, 5 * STEPS) as writers:
        wait_until(writing, "both write")
        postgres.crash()
        crashed_at_s = time.monotonic()
        assert all(writer.is_alive() for writer in writers)
        postgres.start()
    tell_recovery(crashed_at_s)
    assert_all_kept(server_on_postgres, tracker, 2, 5 * STEPS)


@pytest.mark.long
def test_a_server_that_comes_back_in_time_is_not_noticed(server, tmp_path, capsys):
    tracker = connect(server.uri, "short outage", tmp_path / "outbox")
    with tracker.run("short", system_metrics=False) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        fault_at_s = time.monotonic()
        server.kill()
        back = threading.Timer(OUTAGE_S, server.start)
        back.start()
        run.log_metrics({"loss": 0.5}, step=2)
        tell_recovery(fault_at_s)
        back.join()
        run.log_metrics({"loss": 0.25}, step=3)
    assert server.metrics(run.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert not (tmp_path / "outbox").exists()
    assert capsys.readouterr().err == f"MLflow at {server.uri} does not answer; trying again for 60 s\n"


@pytest.mark.long
def test_what_is_written_during_a_long_outage_is_delivered_later_in_the_run(server, tmp_path, capsys):
    tracker = connect(server.uri, "long outage", tmp_path / "outbox", patience_s=0.1)
    with tracker.run("long", system_metrics=False) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        server.kill()
        run.log_metrics({"loss": 0.5}, step=2)
        run.set_tags({"student": "abc"})
        with pytest.raises(TrackingError, match=r"^cannot open the run 'child': MLflow at .* does not answer\. "):
            tracker.run("child", parent=run).__enter__()
        server.start()
        back_at_s = time.monotonic()
        run.log_metrics({"loss": 0.25}, step=3)
        tell_recovery(back_at_s)
        assert not Outbox(tmp_path / "outbox").holds(run.run_id)
        run.log_metrics({"loss": 0.125}, step=4)
    assert server.metrics(run.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25), (4, 0.125)]
    kept = client_of(server.uri).get_run(run.run_id)
    assert (kept.info.status, kept.data.tags["student"]) == ("FINISHED", "abc")
    assert "answers again and has what run" in capsys.readouterr().err


def write_while_away(server: MlflowServer, outbox: Path, folder: Path) -> str:
    """A run with a server that goes away for good during it; returns the run's id."""
    tracker = connect(server.uri, "away", outbox, patience_s=0.1)
    (folder / "student.txt").write_text("weights")
    with tracker.run("away", params={"a": 1}, system_metrics=False) as run:
        run.log_metrics({"loss": 1.0, "iou": math.nan}, step=1)
        server.kill()
        for step in range(2, 30):
            run.log_metrics({"loss": 1 / step, "iou": math.nan}, step=step)
        run.log_params({"a": 2, "b": 1})
        run.log_dataset("features", "0123456789abcdef", "/data", "training")
        run.log_artifact(folder / "student.txt", "student")
        run.log_dict({"miou": 0.5}, "report.json")
        run.log_metrics({"seconds": 3.0})
    (folder / "student.txt").unlink()
    return run.run_id


def assert_delivered(server: MlflowServer, run_id: str, folder: Path) -> None:
    client = client_of(server.uri)
    kept = client.get_run(run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"a": "1", "b": "1"}
    assert kept.data.tags["resumed.a"] == "2"
    assert server.metrics(run_id, "loss") == [(step, 1 / step) for step in range(1, 30)]
    assert len(server.metrics(run_id, "iou")) == 29
    assert server.metrics(run_id, "seconds") == [(0, 3.0)]
    assert len(kept.inputs.dataset_inputs) == 1
    assert Path(client.download_artifacts(run_id, "student/student.txt", str(folder))).read_text() == "weights"
    assert json.loads(Path(client.download_artifacts(run_id, "report.json", str(folder))).read_text()) == {"miou": 0.5}
    # A run's times are those when it was written, even if the server was away.
    times = [metric.timestamp for metric in client.get_metric_history(run_id, "loss")]
    assert times == sorted(times)
    assert times[-1] <= kept.info.end_time


DELIVERS = """
import os, signal, sys
from pathlib import Path
from clip2scene.tracking import outbox
from clip2scene.tracking.tracker import connect

make, made = outbox.make, []

def make_and_die(client, run_id, call):
    make(client, run_id, call)
    made.append(call)
    if len(made) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

outbox.make = make_and_die
connect(sys.argv[1], "away", Path(sys.argv[2]))
"""


@pytest.mark.long
@pytest.mark.usefixtures("no_orphans")
def test_the_next_command_delivers_what_was_left_and_may_be_killed_in_it(server, tmp_path, capsys):
    outbox = tmp_path / "outbox"
    run_id = write_while_away(server, outbox, tmp_path)
    assert f"run 'away': what MLflow did not accept is kept in {outbox}; the next command" in capsys.readouterr().err
    with (outbox / run_id / "calls.jsonl").open("a") as calls:
        calls.write('{"do": "metrics", "rows": [["lo')  # another writer was killed while it wrote a line
    count = (outbox / run_id / "calls.jsonl").read_text().count("\n")
    server.start()
    for after in (count // 2, count):
        command = [sys.executable, "-c", DELIVERS, server.uri, str(outbox), str(after)]
        assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
        assert Outbox(outbox).holds(run_id)
    back_at_s = time.monotonic()
    connect(server.uri, "next", outbox)
    tell_recovery(back_at_s)
    assert f"sent the pending writes of 1 run to MLflow at {server.uri}" in capsys.readouterr().err
    assert_delivered(server, run_id, tmp_path)
    assert [path.name for path in outbox.iterdir()] == [".lock"]
    connect(server.uri, "next", outbox)
    assert capsys.readouterr().err == ""


@pytest.mark.long
def test_runs_of_another_server_stay_in_the_outbox(server, tmp_path, capsys):
    outbox = Outbox(tmp_path / "outbox")
    outbox.append("f" * 32, {"do": "tags", "tags": {"a": "b"}})
    connect(server.uri, "other", outbox.folder)
    assert f"{'f' * 32}: MLflow at {server.uri} rejected these writes (" in capsys.readouterr().err
    assert outbox.run_ids() == ["f" * 32]


@pytest.mark.long
def test_a_job_whose_server_is_gone_at_its_end_ends_well(server, streetworld_root, tmp_path, capsys):
    class LosesItsServer(Pipeline):
        def _digests(self):
            server.kill()
            return super()._digests()

    root, version = streetworld_root
    words = ["stage=index", "dataset.kind=nuscenes", f"dataset.root={root}", f"dataset.version={version}"]
    job = load_job(REPOSITORY / "jobs" / "demo.yaml", [*words, f"storage={tmp_path}"])
    outbox = tmp_path / "outbox"
    report = LosesItsServer(job).run(connect(server.uri, "job", outbox, patience_s=0.1))
    assert json.loads((tmp_path / "report.json").read_text())["run_id"] == report["run_id"]
    assert "the next command delivers it" in capsys.readouterr().err

    server.start()
    Pipeline(job).run(connect(server.uri, "job", outbox))
    client = client_of(server.uri)
    first, second = (client.get_run(run_id) for run_id in (report["run_id"], client_run(server, "job", report)))
    assert {run.info.status for run in (first, second)} == {"FINISHED"}
    assert set(first.data.metrics) == set(second.data.metrics)
    for run in (first, second):
        assert "report.json" in {item.path for item in client.list_artifacts(run.info.run_id)}


@pytest.mark.long
def test_a_sweep_whose_server_is_away_at_its_end_waits_and_reads_all(server, tmp_path):
    job = load_job(REPOSITORY / "jobs" / "demo.yaml")
    tracker = connect(server.uri, "sweep", tmp_path / "outbox", patience_s=6.0)
    with sweep_run(tracker, "away", "digest", {"selection": "no labels"}) as parent:
        parent.log_dict({"format": FORMAT, "parameters": []}, "sweep.json")
        trial = TrialRun(tracker, parent, "away", 0, job, None)
        server.kill()
        trial.log_epoch(1, {"miou": 0.25}, {"loss": 2.0})
        trial.end("finished", {"miou": 0.25, "epochs": 1.0, "seconds": 3.0})
        impatient = dataclasses.replace(tracker, patience_s=0.0)
        sentence = (
            r"cannot read it: MLflow at .* does not answer. Finished work is kept; run the same command to resume"
        )
        with pytest.raises(TrackingError, match=sentence), impatient.synced("read it"):
            pass
        back = threading.Timer(1.0, server.start)
        back.start()
        with tracker.synced("read the sweep"):
            record = read_sweep_run(server.uri, parent.run_id)
        back.join()
    assert [trial.finals for trial in record.trials] == [{"miou": 0.25, "epochs": 1.0, "seconds": 3.0}]
    assert client_of(server.uri).get_run(record.trials[0].run_id).info.status == "FINISHED"


def client_run(server: MlflowServer, experiment: str, report: dict) -> str:
    """The job's other run."""
    tracker = connect(server.uri, experiment)
    runs = client_of(server.uri).search_runs([tracker.experiment_id], "tags.stage = 'pipeline'")
    (other,) = [run.info.run_id for run in runs if run.info.run_id != report["run_id"]]
    return other


NOW_S = 1_800_000_000


@pytest.mark.long
def test_a_clock_that_jumps_back_an_hour_keeps_the_order_of_epochs(server, tmp_path, monkeypatch):
    tracker = connect(server.uri, "clock", tmp_path / "outbox")
    with tracker.run("clock", system_metrics=False) as run:
        for epoch in range(1, 5):
            jumped = NOW_S + epoch - (3600 if epoch > 2 else 0)
            monkeypatch.setattr("clip2scene.tracking.run.time.time", lambda now_s=jumped: now_s)
            run.log_metrics({"loss": 1 / epoch}, step=epoch)
    monkeypatch.undo()
    history = client_of(server.uri).get_metric_history(run.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(epoch, 1 / epoch) for epoch in range(1, 5)]
    # The last value is that of the last step, not of the latest time.
    assert client_of(server.uri).get_run(run.run_id).data.metrics["loss"] == 1 / 4


@pytest.mark.long
def test_without_an_outbox_a_server_that_stays_away_is_one_sentence(server):
    tracker = connect(server.uri, "no outbox", patience_s=0.1)
    at_its_end = pytest.raises(TrackingError, match=r"did not take end of run \w+: it does not answer$")
    with at_its_end, tracker.run("no outbox", system_metrics=False) as run:
        with pytest.raises(TrackingError, match=r"refuses params of run \w+ \(.*a//b"):
            run.log_params({"a//b": 1})
        server.kill()
        with pytest.raises(TrackingError, match=r"did not take metrics of run \w+: it does not answer$"):
            run.log_metrics({"loss": 1.0})
        with pytest.raises(TrackingError, match=r"cannot look for a run: .* Finished work is kept"):
            tracker.find_run({"a": "b"})
