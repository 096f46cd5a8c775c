"""A sweep that is kept and resumed, and what a trial does."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from clip2scene.errors import ConfigError
from clip2scene.stages import Stages
from clip2scene.storage import locked
from clip2scene.sweeps import runner
from clip2scene.sweeps import trial as trials
from clip2scene.sweeps.runner import recall, remember, run_sweep
from clip2scene.teacher.extract import ExtractReport
from clip2scene.tracking.sweep import runs as sweep_runs
from clip2scene.tracking.tracker import Tracker, connect

TAU, LAMBDA = "distill.scr.tau", "distill.stcr.lambda"
ONE_TRIAL = {"parameters": {TAU: {"grid": [0.5]}}}


PATHS = {
    "storage": "store",
    "dataset": {"kind": "streetworld", "root": "world", "linked_folders": ["fast", "/data"]},
    "teacher": {"model": "ViT-B-16", "pretrained": "~/clip.pt"},
    "finetune": {"checkpoint": "student.safetensors"},
}


def test_a_kept_sweep_can_be_resumed_from_any_folder(load, tmp_path, monkeypatch):
    space = {"parameters": {TAU: {"uniform": [0.1, 1.0]}, LAMBDA: {"uniform": [0.1, 1.0]}}, "num_trials": 3}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    begun = remember(load(**space, job=PATHS), "the command", "http://mlflow")
    again = remember(load(**space, job=PATHS, title="other"), "", None)
    assert (again.sweep.digest, again.sweep.space.title) == (begun.sweep.digest, "other")
    assert (again.id, again.command, again.tracking_uri) == (begun.id, "the command", "http://mlflow")
    # Trials are numbered by the order of the kept keys, whatever order the file has now.
    turned = {"parameters": dict(reversed(space["parameters"].items())), "num_trials": 3, "budget": {"hours": 2}}
    again = remember(load(**turned, job=PATHS), "", None)
    assert (again.sweep.trials, again.sweep.space.budget.hours) == (begun.sweep.trials, 2)
    monkeypatch.chdir(tmp_path.parent)
    kept = recall(begun.folder)
    assert (kept, kept.sweep.digest) == (begun, begun.sweep.digest)
    held = kept.sweep
    assert (held.job.storage, held.job.dataset.root) == (str(tmp_path / "store"), str(tmp_path / "world"))
    assert held.job.dataset.linked_folders == (str(tmp_path / "fast"), "/data")
    assert (held.job.teacher.model, held.job.teacher.pretrained) == ("ViT-B-16", str(tmp_path / "home" / "clip.pt"))
    assert held.job.finetune.checkpoint == str(tmp_path / "student.safetensors")
    other = space | {"seed": 1, "parameters": {TAU: {"choice": [0.1, 1.0]}, LAMBDA: {"uniform": [0.1, 1.0]}}}
    differing = rf"parameters\.{TAU}\.choice=\[0\.1, 1\.0\] \(there null\), parameters\.{TAU}\.uniform=null \(there "
    with pytest.raises(
        ConfigError, match=rf"other settings: {differing}\[.*\]\), seed=1 \(there 0\), job\.seed=6 \(there 5"
    ):
        remember(load(**other, job=PATHS | {"storage": held.job.storage, "seed": 6}), "", None)
    elsewhere = remember(load(**space, job=PATHS | {"storage": str(tmp_path / "other")}), "", None)
    assert elsewhere.id != begun.id


def test_more_trials_are_added_to_a_random_search_only(load, tmp_path):
    job = PATHS | {"storage": str(tmp_path)}
    draws = {"parameters": {TAU: {"uniform": [0.1, 1.0]}}, "seeds": [1, 2]}
    first = remember(load(**draws, num_trials=2, job=job), "first", None)
    more = remember(load(**draws, num_trials=3, job=job), "more", None)
    assert (more.id, more.folder, more.extended_from, more.command) == (first.id, first.folder, (4,), "more")
    assert (len(more.sweep.trials), more.sweep.trials[:4]) == (6, first.sweep.trials)
    assert recall(first.folder) == more == remember(load(**draws, num_trials=3, job=job), "", None)
    assert remember(load(**draws, num_trials=5, job=job), "", None).extended_from == (4, 6)
    with pytest.raises(
        ConfigError, match=r"num_trials=4 \(there 5\); only a larger num_trials .* adds trials; give anot"
    ):
        remember(load(**draws, num_trials=4, job=job), "", None)
    with pytest.raises(ConfigError, match=r"num_trials=6 \(there 5\), seed=1 \(there 0\)"):
        remember(load(**draws, num_trials=6, seed=1, job=job), "", None)
    two = {"first": {"distill.stcr.weight": 0.0}, "second": {}}
    for name, changes in {"tpe": {"searcher": "tpe", "seeds": []}, "variants": {"variants": two}}.items():
        remember(load(**draws | changes | {"sweep": name}, num_trials=2, job=job), "", None)
        with pytest.raises(ConfigError, match="searcher=random, no grid and no variants adds trials"):
            remember(load(**draws | changes | {"sweep": name}, num_trials=3, job=job), "", None)


def test_a_sweep_does_not_continue_on_a_server_that_lacks_its_trials(load, uri, tmp_path):
    kept = remember(load(**ONE_TRIAL, job=PATHS | {"storage": str(tmp_path)}), "", "http://mlflow:5000")
    (kept.folder / "tune").mkdir()
    (kept.folder / "tune" / "tuner.pkl").touch()
    sentence = r"sweep 'test': its trials are not on MLflow at .*began on \(--tracking-uri http://mlflow:5000\)"
    with pytest.raises(ConfigError, match=sentence):
        run_sweep(kept, connect(uri, "sweeps"))


def test_a_second_driver_waits_for_the_first(load, tmp_path, monkeypatch):
    kept = remember(load(**ONE_TRIAL, job=PATHS | {"storage": str(tmp_path)}), "", None)
    begun = threading.Event()

    def begin(*_):
        begun.set()
        raise ConfigError("first")

    monkeypatch.setattr(runner, "_sweep_run", begin)
    with ThreadPoolExecutor(1) as pool:
        with locked(kept.folder):
            second = pool.submit(run_sweep, kept, Tracker("", "0"))
            assert not begun.wait(0.5)
        assert str(second.exception(timeout=60)) == "first"


def test_absolute_paths_change_nothing_else(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load(
        variants={"paper": {"variant": "paper"}, "as it is": {}},
        touches_features=True,
        job=PATHS | {"variant": "released"},
    )
    before = copy.deepcopy(sweep.job_values)
    kept = remember(sweep, "", None).sweep
    assert sweep.job_values == before
    normalised = {trial.variant: kept.job_of(trial).teacher.clip_normalisation for trial in kept.trials}
    assert normalised == {"paper": True, "as it is": False}


def test_a_window_that_any_trial_may_draw_must_be_indexed(load, streetworld_root, tmp_path, monkeypatch):
    root, version = streetworld_root
    data = {"kind": "nuscenes", "root": str(root), "version": version, "max_sweeps": 3}

    def prepare(longest_s: float) -> None:
        window = {"distill.sweep_window_s": {"uniform": [0.1, longest_s]}}
        job = {"dataset": data, "storage": str(tmp_path)}
        sweep = load(parameters=window, searcher="tpe", metric="agreement", labels=False, job=job)
        runner._prepare(sweep, tmp_path)

    extracted = []
    monkeypatch.setattr(Stages, "make_inputs", lambda stages: extracted.append(stages) or ExtractReport(0, 0, ()))
    with pytest.raises(ConfigError, match=r"sweep_window_s=0\.5: the 3 indexed .*dataset\.max_sweeps=4 is needed"):
        prepare(0.5)
    assert not extracted
    prepare(0.375)
    assert len(extracted) == 1


def test_a_trial_frees_the_teacher_before_it_trains(load, tmp_path, monkeypatch):
    @dataclass
    class Distillation:
        validation: object = None

    class Stages:
        def __init__(self, job):
            held.append(weakref.ref(self))

        def validation(self, every_epochs, *, labels):
            return "validation"

        def distillation(self):
            return Distillation()

    def fit(training, **about):
        fitted.append((training.validation, held[0]()))

    held, fitted = [], []
    monkeypatch.setattr(trials, "Stages", Stages)
    monkeypatch.setattr(trials, "fit", fit)
    work = trials.TrialWork(load(**ONE_TRIAL), tmp_path, labels=True)
    monkeypatch.setattr(trials.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "0"))
    trials.run_trial({"trial": 0}, work)
    assert fitted == [("validation", None)]


@pytest.mark.parametrize("answers", [False, True])
def test_an_error_is_raised_even_if_mlflow_is_down_at_the_end(answers, monkeypatch):
    from mlflow.exceptions import MlflowException

    def search_runs(*_, **__):
        raise MlflowException("away")

    tracker = Tracker("http://127.0.0.1:1", "0")
    monkeypatch.setattr(Tracker, "find_run", lambda self, tags: None)
    monkeypatch.setattr(Tracker, "run", lambda self, name, **_: contextlib.nullcontext(SimpleNamespace(run_id="1")))
    monkeypatch.setattr("clip2scene.tracking.tracker.healthy", lambda uri: answers)
    monkeypatch.setattr("clip2scene.tracking.tracker.client_of", lambda uri: SimpleNamespace(search_runs=search_runs))
    with pytest.raises(ValueError, match="first"), sweep_runs.sweep_run(tracker, "test", "digest", {}):
        raise ValueError("first")
    with sweep_runs.sweep_run(tracker, "test", "digest", {}):
        pass
