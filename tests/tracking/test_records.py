"""A table or a sweep that cannot be found or read: `clip2scene report` answers in one sentence."""

from __future__ import annotations

import re
import time

import pytest

from clip2scene.cli import main
from clip2scene.tracking import records
from clip2scene.tracking.tracker import connect


@pytest.fixture
def refused(capsys):
    """The sentence that `clip2scene report NAME` ends with."""

    def sentence(name, uri):
        assert main(["report", name, "--tracking-uri", uri]) == 1
        return capsys.readouterr().err

    return sentence


def test_a_server_that_does_not_answer_is_one_sentence_at_once(refused):
    began_s = time.monotonic()
    assert refused("table3", "http://127.0.0.1:1/") == "clip2scene: no MLflow server answers at http://127.0.0.1:1\n"
    assert time.monotonic() - began_s < 10


def test_only_a_server_can_be_read(refused, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sentence = f"clip2scene: --tracking-uri {uri}: must be the address of an MLflow server, http://HOST:PORT\n"
    assert refused("table3", uri) == sentence
    assert not list(tmp_path.iterdir())


def test_a_server_that_refuses_a_request_is_one_sentence(refused, uri, monkeypatch):
    monkeypatch.setattr(records, "_LATEST_FIRST", "no such order")
    error = refused("table3", uri)
    assert error.startswith(f"clip2scene: MLflow at {uri} cannot be read (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["it's", 'a "name"', "a`b"])
def test_quotation_marks_in_a_name_are_part_of_it(refused, uri, name):
    assert refused(name, uri).startswith(f"clip2scene: {name!r}: no sweep or table of that name in MLflow; ")
    tracker = connect(uri, "quoted")
    with tracker.run(name, tags={"stage": "sweep", "sweep": name}, system_metrics=False) as run:
        pass
    assert records.find(uri, "sweep", name).info.run_id == run.run_id


def test_a_mistyped_name_is_told_from_those_of_sweeps_and_tables(refused, uri):
    tracker = connect(uri, "mistyped")
    for kind, name in (("sweep", "warmth"), ("table", "table77")):
        with tracker.run(name, tags={"stage": kind, kind: name}, system_metrics=False):
            pass
    for mistyped, meant in (("wamrth", "warmth"), ("tabel77", "table77")):
        sentence = refused(mistyped, uri)
        # Other tests' are in the same MLflow.
        assert re.search(r"; sweeps there: .*warmth.*; tables there: .*table77.*; did you mean ", sentence)
        assert sentence.endswith(f"; did you mean {meant}?\n")


def test_more_runs_than_one_request_takes(uri, monkeypatch):
    monkeypatch.setattr(records, "_RUNS_PER_PAGE", 2)
    tracker = connect(uri, "paged")
    names = [f"run {number}" for number in range(5)]
    for name in names:
        with tracker.run(name, system_metrics=False):
            pass
    found = records.search_runs(uri, [tracker.experiment_id], "attributes.status = 'FINISHED'")
    assert [run.info.run_name for run in found] == names


def test_a_run_has_a_page_on_the_server_that_was_read_and_on_another():
    record = records.Record({}, "http://127.0.0.1:1", "7", "own", "unknown", 1_772_700_000_000)
    page = "/#/experiments/7/runs/one?workflowType=machine_learning"
    assert record.url("one") == f"http://127.0.0.1:1{page}"
    assert record.url("one", "http://ui") == f"http://ui{page}"
    assert record.day == "05 March 2026"
