"""Search spaces: what they may vary, their trials, how a sweep is kept, and the messages for mistakes."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from clip2scene.config import ConfigError
from clip2scene.sweeps import trial as trials
from clip2scene.sweeps.runner import recall, remember
from clip2scene.sweeps.scheduler import scheduler_of
from clip2scene.sweeps.slots import trial_slots
from clip2scene.sweeps.space import TrialResources
from clip2scene.sweeps.sweep import load_sweep
from clip2scene.tracking import sweep_runs
from clip2scene.tracking.tracker import Tracker
from commands import REPOSITORY

JOB = {"name": "job", "seed": 5, "dataset": {"kind": "streetworld"}, "teacher": {"model": "streetworld"}}
TAU, LAMBDA, GRID = "distill.scr.tau", "distill.stcr.lambda", "distill.stcr.grid_size_m"


@pytest.fixture
def load(tmp_path):
    """Load a sweep of a space given as keys."""

    def made(*overrides: str, job=JOB, **space):
        for name, values in (("space", {"sweep": "test", **space}), ("job", job)):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return load_sweep(tmp_path / "space.yaml", tmp_path / "job.yaml", overrides)

    return made


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("job", ["demo", "nuscenes"])
def test_every_space_in_the_repository_fits_the_jobs(path, job):
    overrides = ["job.dataset.root=/data/nuscenes"] if job == "nuscenes" else []
    sweep = load_sweep(path, REPOSITORY / "jobs" / f"{job}.yaml", overrides)
    assert sweep.space.sweep == path.stem
    assert len({sweep.job_of(trial).digest() for trial in sweep.trials}) == (
        1 if sweep.space.searcher == "tpe" else len(sweep.trials)
    )


def test_draws_are_in_bounds_and_the_same_every_time(load):
    keys = {
        TAU: {"loguniform": [0.1, 2.0]},
        GRID: {"uniform": [0.5, 1.0]},
        "distill.num_sweeps": {"randint": [1, 3]},
        "distill.scr.form": {"choice": ["equation", "cross_entropy"]},
    }
    trials = load(parameters=keys, num_trials=200).trials
    assert trials == load(parameters=keys, num_trials=200).trials
    assert trials != load(parameters=keys, num_trials=200, seed=1).trials
    assert all(0.1 <= trial.values[TAU] <= 2.0 and 0.5 <= trial.values[GRID] <= 1.0 for trial in trials)
    assert {trial.values["distill.num_sweeps"] for trial in trials} == {1, 2, 3}
    assert {trial.values["distill.scr.form"] for trial in trials} == {"equation", "cross_entropy"}
    below_the_middle = sum(trial.values[TAU] < math.sqrt(0.1 * 2.0) for trial in trials)
    assert 70 < below_the_middle < 130


def test_a_grid_is_crossed_with_draws_variants_and_seeds(load):
    sweep = load(
        parameters={GRID: {"grid": [0.25, 0.5, 1.0]}, TAU: {"uniform": [0.1, 1.0]}},
        variants={"plain": {}, "no S3": {"distill.s3.probability": 0}},
        num_trials=2,
        seeds=[0, 1],
    )
    assert len(sweep.trials) == 3 * 2 * 2 * 2
    assert [trial.number for trial in sweep.trials] == list(range(24))
    configurations = {(trial.variant, trial.values[GRID], trial.values[TAU]) for trial in sweep.trials}
    assert len(configurations) == 12  # the seeds of a configuration share its draw


def test_a_trial_is_the_job_with_its_settings_on_training_scenes(load):
    sweep = load(
        parameters={TAU: {"grid": [0.3]}},
        set={"distill.batch_size": 2},
        seeds=[7],
        budget={"epochs": 3},
        resources={"num_workers": 2},
        job=JOB | {"distill": {"stcr": {"lambda": 2.0}}},
    )
    job = sweep.job_of(sweep.trials[0])
    assert (job.distill.scr.tau, job.distill.stcr.lambda_, job.distill.batch_size, job.distill.epochs) == (
        0.3,
        2.0,
        2,
        3,
    )
    assert (job.seed, job.resources.num_workers, job.stage) == (7, 2, "distill")
    assert (job.dataset.train_split, job.dataset.eval_split) == ("parametrizing", "verifying")
    assert job.world_seed == 5  # other seeds train in the same world, so its images are encoded once


def test_the_digest_depends_only_on_what_decides_the_trials(load):
    space = {"parameters": {TAU: {"uniform": [0.1, 1.0]}}, "num_trials": 3}
    digest = load(**space).digest
    assert load(**space, title="other", budget={"hours": 1}).digest == digest
    assert load(**space, job=JOB | {"storage": "elsewhere"}).digest == digest
    for changed in ({"seed": 1}, {"metric": "label_free"}, {"budget": {"epochs": 4}}, {"num_trials": 4}):
        assert load(**(space | changed)).digest != digest
    assert load(**space, job=JOB | {"seed": 6}).digest != digest


def test_trials_are_drawn_once_and_do_not_affect_equality_or_pickling(load):
    keys = {TAU: {"uniform": [0.1, 1.0]}}
    sweep, other = (load(parameters=keys, num_trials=3) for _ in range(2))
    assert sweep.trials is sweep.trials
    assert sweep.base is sweep.base
    assert pickle.loads(pickle.dumps(sweep)) == sweep == other
    assert pickle.loads(pickle.dumps(sweep)).trials == other.trials


PATHS = JOB | {
    "storage": "store",
    "dataset": {"kind": "streetworld", "root": "world"},
    "teacher": {"model": "ViT-B-16", "pretrained": "clip.pt"},
}


def test_a_kept_sweep_can_be_resumed_from_any_folder(load, tmp_path, monkeypatch):
    space = {"parameters": {TAU: {"uniform": [0.1, 1.0]}, LAMBDA: {"uniform": [0.1, 1.0]}}, "num_trials": 3}
    monkeypatch.chdir(tmp_path)
    Path("clip.pt").touch()
    begun, folder = remember(load(**space, job=PATHS), "the command")
    again, _ = remember(load(**space, job=PATHS, title="other"), "")
    assert (again.digest, again.space.title) == (begun.digest, "other")
    # Trials are numbered by the order of the kept keys, whatever order the file has now.
    turned = {"parameters": dict(reversed(space["parameters"].items())), "num_trials": 3, "budget": {"hours": 2}}
    again, _ = remember(load(**turned, job=PATHS), "")
    assert (again.trials, again.space.budget.hours) == (begun.trials, 2)
    monkeypatch.chdir(tmp_path.parent)
    held, command = recall(folder)
    assert (held, held.digest, command) == (begun, begun.digest, "the command")
    assert (held.base.storage, held.base.dataset.root) == (str(tmp_path / "store"), str(tmp_path / "world"))
    assert (held.base.teacher.model, held.base.teacher.pretrained) == ("ViT-B-16", str(tmp_path / "clip.pt"))
    with pytest.raises(ConfigError, match="another sweep of this name"):
        remember(load(**space, seed=1, job=PATHS | {"storage": held.base.storage}), "")


def test_absolute_paths_change_nothing_else(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = load(
        variants={"paper": {"variant": "paper"}, "as it is": {}},
        touches_features=True,
        job=PATHS | {"variant": "released"},
    )
    before = copy.deepcopy(sweep.job)
    kept, _ = remember(sweep, "")
    assert sweep.job == before
    normalised = {trial.variant: kept.job_of(trial).teacher.clip_normalisation for trial in kept.trials}
    assert normalised == {"paper": True, "as it is": False}


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
    work = trials.TrialWork(load(parameters={TAU: {"grid": [0.5]}}), tmp_path, labels=True)
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


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ({}, "parameters: empty"),
        ({"parameters": {TAU: {"uniform": [1.0, 1.0]}}}, r"uniform=\[1.0, 1.0\]: empty"),
        ({"parameters": {TAU: {"loguniform": [0.0, 1.0]}}}, "both numbers must be above 0"),
        ({"parameters": {TAU: {"grid": [0.5, 0.5]}}}, "a value is given twice"),
        ({"parameters": {TAU: {"grid": [0.5], "choice": [0.5]}}}, "exactly one of grid, choice"),
        ({"parameters": {TAU: {"normal": [0, 1]}}}, "normal: unknown key; allowed here: choice, grid"),
        ({"parameters": {"distill.scr.taau": {"grid": [1]}}}, "distill.scr.taau: unknown key; allowed here: form, tau"),
        ({"parameters": {TAU: {"grid": [0.5, -1.0]}}}, "distill.scr.tau=-1.0: input should be greater than 0"),
        ({"parameters": {TAU: {"uniform": [-1.0, 1.0]}}}, "distill.scr.tau=-1.0: input should be greater than 0"),
        ({"parameters": {"finetune.epochs": {"grid": [1]}}}, "changes nothing that a sweep measures"),
        ({"parameters": {"distill.epochs": {"grid": [1]}}}, "give budget.epochs"),
        ({"parameters": {"dataset.eval_split": {"grid": ["val"]}}}, "trains on parametrizing and compares on"),
        ({"parameters": {"teacher.precision": {"grid": ["bf16"]}}}, "set touches_features: true"),
        ({"variants": {"old": {"variant": "released"}}}, "set touches_features: true"),
        (
            {"parameters": {"teacher.image_height_px": {"randint": [32, 64]}}, "touches_features": True},
            "only grid and choice are allowed",
        ),
        ({"parameters": {"variant": {"grid": ["paper", "released"]}}, "touches_features": True}, "give it in variants"),
        (
            {
                "parameters": {"teacher.keep_last_mlp": {"choice": [False, True]}},
                "searcher": "tpe",
                "touches_features": True,
            },
            "not with searcher=tpe",
        ),
        ({"parameters": {TAU: {"grid": [1.0]}}, "set": {"distill.max_steps": 5}}, "give budget.epochs instead"),
        ({"parameters": {TAU: {"grid": [1.0]}}, "num_trials": 5}, "a grid is run once"),
        ({"parameters": {TAU: {"grid": [1.0]}}, "searcher": "tpe"}, "no grid and no variants, and at most one seed"),
        ({"parameters": {TAU: {"grid": [1.0]}}, "set": {TAU: 1.0}}, "both in parameters and in set"),
        ({"parameters": {TAU: {"grid": [1.0]}}, "labels": False}, "metric=miou reads labels"),
        (
            {"parameters": {TAU: {"grid": [1.0]}}, "budget": {"epochs": 2}},
            "scheduler.grace_epochs=3 is above the 2 epochs",
        ),
        ({"parameters": {TAU: {"grid": [1.0]}}, "resources": {"gpus_per_worker": 1}}, "needs resources.num_workers"),
        ({"parameters": {"distill.method": {"grid": ["pointcontrast"]}}}, "cannot be scored without fine-tuning"),
        ({"variants": {"bad": {"distill.scr": 1}}}, "distill.scr=1"),
    ],
)
def test_a_mistake_is_one_sentence(load, space, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(**space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "values", "distill", "reason"),
    [
        (TAU, [0.1, 1.0], {"method": "openscene"}, "distill.method=openscene"),
        (TAU, [0.1, 1.0], {"scr": {"form": "cross_entropy"}}, "distill.scr.form=cross_entropy"),
        (TAU, [0.1, 1.0], {"scr": {"weight": 0}}, "distill.scr.weight=0"),
        (GRID, [0.5, 1.0], {"stcr": {"weight": 0}}, "distill.stcr.weight=0"),
        (GRID, [0.5, 1.0], {"stcr": {"grid": "voxel"}}, "distill.stcr.grid=voxel"),
        ("distill.s3.start_epoch", [1, 2], {"s3": {"probability": 0}}, "distill.s3.probability=0"),
        ("distill.contrast.max_pairs", [64, 128], {"method": "slidr"}, "distill.method=slidr"),
        ("distill.sweep_window_s", [0.1, 0.5], {"sweep_choice": "random"}, "distill.sweep_choice=random"),
        ("distill.sweep_window_s", [0.1, 0.5], {"num_sweeps": 1}, "distill.num_sweeps=1"),
    ],
)
def test_a_parameter_that_nothing_reads_is_refused(load, key, values, distill, reason):
    space = {"parameters": {key: {"grid": values}}}
    load(**space, job=JOB | {"distill": {"method": "ppkt" if "contrast" in key else "clip2scene"}})
    with pytest.raises(ConfigError, match=rf"{key} changes nothing with {reason}; leave it out"):
        load(**space, job=JOB | {"distill": distill})


def test_a_parameter_that_some_trials_read_is_allowed(load):
    grid = {"distill.stcr.grid": {"grid": ["metres", "voxel"]}, GRID: {"grid": [0.5, 1.0]}}
    assert len(load(parameters=grid).trials) == 4
    load(parameters={TAU: {"grid": [0.1, 1.0]}}, job=JOB | {"distill": {"method": "kl"}})


def test_overrides_go_to_the_space_or_to_the_job(load):
    sweep = load("num_trials=4", "job.distill.batch_size=8", parameters={TAU: {"uniform": [0.1, 1.0]}})
    assert len(sweep.trials) == 4
    assert sweep.job_of(sweep.trials[0]).distill.batch_size == 8
    with pytest.raises(ConfigError, match="num_trails: unknown key"):
        load("num_trails=4", parameters={TAU: {"uniform": [0.1, 1.0]}})


@pytest.mark.parametrize(
    ("nodes", "resources", "slots"),
    [
        ([{"CPU": 4}], {}, 4),
        ([{"CPU": 4}], {"threads_per_worker": 3}, 1),
        ([{"CPU": 3}, {"CPU": 3}], {"threads_per_worker": 2}, 2),
        ([{"CPU": 4}], {"num_workers": 2}, 2),
        ([{"CPU": 3}, {"CPU": 2}], {"num_workers": 2}, 2),
        ([{"CPU": 8, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 1}, 2),
        ([{"CPU": 8, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 0.5}, 4),
        ([{"CPU": 8, "GPU": 1}], {"num_workers": 1, "gpus_per_worker": 0.4}, 2),  # not 2.5: a worker needs a single GPU
        ([{"CPU": 3, "GPU": 2}], {"num_workers": 1, "gpus_per_worker": 0.25}, 3),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], {"num_workers": 2, "gpus_per_worker": 1}, 1),
    ],
)
def test_slots_follow_from_the_workers_that_fit(nodes, resources, slots):
    assert trial_slots(nodes, TrialResources(**resources)) == slots


@pytest.mark.parametrize(
    "resources", [{"threads_per_worker": 5}, {"num_workers": 5}, {"num_workers": 1, "gpus_per_worker": 1}]
)
def test_a_trial_that_fits_nowhere_is_refused(resources):
    with pytest.raises(ConfigError, match="Ray has 4 CPUs and 0 GPUs on 2 nodes"):
        trial_slots([{"CPU": 2}, {"CPU": 2}], TrialResources(**resources))


def test_a_scheduler_remembers_reports_after_a_kill(load, tmp_path):
    from ray.tune.schedulers import TrialScheduler

    stop, go_on = TrialScheduler.STOP, TrialScheduler.CONTINUE
    storage = SimpleNamespace(experiment_fs_path=str(tmp_path))
    trials = [SimpleNamespace(trial_id=str(number), storage=storage) for number in range(4)]
    results = [{"epoch": 1, "objective": objective} for objective in (0.9, 0.8, 0.1, 0.85)]

    def scheduler():
        asha = {"kind": "asha", "grace_epochs": 1, "reduction_factor": 2}
        keys = {TAU: {"uniform": [0.1, 2.0]}}
        made = scheduler_of(load(parameters=keys, num_trials=4, budget={"epochs": 3}, scheduler=asha))
        made.set_search_properties("objective", "max")
        for trial in trials:
            made.on_trial_add(None, trial)
        return made

    def tell(to, *numbers):
        return [to.on_trial_result(None, trials[number], results[number]) for number in numbers]

    undisturbed = tell(scheduler(), 0, 1, 2, 3)
    assert undisturbed[0] == go_on
    assert undisturbed[2] == stop
    (tmp_path / "reported.jsonl").unlink()
    assert tell(scheduler(), 0, 1, 2) == undisturbed[:3]
    # A new driver: three trials report again what they had reported, and one reports for the first time.
    resumed = scheduler()
    assert tell(resumed, 2, 1, 0) == undisturbed[2::-1]
    assert tell(resumed, 3) == undisturbed[3:]
