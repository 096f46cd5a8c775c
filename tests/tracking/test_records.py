"""A table or a sweep that cannot be found or read: `clip2scene report` answers in one sentence."""

from __future__ import annotations

import re
import time

import pytest

from clip2scene.cli import main
from clip2scene.tracking import records
from clip2scene.tracking.run import client_of
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
    monkeypatch.setattr(records, "_RUNS_PER_PAGE", 10**9)
    error = refused("table3", uri)
    assert error.startswith(f"clip2scene: MLflow at {uri} cannot be read (")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["it's", 'a "name"', "a`b"])
def test_quotation_marks_in_a_name_are_part_of_it(refused, uri, name):
    assert refused(name, uri).startswith(f"clip2scene: {name!r}: no sweep or table of that name in MLflow; ")
    tracker = connect(uri, "quoted")
    with tracker.run(name, tags={"stage": "sweep", "sweep": name}, system_metrics=False) as run:
        pass
    assert [found.info.run_id for found in records.find_named(uri, name)] == [run.run_id]


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


def test_of_several_the_one_that_ran_last_comes_first(uri):
    tracker, client = connect(uri, "order"), client_of(uri)

    def ran(digest, run_id=None):
        tags = {"stage": "table", "table": "ordered", "digest": digest}
        with tracker.run("ordered-streetworld", run_id=run_id, tags=tags, system_metrics=False) as run:
            return run.run_id

    def order():
        return [run.info.run_id for run in records.find_named(uri, "ordered")]

    first, second = ran("first"), ran("second")
    assert order() == [second, first]
    assert ran("first", first) == first
    assert order() == [first, second]
    for run_id in (first, second):  # as earlier versions left them
        client.delete_tag(run_id, "process.opened")
    assert order() == [second, first]


def test_the_report_says_how_many_have_the_name_and_which_it_shows(uri, capsys):
    tracker = connect(uri, "named alike")
    about = {"format": "clip2scene-table-1", "table": "alike", "title": "A table", "dataset": "streetworld"}
    about |= {"paper_dataset": "nuscenes", "seeds": [0], "reference": "full", "columns": [], "cells": []}
    about |= {"machine": "2 cores", "command": "clip2scene run"}
    for dataset in ("nuscenes", "streetworld"):
        tags = {"stage": "table", "table": "alike"}
        with tracker.run(f"alike-{dataset}", tags=tags, system_metrics=False) as run:
            run.log_dict(about, "table.json")
    assert main(["report", "alike-streetworld", "--tracking-uri", uri]) == 0
    assert capsys.readouterr().err == ""
    assert main(["report", "alike", "--tracking-uri", uri]) == 0
    printed = capsys.readouterr()
    which = f"the one that ran last is shown (alike-streetworld, MLflow run {run.run_id})"
    assert printed.err == f"2 tables are named 'alike'; {which}\n"
    assert f"MLflow run: {run.run_id}" in printed.out


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
