"""Search spaces: what they may vary, their trials, and the messages for mistakes."""

from __future__ import annotations

import math
import pickle

import pytest

from clip2scene.errors import ConfigError
from clip2scene.sweeps.space import TrialResources
from clip2scene.sweeps.sweep import load_sweep
from commands import REPOSITORY

TAU, LAMBDA, GRID = "distill.scr.tau", "distill.stcr.lambda", "distill.stcr.grid_size_m"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "search_spaces").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("job", ["demo", "nuscenes"])
def test_every_space_in_the_repository_fits_the_jobs(path, job):
    overrides = ["job.dataset.root=/data/nuscenes"] if job == "nuscenes" else []
    sweep = load_sweep(path, REPOSITORY / "jobs" / f"{job}.yaml", overrides)
    assert sweep.space.sweep == path.stem
    assert len({sweep.job_of(trial).digest() for trial in sweep.trials}) == (
        1 if sweep.space.searcher == "tpe" else len(sweep.trials)
    )


def test_trials_of_a_job_on_gpus_train_on_gpus(load):
    resources = {"num_workers": 2, "gpus_per_worker": 1, "threads_per_worker": 4, "cached_frames": 8}
    parameters = {TAU: {"grid": [0.3]}}
    made = load(parameters=parameters, job={"resources": resources})
    assert made.job_of(made.trials[0]).resources == made.job.resources
    given = load(parameters=parameters, job={"resources": resources}, resources={"threads_per_worker": 3})
    assert (given.space.resources.num_workers, given.space.resources.gpus_per_worker) == (0, 0)
    on_cpus = load(parameters=parameters, job={"resources": {"num_workers": 2, "threads_per_worker": 4}})
    assert on_cpus.space.resources == TrialResources()


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
        job={"distill": {"stcr": {"lambda": 2.0}}},
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
    assert load(**space, job={"storage": "elsewhere"}).digest == digest
    for changed in ({"seed": 1}, {"metric": "label_free"}, {"budget": {"epochs": 4}}, {"num_trials": 4}):
        assert load(**(space | changed)).digest != digest
    assert load(**space, job={"seed": 6}).digest != digest


def test_trials_are_drawn_once_and_do_not_affect_equality_or_pickling(load):
    keys = {TAU: {"uniform": [0.1, 1.0]}}
    sweep, other = (load(parameters=keys, num_trials=3) for _ in range(2))
    assert sweep.trials is sweep.trials
    assert sweep.job is sweep.job
    assert pickle.loads(pickle.dumps(sweep)) == sweep == other
    assert pickle.loads(pickle.dumps(sweep)).trials == other.trials


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
        (
            "distill.s3.probability",
            [0.1, 0.5],
            {"s3": {"start_epoch": 99}},
            r"distill.s3.start_epoch=99 and distill.epochs=\d+",
        ),
        ("distill.optimiser.momentum", [0.8, 0.9], {"optimiser": {"kind": "adamw"}}, "distill.optimiser.kind=adamw"),
    ],
)
def test_a_parameter_that_nothing_reads_is_refused(load, key, values, distill, reason):
    space = {"parameters": {key: {"grid": values}}}
    load(**space, job={"distill": {"method": "ppkt" if "contrast" in key else "clip2scene"}})
    with pytest.raises(ConfigError, match=rf"{key} changes nothing with {reason}; leave it out"):
        load(**space, job={"distill": distill})


def test_a_parameter_that_some_trials_read_is_allowed(load):
    grid = {"distill.stcr.grid": {"grid": ["metres", "voxel"]}, GRID: {"grid": [0.5, 1.0]}}
    assert len(load(parameters=grid).trials) == 4
    load(parameters={TAU: {"grid": [0.1, 1.0]}}, job={"distill": {"method": "kl"}})


def test_overrides_go_to_the_space_or_to_the_job(load):
    sweep = load("num_trials=4", "job.distill.batch_size=8", parameters={TAU: {"uniform": [0.1, 1.0]}})
    assert len(sweep.trials) == 4
    assert sweep.job_of(sweep.trials[0]).distill.batch_size == 8
    with pytest.raises(ConfigError, match="num_trails: unknown key"):
        load("num_trails=4", parameters={TAU: {"uniform": [0.1, 1.0]}})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("job.distill.epochs=9", "job.distill.epochs: changes nothing, as budget.epochs of the space sets it"),
        ("job.resources.num_workers=2", "as resources.num_workers of the space sets it for every trial"),
        ("job.dataset.eval_split=val", "as the sweep itself sets it"),
        ("job.stage=finetune", "as the sweep itself sets it"),
        ("job.seed=4", "as the space's seeds sets it"),
        (f"job.{TAU}=9", f"as parameters.{TAU} of the space sets it"),
        ("job.distill.scr.weight=2", "as the space sets it"),
        (f"job.{GRID}=2", "as the space sets it"),
    ],
)
def test_a_setting_of_the_job_that_every_trial_overwrites_is_refused(load, override, sentence):
    space = {
        "parameters": {TAU: {"uniform": [0.1, 1.0]}},
        "set": {"distill.scr.weight": 0.5},
        "variants": {"fine": {GRID: 0.5}, "coarse": {GRID: 2.0}},
        "seeds": [1, 2],
        "budget": {"epochs": 5},
    }
    load(**space)
    with pytest.raises(ConfigError, match=sentence):
        load(override, **space)


def test_a_setting_of_the_job_that_the_space_leaves_to_it_is_taken(load):
    sweep = load("job.distill.epochs=9", "job.seed=4", f"job.{GRID}=2", parameters={TAU: {"uniform": [0.1, 1.0]}})
    made = sweep.job_of(sweep.trials[0])
    assert (made.distill.epochs, made.seed, made.distill.stcr.grid_size_m) == (9, 4, 2)


def test_overrides_change_and_leave_out_entries_whose_names_have_dots(load):
    space = {
        "parameters": {TAU: {"loguniform": [0.1, 2.0]}, GRID: {"grid": [0.5, 1.0]}},
        "variants": {"v1.0": {"distill.stcr.weight": 1.0}, "v1": {}},
        "set": {"distill.batch_size": 4},
    }
    changed = load(
        f"parameters.{TAU}.loguniform=[0.2, 1]",
        f"parameters.{GRID}.grid.1=2.0",
        "variants.v1.0.distill.stcr.weight=0.5",
        "set.distill.batch_size=8",
        **space,
    ).space
    assert changed.parameters[TAU].loguniform == (0.2, 1.0)
    assert changed.parameters[GRID].grid == (0.5, 2.0)
    assert changed.variants == {"v1.0": {"distill.stcr.weight": 0.5}, "v1": {}}
    assert changed.set_ == {"distill.batch_size": 8}
    less = load(f"parameters.{GRID}=null", "variants.v1.0=null", **space).space
    assert (list(less.parameters), list(less.variants)) == ([TAU], ["v1"])
    with pytest.raises(ConfigError, match=r"variants\.v2=null': not there to be left out; allowed: v1, v1\.0$"):
        load("variants.v2=null", **space)
    with pytest.raises(ConfigError, match=r"grid is a list; allowed after it: an index from 0 to 1$"):
        load(f"parameters.{GRID}.grid.2=2.0", **space)
    with pytest.raises(ConfigError, match=f"parameters.{TAU}=None: a group of keys is needed"):
        load(**space | {"parameters": {TAU: None}})  # null is for the command line
