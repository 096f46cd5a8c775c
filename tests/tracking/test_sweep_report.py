"""Sweeps rebuilt from a real MLflow server: the trials, the best of them as a job, what is drawn, and the page."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from synthetic_sweeps import JOB, LAMBDA, TAU, interval, listed, read_sweep, write_sweep

from clip2scene.config import Job
from clip2scene.errors import ConfigError, TrackingError
from clip2scene.jobfile import load_job
from clip2scene.tracking.run import Run, client_of
from clip2scene.tracking.sweep.axes import axes_of
from clip2scene.tracking.sweep.best import best_job, best_yaml
from clip2scene.tracking.sweep.charts import Point, surface
from clip2scene.tracking.sweep.comparison import compare, ranking
from clip2scene.tracking.sweep.figures import importances, sweep_figures
from clip2scene.tracking.sweep.keep import keep_best, keep_sweep
from clip2scene.tracking.sweep.names import short_names
from clip2scene.tracking.sweep.page import sweep_html
from clip2scene.tracking.sweep.record import read_sweep_run
from clip2scene.tracking.sweep.runs import TrialRun, sweep_run
from clip2scene.tracking.sweep.text import compare_url, sweep_text
from clip2scene.tracking.tracker import connect

COUNTS = {
    "images_encoded": 48,
    "images_cached": 336,
    "images_wanted": 384,
    "epochs_run": 59,
    "epochs_full": 72,
    "trials": 12,
    "seconds": 613.0,
}
GRIDS = [
    listed("distill.stcr.grid_size_m", "grid", 0.25, 0.5, 1),
    listed("distill.stcr.grid", "grid", "metres", "voxel"),
]
VARIANTS = {
    "full": {},
    "without StCR": {"distill.stcr.weight": 0},
    "released code": {"variant": "released"},
}


def scores(miou, label_free):
    return {"miou": miou, "agreement": label_free + 0.02, "consistency": 0.9 - miou / 10, "label_free": label_free}


def temperatures():
    """Twelve trials: eight that ran all epochs, two that were stopped, one that diverged, one that failed."""
    rng = np.random.default_rng(4)
    trials = []
    for number in range(12):
        tau, weight = math.exp(rng.uniform(math.log(0.1), math.log(2))), math.exp(rng.uniform(-2.3, 2.3))
        miou = 0.5 - 0.05 * math.log(tau / 0.5) ** 2 - 0.02 * math.log(weight) ** 2
        trial = {"values": {TAU: tau, LAMBDA: weight}, "state": "finished", "epochs": 6}
        trials.append(trial | {"scores": scores(miou, 0.9 * miou + 0.01 * (number % 3))})
    for number in (8, 9):  # better than all, but after two epochs only
        trials[number] |= {"state": "stopped", "epochs": 2, "scores": scores(0.6, 0.1 * number)}
    trials[10] |= {"state": "diverged", "epochs": 1, "reason": "the loss is NaN in epoch 2"}
    trials[11] |= {"state": "failed", "epochs": 1, "reason": "out of memory"}
    return trials


def seeded():
    """A grid of six configurations with two seeds each; the last has lost one seed, and the other scores best."""
    trials = []
    for place, (size, grid) in enumerate((s, g) for s in (0.25, 0.5, 1) for g in ("metres", "voxel")):
        for seed in (0, 1):
            score = {"label_free": 0.40 + 0.01 * place + 0.02 * seed}
            values = {"distill.stcr.grid_size_m": size, "distill.stcr.grid": grid}
            trials.append({"values": values, "state": "finished", "epochs": 6, "scores": score, "seed": seed})
    trials[10] |= {"state": "stopped", "epochs": 3}
    trials[11] |= {"scores": {"label_free": 0.9}}
    return trials


def variants():
    miou = {"full": (0.50, 0.54), "without StCR": (0.51, 0.52), "released code": (0.30, 0.28)}
    return [
        {"values": {}, "state": "finished", "epochs": 6, "scores": scores(value, value), "seed": seed, "variant": name}
        for name, values in miou.items()
        for seed, value in enumerate(values)
    ]


@pytest.fixture(scope="module")
def tracker(uri):
    return connect(uri, "sweeps")


@pytest.fixture(scope="module")
def record(tracker):
    parameters = [interval(TAU, "loguniform", 0.1, 2.0), interval(LAMBDA, "loguniform", 0.1, 10.0)]
    shared = {"distill.sweep_window_s": 0.2}
    write_sweep(tracker, "temperatures", parameters, temperatures(), metrics=COUNTS, set=shared)
    return read_sweep(tracker.uri, "temperatures")


@pytest.fixture(scope="module")
def drawn(record):
    return list(sweep_figures(record))


@pytest.fixture(scope="module")
def grid(tracker):
    about = {"seeds": [0, 1], "metric": "label_free", "has_labels": False}
    write_sweep(tracker, "grid", GRIDS, seeded(), **about)
    return read_sweep(tracker.uri, "grid")


@pytest.fixture(scope="module")
def ablation(tracker):
    write_sweep(tracker, "ablation", [], variants(), seeds=[0, 1], variants=VARIANTS, scheduler="none")
    return read_sweep(tracker.uri, "ablation")


def small(tracker, name, trials, **about):
    """A sweep of one parameter; trials are (value, state, epochs, scores)."""
    made = [{"values": {TAU: value}, "state": s, "epochs": e, "scores": found} for value, s, e, found in trials]
    write_sweep(tracker, name, [interval(TAU, "uniform", 0, 1)], made, **about)
    return read_sweep(tracker.uri, name)


def test_a_trial_that_failed_and_went_on_has_the_figures_of_its_end(tracker):
    values = {"values": {TAU: 0.5}}
    trials = [values | {"state": "failed", "epochs": 1, "scores": {}, "reason": "out of memory"}]
    about = ("again", [interval(TAU, "uniform", 0, 1)])
    write_sweep(tracker, *about, trials)
    (failed,) = read_sweep(tracker.uri, "again").trials
    assert (failed.reason, failed.epochs) == ("out of memory", 1)
    write_sweep(tracker, *about, [values | {"state": "finished", "epochs": 6, "scores": scores(0.5, 0.4)}])
    record = read_sweep(tracker.uri, "again")
    assert (record.best_trial.state, record.best_trial.reason, record.best_trial.epochs) == ("finished", "", 6)
    assert record.best_trial.score("miou") == pytest.approx(50)


def test_a_trials_run_has_the_status_of_its_end(tracker):
    ended = {}
    with sweep_run(tracker, "ended", "digest", {"selection": "no labels"}) as parent:
        for number, state in enumerate(("finished", "stopped", "diverged", "failed", "abandoned")):
            trial = TrialRun(tracker, parent, "ended", number, Job(**JOB), None)
            if state == "abandoned":
                trial.abandon()
            else:
                trial.end(state, {"epochs": 1.0}, "out of memory")
            kept = client_of(tracker.uri).get_run(trial.run.run_id)
            ended[state] = (kept.info.status, kept.data.tags["state"], kept.data.tags.get("error"))
    assert ended == {
        "finished": ("FINISHED", "finished", None),
        "stopped": ("FINISHED", "stopped", None),
        "diverged": ("FINISHED", "diverged", None),
        "failed": ("FAILED", "failed", "RuntimeError: out of memory"),
        "abandoned": ("KILLED", "running", None),
    }


def test_a_trial_whose_driver_is_killed_at_its_end_has_the_figures_of_its_end_once(tracker, monkeypatch):
    def killed(run, tags):
        raise KeyboardInterrupt

    for seconds in (3.0, 2.0, 1.0):
        with sweep_run(tracker, "killed", "digest", {"selection": "no labels"}) as parent:
            trial = TrialRun(tracker, parent, "killed", 0, Job(**JOB), None)
            monkeypatch.setattr(Run, "set_tags", killed)
            with pytest.raises(KeyboardInterrupt):
                trial.end("finished", {"miou": 0.5, "epochs": 3.0, "seconds": seconds})
            monkeypatch.undo()
            trial.abandon()
    history = client_of(tracker.uri).get_metric_history(trial.run.run_id, "final/seconds")
    assert [metric.value for metric in history] == [3.0]


def test_a_sweep_is_read_by_its_run_where_another_has_its_name(tracker):
    first = write_sweep(tracker, "twice", [interval(TAU, "uniform", 0, 1)], [], title="the first")
    with sweep_run(tracker, "twice", "another digest", {"selection": "no labels"}) as other:
        about = {"format": "clip2scene-sweep-1", "title": "the second", "parameters": []}
        other.log_dict(about, "sweep.json")
    assert read_sweep_run(tracker.uri, first.run_id).about["title"] == "the first"
    assert read_sweep(tracker.uri, "twice").about["title"] == "the second"


def test_trials_are_read_back_from_their_runs(record):
    assert [trial.number for trial in record.trials] == list(range(12))
    for trial, written in zip(record.trials, temperatures(), strict=True):
        assert trial.values == pytest.approx(written["values"])
        assert trial.state == written["state"]
        assert trial.reason == written.get("reason", "")
    assert record.trials[9].finals == pytest.approx(scores(0.6, 0.9) | {"epochs": 2, "seconds": 16.0})
    assert record.trials[10].finals == {"epochs": 1, "seconds": 8.0}
    assert record.trials[11].finals == record.trials[10].finals
    assert record.metrics == COUNTS
    assert record.selection == "labels of the verifying scenes"
    assert record.curve(record.trials[9], "miou") == pytest.approx({1: 0.48, 2: 0.6})


def test_the_best_ran_all_epochs(record):
    finished = [trial for trial in record.trials if trial.state == "finished"]
    best = max(finished, key=lambda trial: trial.finals["miou"])
    assert record.best_trial == best
    assert record.best.trials == (best,)
    states = [trial.state for trial in sorted(record.trials, key=record.order)]
    assert states == ["finished"] * 8 + ["stopped"] * 2 + ["diverged", "failed"]


def test_stopped_trials_compete_only_when_none_finished(tracker):
    two = (0.5, "stopped", 2, {"label_free": 0.9})
    four = [(0.1, "stopped", 4, {"label_free": 0.3}), (0.2, "stopped", 4, {"label_free": 0.4})]
    record = small(tracker, "stopped", [two, *four, (0.7, "running", 1, {"label_free": 0.95})], metric="label_free")
    assert record.best_trial.number == 2
    assert "label-free 40.00% on verifying scenes after 4 of 6 epochs." in best_yaml(record)
    assert load_best(record).distill.epochs == 6
    assert [trial.state for trial in record.trials] == ["stopped"] * 3 + ["interrupted"]


def test_a_sweep_without_labels_is_compared_without_them(tracker):
    trials = [(value, "finished", 6, {"label_free": value}) for value in (0.5, 0.2, 0.4)]
    record = small(tracker, "unlabelled", trials, metric="label_free", searcher="tpe", has_labels=False)
    assert record.best_trial.values == {TAU: 0.5}
    assert ranking(record) is None


def test_configurations_are_compared_by_their_mean_over_seeds(grid):
    best = grid.best
    assert best.values == {"distill.stcr.grid_size_m": 1, "distill.stcr.grid": "metres"}
    assert best.score("label_free") == (pytest.approx(45.0), pytest.approx(math.sqrt(2)))
    assert grid.best_trial.seed == 1
    last = grid.configurations[-1]  # one seed is left, and is better than any mean
    assert last.score("label_free") == (pytest.approx(90.0), None)
    assert [len(last.trials), len(last.compared)] == [2, 1]


def test_listed_values_come_back_as_the_space_writes_them(tracker):
    channels = listed("student.channels", "choice", None, [32, 48])
    settings = listed("distill.scr", "choice", {"tau": 0.5}, {"tau": 0.5, "weight": 2})
    wanted = [
        {"student.channels": None, "distill.scr": {"tau": 0.5, "weight": 2}},
        {"student.channels": [32, 48], "distill.scr": {"tau": 0.5}},
    ]
    trials = [{"values": v, "state": "finished", "epochs": 6, "scores": scores(0.4, 0.4)} for v in wanted]
    write_sweep(tracker, "lists", [channels, settings], trials)
    record = read_sweep(tracker.uri, "lists")
    assert [trial.values for trial in record.trials] == wanted
    assert "[32, 48]" in sweep_text(record)
    assert [name for name, _, _ in sweep_figures(record)][:2] == ["curve_student.channels", "curve_distill.scr"]
    assert load_best(record).distill.scr.weight == 2


def test_rank_correlation_is_over_trials_that_ran_all_epochs(record, grid, tracker):
    found = ranking(record)
    compared = found.compared
    assert (compared.full, compared.epoch) == (True, 6)
    assert [trial.number for trial in compared.trials] == list(range(8))
    miou, label_free = ([trial.finals[name] for trial in compared.trials] for name in ("miou", "label_free"))
    places = [np.argsort(np.argsort(values)) for values in (miou, label_free)]
    assert found.spearman == pytest.approx(np.corrcoef(*places)[0, 1])
    assert ranking(record, "consistency").spearman == pytest.approx(-1.0)
    assert ranking(grid) is None
    trials = [(0.1, "finished", 6, scores(0.1, 0.1)), (0.2, "stopped", 2, scores(0.2, 0.2))]
    assert ranking(small(tracker, "two", trials)) is None


def test_trials_of_which_few_ran_all_epochs_are_compared_at_the_last_epoch_that_all_have(tracker):
    trials = [
        (0.1, "finished", 6, scores(0.50, 0.5)),  # after two epochs 43.3 and 43.3
        (0.2, "stopped", 2, scores(0.48, 0.4)),
        (0.3, "stopped", 3, scores(0.46, 0.3)),  # after two epochs 39.9 and 26.0
    ]
    record = small(tracker, "three", trials)
    found = ranking(record)
    assert (found.compared.epoch, found.compared.full) == (2, False)
    assert found.compared.scores["miou"] == pytest.approx((100 * 0.5 * (1 - 0.4 / 3), 48.0, 100 * 0.46 * (1 - 0.4 / 3)))
    assert found.spearman == pytest.approx(0.5)  # of each one's own last epoch it would be 1
    over = "over the 3 trials at epoch 2, the last that all of them have: label-free 0.50"
    assert over in sweep_text(record)
    figures = {name: figure for name, _, figure in sweep_figures(record)}
    (axes,) = figures[f"curve_{TAU}"].axes
    assert axes.get_ylabel() == "mIoU (%) at epoch 2"
    heights = [height for points in axes.collections for _, height in points.get_offsets()]
    assert sorted(heights) == pytest.approx(sorted(found.compared.scores["miou"]))
    assert figures["ranking"].axes[0].get_title() == "Spearman 0.50, 3 trials at epoch 2"
    nothing = small(tracker, "no epoch", [])
    assert (compare(nothing, "miou").trials, ranking(nothing)) == ((), None)


def test_text(record):
    text = sweep_text(record)
    lines = text.splitlines()
    best = record.best_trial
    row = rf" \* +{best.number:02d} +{best.values[TAU]:.3g} +{best.values[LAMBDA]:.3g} +6 +{best.score('miou'):.1f} "
    assert any(re.match(row, line) for line in lines)
    assert re.search(r"10 .* diverged +8\.0 s", text)
    assert "trial 10 diverged: the loss is NaN in epoch 2" in lines
    assert "trial 11 failed: out of memory" in lines
    assert "images encoded: 48 of the 384 that the trials read; 336 were in the feature store" in lines
    assert "epochs run: 59 of 72 (82%) that 12 full trials have; 10 min 13 s" in lines
    assert "selected by mIoU (labels of the verifying scenes)" in lines
    found = ranking(record).spearman
    assert f"with mIoU over the 8 trials that ran all epochs: label-free {found:.2f}, agreement" in text
    assert "command: clip2scene sweep temperatures.yaml --job jobs/demo.yaml" in lines
    assert "in all trials: distill.sweep_window_s=0.2" in lines


def test_text_over_seeds_and_without_labels(grid):
    text = sweep_text(grid)
    assert re.search(r"\* +1 +metres +2 of 2 +6 +45\.0 ± 1\.4 +08, 09", text)
    assert re.search(r"  +1 +voxel +1 of 2 +6 +90\.0 ± – +10, 11", text)
    assert "selected by label-free (no labels)" in text
    assert "Spearman" not in text
    assert "mIoU" not in text
    assert "images" not in text  # nothing was counted


def test_text_of_variants(ablation):
    assert re.search(r"\* +full +2 of 2 +6 +52\.0 ± 2\.8 ", sweep_text(ablation))
    assert re.search(r"released code +2 of 2 +6 +29\.0 ± 1\.4 ", sweep_text(ablation))


def load_best(record):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "best.yaml"
        path.write_text(best_yaml(record))
        return load_job(path)


def test_the_best_job_can_be_run(record, ablation):
    job, own = load_best(record), record.best.values
    assert job.name == "demo-best"
    assert job.distill.scr.tau == pytest.approx(own[TAU])
    assert job.distill.stcr.lambda_ == pytest.approx(own[LAMBDA])
    assert job.distill.epochs == record.about["epochs"] != JOB["distill"]["epochs"]  # as its score says
    assert job.distill.sweep_window_s == 0.2 != JOB["distill"]["sweep_window_s"]  # the space sets it in all trials
    unchanged = yaml.safe_load(best_yaml(record))
    unchanged["distill"] |= {name: JOB["distill"][name] for name in ("epochs", "sweep_window_s")}
    unchanged["name"], unchanged["distill"]["scr"], unchanged["distill"]["stcr"]["lambda"] = "demo", {"tau": 0.5}, 1.0
    assert unchanged == JOB
    comments = [line for line in best_yaml(record).splitlines() if line.startswith("#")]
    trial, run = record.best_trial, record.run_id
    assert comments == [
        f"# The best configuration of sweep temperatures (MLflow run {run}): trial {trial.number:02d} (seed 0).",
        f"# mIoU {trial.score('miou'):.2f}% on verifying scenes after 6 epochs.",
    ]
    assert "52.00 ± 2.83% on verifying" in best_yaml(ablation)


def test_the_changes_of_the_best_variant_are_in_the_job(tracker):
    trials = [trial for trial in variants() if trial["variant"] != "full"]
    write_sweep(tracker, "rest", [], trials, seeds=[0, 1], variants=VARIANTS)
    assert load_best(read_sweep(tracker.uri, "rest")).distill.stcr.weight == 0


def test_a_sweep_that_still_runs_is_shown_so_far_and_names_no_best(tracker):
    trials = [(0.1, "running", 2, scores(0.3, 0.3)), (0.2, "running", 1, scores(0.6, 0.2)), (0.3, "running", 1, {})]
    record = small(tracker, "early", trials, num_trials=12)
    assert [trial.so_far for trial in record.trials] == [
        pytest.approx(scores(0.3, 0.3) | {"epochs": 2}),
        pytest.approx(scores(0.6, 0.2) | {"epochs": 1}),
        {},
    ]
    assert (record.best, record.best_trial, ranking(record)) == (None, None, None)
    text = sweep_text(record)
    assert re.search(r" 00 +0\.1 +2 so far +30\.0 .* interrupted ", text)
    assert re.search(r" 01 +0\.2 +1 so far +60\.0 ", text)
    assert re.search(r" 02 +0\.3 +– +– ", text)
    assert "* the best" not in text
    assert "'so far': the trial has not ended" in text
    assert "0 of 12 trials ended, 3 interrupted, 9 to come" in text.splitlines()
    ((name, _, figure),) = sweep_figures(record)
    assert (name, len(figure.axes[0].lines)) == ("learning", 2 * 2)
    page = sweep_html(record, figures=())
    assert "2 so far" in page
    assert "0 of 12 trials ended, 3 interrupted, 9 to come" in page


def test_a_trial_that_has_not_ended_is_not_compared_with_those_that_have(tracker):
    ended = (0.1, "finished", 6, scores(0.4, 0.4))
    record = small(tracker, "half", [ended, (0.2, "running", 2, scores(0.9, 0.9))])
    assert record.best_trial.number == 0
    assert [trial.so_far.get("epochs") for trial in record.trials] == [None, 2]
    assert compare(record, "miou").trials == record.trials[:1]
    assert "1 of 2 trials ended, 1 interrupted" in sweep_text(record).splitlines()
    assert "* the best." in sweep_text(record)


def test_a_trial_whose_driver_is_gone_is_interrupted(tracker):
    with sweep_run(tracker, "gone", "digest", {"selection": "no labels"}) as parent:
        parent.log_dict({"format": "clip2scene-sweep-1", "parameters": []}, "sweep.json")
        trial = TrialRun(tracker, parent, "gone", 0, Job(**JOB), None)
        (running,) = read_sweep(tracker.uri, "gone").trials
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        trial.run.set_tags({"process.pid": str(child.pid)})
        (left,) = read_sweep(tracker.uri, "gone").trials
        trial.run.set_tags({"process.host": "elsewhere"})  # whose processes nobody here knows
        (elsewhere,) = read_sweep(tracker.uri, "gone").trials
        trial.abandon()
    assert [found.state for found in (running, left, elsewhere)] == ["running", "interrupted", "running"]
    assert math.isnan(running.seconds)


def test_a_sweep_without_a_score_has_no_best(tracker):
    record = small(tracker, "none", [(0.5, "running", 1, {}), (0.4, "diverged", 1, {})])
    assert record.best is None
    assert [name for name, _, _ in sweep_figures(record)] == []
    assert "No trial ended with a score." in sweep_html(record)
    assert "interrupted" in sweep_text(record)
    with pytest.raises(ConfigError, match=r"^sweep 'none': no trial ended with a score, so none is the best$"):
        best_job(record)


def test_figures(record, drawn, grid, ablation):
    figures = {name: figure for name, _, figure in drawn}
    curves = [f"curve_{TAU}", f"curve_{LAMBDA}"]
    assert list(figures) == ["surface", *curves, "parallel", "importance", "learning", "ranking"]
    axes = figures["surface"].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [len(points.get_offsets()) for points in axes.collections[1:]] == [2, 8, 1]  # stopped, all epochs, best
    assert len(figures["learning"].axes[0].lines) == 2 * 12
    assert figures["ranking"].axes[0].get_title() == f"Spearman {ranking(record).spearman:.2f}, 8 trials"
    names = [name for name, _, _ in sweep_figures(grid)]
    expected = ["curve_distill.stcr.grid_size_m", "curve_distill.stcr.grid", "parallel", "importance", "learning"]
    assert names == expected
    figures = {name: figure for name, _, figure in sweep_figures(ablation)}
    assert list(figures) == ["curve_variant", "learning", "ranking"]
    assert [bar.get_width() for bar in figures["curve_variant"].axes[0].patches] == pytest.approx([52.0, 51.5, 29.0])


def test_the_surface_ends_at_the_hull_of_the_points(record):
    across, up = axes_of(record)
    corners = [(0.1, 0.1), (2.0, 0.1), (0.1, 10.0), (0.2, 0.2), (0.15, 0.15), (0.12, 0.3)]  # a triangle and its inside

    def mesh(points, full=True, smooth=True):
        made = [Point({TAU: tau, LAMBDA: weight}, 40.0 + tau, None, full, False) for tau, weight in points]
        shown = surface(made, across, up, "mIoU (%)", smooth).axes[0].collections
        return [found for found in shown if type(found).__name__ == "QuadMesh"]

    heights = mesh(corners)[0].get_array().reshape(400, 400)
    assert not heights.mask[1, 1]
    assert heights.mask[-2, -2]
    assert heights.min() >= 40.1 - 1e-6
    assert heights.max() <= 42.0 + 1e-6
    assert mesh(corners[:5]) == []
    assert mesh(corners, full=False) == []
    assert mesh(corners, smooth=False) == []
    assert mesh([(0.1 * step, 0.1 * step) for step in range(1, 8)]) == []


def test_importance_is_of_what_matters(tracker):
    values = [(tau, weight) for tau in (0.1, 0.4, 0.7, 1.0) for weight in (0.1, 0.4, 0.7, 1.0)]
    trials = [
        {"values": {TAU: tau, LAMBDA: weight}, "state": "finished", "epochs": 1, "scores": scores(0.3 + 0.2 * tau, 0.1)}
        for tau, weight in values
    ]
    parameters = [listed(TAU, "grid", 0.1, 0.4, 0.7, 1.0), listed(LAMBDA, "grid", 0.1, 0.4, 0.7, 1.0)]
    write_sweep(tracker, "importance", parameters, trials, epochs=1)
    record = read_sweep(tracker.uri, "importance")
    compared = compare(record, "miou")
    shares = importances(record, compared, axes_of(record))
    assert len(compared.trials) == 16
    assert shares["tau"] > 0.9
    assert shares["lambda"] < 0.1
    assert ranking(record) is None  # all label-free scores are the same


def test_names_are_as_short_as_they_can_be():
    keys = ("distill.scr.tau", "distill.scr.weight", "distill.stcr.weight")
    assert short_names(keys) == dict(zip(keys, ("tau", "scr.weight", "stcr.weight"), strict=True))


def test_the_page_needs_nothing_else(record, drawn, parsed):
    page = parsed(sweep_html(record, figures=drawn))
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    *trials, compare, own = page.links
    assert {link.split("/runs/")[1].split("?")[0] for link in trials} == {trial.run_id for trial in record.trials}
    assert compare == compare_url(record)
    assert record.run_id in own


def test_links_can_go_to_the_ui(grid, parsed):
    page = parsed(sweep_html(grid, "http://127.0.0.1:5000", figures=()))
    assert {link.split("/#")[0] for link in page.links} == {"http://127.0.0.1:5000"}


def test_everything_is_kept_in_the_sweeps_run(tracker, ablation):
    from mlflow import MlflowClient

    with sweep_run(tracker, "ablation", "digest-ablation", {}) as parent:
        assert parent.run_id == ablation.run_id
        keep_sweep(ablation, parent)
    client = MlflowClient(tracker.uri)
    kept = {item.path for item in client.list_artifacts(parent.run_id)}
    assert kept == {"sweep.json", "trials.json", "trials.txt", "best.yaml", "sweep.html", "figures"}
    figures = {item.path for item in client.list_artifacts(parent.run_id, "figures")}
    assert figures == {f"figures/{name}.png" for name in ("curve_variant", "learning", "ranking")}


def test_mlflows_list_of_runs_shows_what_is_best(tracker, record, ablation):
    def kept(record):
        with sweep_run(tracker, record.about["sweep"], f"digest-{record.about['sweep']}", {}) as parent:
            keep_best(record, parent)
        return client_of(tracker.uri).get_run(record.run_id).data

    best, data = record.best_trial, kept(record)
    assert data.metrics == pytest.approx(COUNTS | {f"best/{name}": best.finals[name] for name in scores(0, 0)})
    assert data.tags["best_trial"] == f"{best.number:02d}"
    assert {key: float(data.tags[f"best.{key}"]) for key in (TAU, LAMBDA)} == pytest.approx(best.values)
    settings = f"`{TAU}` = {best.values[TAU]:.3g}, `{LAMBDA}` = {best.values[LAMBDA]:.3g}"
    score = f"mIoU {best.score('miou'):.2f}% on verifying scenes after 6 epochs"
    assert data.tags["mlflow.note.content"].split("\n\n") == [
        "**The sweep temperatures** (streetworld)",
        f"Varied: `{TAU}`, `{LAMBDA}`, in 12 trials of 6 epochs.",
        f"Best: trial {best.number:02d}, {score}, with {settings}.",
        "The artifact `best.yaml` is a job with the best settings. The whole sweep again: "
        "`clip2scene sweep temperatures.yaml --job jobs/demo.yaml`",
    ]
    data = kept(ablation)
    assert data.metrics["best/miou"] == pytest.approx(0.52)
    assert (data.tags["best_trial"], data.tags["best.variant"]) == ("01", "full")
    assert "Varied: variants (full, without StCR, released code), in 6" in data.tags["mlflow.note.content"]
    nothing = small(tracker, "unscored", [(0.5, "diverged", 1, {})])
    data = kept(nothing)
    assert data.metrics == {}
    assert "Best: no trial has ended with a score." in data.tags["mlflow.note.content"]


def test_another_format_is_refused(tracker):
    with sweep_run(tracker, "newer", "d", {"selection": "no labels"}) as parent:
        parent.log_dict({"format": "clip2scene-sweep-9"}, "sweep.json")
    with pytest.raises(TrackingError, match=rf"^run {parent.run_id}: its sweep\.json is not in the format"):
        read_sweep(tracker.uri, "newer")
