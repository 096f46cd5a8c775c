"""The driver's record of Tune's events: numbers of trials, how a sweep ends, and how much of it is left."""

from __future__ import annotations

import io
import math
import pickle
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError
from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial
from rich.console import Console

from clip2scene import progress
from clip2scene.sweeps import journal
from clip2scene.sweeps.journal import HoursOverError, Journal, JournalCallback
from clip2scene.sweeps.progress import SweepProgress

TAU = "distill.scr.tau"


class TrialRun:
    """Replaces a trial's run in MLflow; ``held`` has the last epoch per trial that an earlier driver logged."""

    held: dict[int, int]
    ends: dict[int, tuple[str, dict[str, float], str]]

    def __init__(self, tracker, parent, sweep, number, job, variant):
        self.number, self.tau, self.epoch = number, job.distill.scr.tau, self.held.get(number, 0)

    def log_epoch(self, epoch, scores, metrics):
        self.epoch = max(self.epoch, epoch)

    def end(self, state, finals, reason):
        self.ends[self.number] = (state, dict(finals), reason)


@pytest.fixture
def printed(monkeypatch):
    """What the user sees."""
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", lambda: Console(file=text, width=200))
    return text


@pytest.fixture
def begin(load, monkeypatch, printed):
    """Make the journal of a sweep with ``TrialRun`` in place of MLflow's runs."""
    monkeypatch.setattr(journal, "TrialRun", TrialRun)
    monkeypatch.setattr(journal, "_current", [])
    TrialRun.held, TrialRun.ends = {}, {}

    def make(**space):
        shared = {"parameters": {TAU: {"grid": [0.1, 0.2, 0.3, 0.4]}}, "budget": {"epochs": 6}}
        sweep = load(**(shared | space))
        made = Journal(sweep, None, None, SweepProgress("test", "miou", len(sweep.trials), sweep.epochs), lambda: None)
        JournalCallback(made)
        return made

    return make


def tune_trial(ended=False, **about):
    """A trial as Tune passes it to callbacks."""
    return SimpleNamespace(is_finished=lambda: ended, **about)


def failed_trial(folder, number):
    """A trial of Tune's own, whose process has died."""
    trial = Trial("run_trial", stub=True, config={"trial": number}, storage=StorageContext(str(folder), "tune"))
    trial.init_local_path()
    trial.handle_error(RayActorError(error_msg="the process died"))
    return trial


def result(epoch, miou=0.5):
    return {"epoch": epoch, "objective": miou, "metrics": {"verifying/miou": miou}, "time_total_s": 2.0 * epoch}


def test_a_trial_keeps_its_number_whatever_order_tune_holds_trials_in(begin, ray_cluster, tmp_path):
    made = begin()
    trials = [tune_trial(config={"trial": number}) for number in (2, 0, 3, 1)]  # restored
    trials[2] = failed_trial(tmp_path, 3)
    callback = pickle.loads(pickle.dumps(JournalCallback()))
    for trial in trials:
        callback.on_trial_start(0, trials, trial)
        callback.on_trial_result(0, trials, trial, result(6, miou=trial.config["trial"] / 10))
    assert {number: run.tau for number, run in made._runs.items()} == {2: 0.3, 0: 0.1, 3: 0.4, 1: 0.2}
    callback.on_trial_error(0, trials, trials[2])
    for trial in trials[:2] + trials[3:]:
        callback.on_trial_complete(0, trials, trial)
    state, _, reason = TrialRun.ends.pop(3)
    assert (state, reason) == ("failed", "the process died")
    assert {state for state, _, _ in TrialRun.ends.values()} == {"finished"}
    assert {number: finals["miou"] for number, (_, finals, _) in TrialRun.ends.items()} == {2: 0.2, 0: 0.0, 1: 0.1}


def test_a_searchers_trials_are_numbered_as_they_were_suggested(begin):
    made = begin(parameters={TAU: {"uniform": [0.1, 1.0]}}, searcher="tpe", num_trials=3)
    suggested = {"3_tau=0.7": 0.7, "1_tau=0.2": 0.2}
    trials = [tune_trial(config={TAU: tau}, experiment_tag=tag) for tag, tau in suggested.items()]
    for trial in trials:
        JournalCallback().on_trial_start(0, trials, trial)
    assert {number: run.tau for number, run in made._runs.items()} == {2: 0.7, 0: 0.2}


def test_a_trial_whose_process_never_started_is_recorded_as_failed(begin, ray_cluster, tmp_path):
    begin()
    trials = [tune_trial(config={"trial": 0}), failed_trial(tmp_path, 1)]
    JournalCallback().on_trial_error(0, trials, trials[1])
    assert {number: state for number, (state, _, _) in TrialRun.ends.items()} == {1: "failed"}


def test_trials_that_the_budget_stops_keep_their_scores(begin):
    made = begin(budget={"epochs": 6, "hours": 1e-9})
    trials = [tune_trial(config={"trial": 0}), tune_trial(config={"trial": 1})]
    for trial, epochs in zip(trials, (6, 2), strict=True):
        JournalCallback().on_trial_start(0, trials, trial)
        JournalCallback().on_trial_result(0, trials, trial, result(epochs))
    with pytest.raises(HoursOverError):
        pickle.loads(pickle.dumps(JournalCallback())).on_step_begin(0, trials)
    made.pause()
    assert TrialRun.ends == {
        0: ("finished", {"epochs": 6, "seconds": 12.0, "miou": 0.5}, ""),
        1: ("paused", {"epochs": 2, "seconds": 4.0, "miou": 0.5}, ""),
    }


def test_hours_are_counted_from_this_drivers_start(begin):
    begin(budget={"epochs": 6, "hours": 1})
    JournalCallback().on_step_begin(0, [])
    begin()
    assert journal._current[0]._until_s == math.inf


@pytest.mark.parametrize("num_before", [0, 1])
def test_after_a_resume_old_epochs_are_not_shown_again_and_old_trials_are_not_left_to_do(begin, printed, num_before):
    TrialRun.held = {3: 5}
    begin()
    journal._current[0].num_before = num_before
    trials = [tune_trial(ended=place > 0, config={"trial": 3 - place}) for place in range(4 - num_before)]
    JournalCallback().on_trial_start(0, trials, trials[0])
    for epoch in range(1, 6):
        JournalCallback().on_trial_result(0, trials, trials[0], result(epoch))
    assert printed.getvalue().splitlines() == ["test: trial 03: starts: tau 0.4"]
    JournalCallback().on_trial_result(0, trials, trials[0], result(6))
    assert printed.getvalue().splitlines()[1].endswith("epoch 6/6, miou 50.0, at most 0.0 s left")
