"""Dry runs: what they count, find done and refuse, and that they make nothing."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from clip2scene.cli import main
from clip2scene.cluster.plan import asha_shares, plan, plan_jobs
from clip2scene.cluster.plan_machine import Machine
from clip2scene.cluster.plan_memory import WITHIN
from clip2scene.cluster.plan_report import plan_json, plan_text
from clip2scene.cluster.plan_stages import Planner
from clip2scene.cluster.rates import read_rates
from clip2scene.errors import ConfigError
from clip2scene.jobfile import load_job
from clip2scene.stages import Stages
from clip2scene.student.checkpoint import save_checkpoint
from clip2scene.student.network import Student
from clip2scene.sweeps.space import Scheduler
from clip2scene.teacher import store
from commands import REPOSITORY

DEMO, NUSCENES = str(REPOSITORY / "jobs" / "demo.yaml"), str(REPOSITORY / "jobs" / "nuscenes.yaml")
TABLE3 = str(REPOSITORY / "jobs" / "table3_ablation.yaml")
SPACES = REPOSITORY / "search_spaces"
OFFICIAL = ("dataset.train_split=train", "dataset.eval_split=val")
# ViT-B/16 takes seconds to build, and nothing here depends on it.
SMALL_TEACHER = ("teacher.model=streetworld", "teacher.image_width_px=400")


def machine(cpus: float = 2, gpus: float = 0) -> Machine:
    return Machine("a machine", ({"CPU": cpus, "GPU": gpus},), grows=True)


def planned(path, *overrides, there=None, job=None, frames=None, rates=None):
    return plan(str(path), overrides, job, there or machine(), rates or read_rates(), frames)


def works(made):
    return {work.stage: work for work in made.works}


def test_a_demo_that_was_never_run(tmp_path):
    made = planned(DEMO, f"storage={tmp_path}/new")
    by_stage = works(made)
    assert (made.data.frames, made.data.train_frames, made.data.eval_frames) == (96, 64, 32)
    assert list(by_stage) == ["start", "streetworld", "index", "extract", "distill", "evaluate", "finetune"]
    assert by_stage["extract"].amount == 96 * 6
    assert by_stage["distill"].steps == 12 * 16
    assert by_stage["distill"].amount == 12 * 64 * 2
    assert by_stage["finetune"].steps == 2 * 80
    assert not any(work.done for work in made.works)
    # The rates are from the machine and date in RESULTS.md, so this is its 4 min 25 s.
    assert made.seconds == pytest.approx(265, rel=0.02)
    assert all(work.sources for work in made.works)
    assert not made.problems
    assert list(tmp_path.iterdir()) == []


def test_what_the_storage_holds_is_done(streetworld_root, tmp_path):
    root, version = streetworld_root
    words = ["dataset.kind=nuscenes", f"dataset.root={root}", f"dataset.version={version}", f"storage={tmp_path}/held"]
    before = planned(DEMO, *words)
    assert "not kept" in before.data.source
    assert not list(tmp_path.iterdir())
    stages = Stages(load_job(DEMO, words))
    frames = (*stages.train_frames, *stages.eval_frames)
    shape = (*stages.teacher.grid, stages.teacher.dim)
    for frame in frames[:-1]:
        features = {camera.name: np.zeros(shape, np.float16) for camera in frame.cameras}
        store.write_frame(stages.store_path, frame.frame_id, features, {}, stages.teacher.digest, stages.storage)
    written = sorted(tmp_path.rglob("*"))
    some = works(planned(DEMO, *words))
    assert some["index"].done == len(stages.index.frames)
    assert some["extract"].amount - some["extract"].done == 6
    frame_bytes = store.frame_file(stages.store_path, frames[0].frame_id).stat().st_size
    assert some["extract"].stored_bytes == pytest.approx(frame_bytes, rel=0.05)
    assert some["distill"].done == 0
    assert sorted(tmp_path.rglob("*")) == written
    path = stages.storage.path("students", f"{stages.distill_digest}.safetensors")
    path.parent.mkdir()
    save_checkpoint(
        path, Student(stages.job.student, embedding_dim=4).state_dict(), stages.job.student, {"history": []}
    )
    assert works(planned(DEMO, *words))["distill"].seconds == 0
    assert works(planned(DEMO, *words, "seed=1"))["distill"].done == 0
    assert works(planned(DEMO, *words, "teacher.keep_last_mlp=true"))["extract"].done == 0


def test_a_data_set_that_is_not_there_has_its_official_counts():
    made = planned(NUSCENES, *OFFICIAL, *SMALL_TEACHER, there=machine(gpus=2))
    assert (made.data.frames, made.data.train_frames, made.data.eval_frames) == (34_149, 28_130, 6_019)
    assert made.data.images == 34_149 * 6
    assert "official counts" in made.data.source
    assert works(made)["distill"].steps == 20 * 7033
    # There are no rates for GPUs, so there is no time and no price.
    assert works(made)["distill"].seconds is None
    assert made.seconds is None
    assert "not measured on a GPU; no estimate" in plan_text(made, 2.0)
    assert "price: no estimate" in plan_text(made, 2.0)
    default = planned(NUSCENES, *SMALL_TEACHER, "stage=index")
    assert default.data.train_frames == round(28_130 * 600 / 700)
    overlapping = planned(NUSCENES, *SMALL_TEACHER, "stage=index", "dataset.train_split=train")
    assert overlapping.data.images == 28_130 * 6  # ``verifying`` is a part of it
    ten_times = planned(NUSCENES, *OFFICIAL, *SMALL_TEACHER, there=machine(gpus=2), frames=281_300)
    assert ten_times.data.images == 10 * made.data.images
    assert works(ten_times)["extract"].stored_bytes == 10 * works(made)["extract"].stored_bytes
    with pytest.raises(ConfigError, match="split 'verifying': no count"):
        planned(str(REPOSITORY / "jobs" / "scannet.yaml"), "dataset.train_split=verifying", "stage=index")
    with pytest.raises(ConfigError, match="storage: ftp:// is not known"):
        planned(NUSCENES, *OFFICIAL, "storage=ftp://x/y", "stage=index")


def test_predictions(tmp_path, streetworld_root):
    words = (f"storage={tmp_path}/new", "stage=predict")
    made = planned(DEMO, *words)
    by_stage = works(made)
    assert list(by_stage) == ["start", "streetworld", "index", "extract", "distill", "finetune", "predict"]
    assert by_stage["extract"].amount == 64 * 6  # none of the keyframes to predict
    assert by_stage["finetune"].steps == 80
    predicting = by_stage["predict"]
    assert (predicting.amount, predicting.unit) == (32, "keyframes")
    assert predicting.stored_bytes == 32 * made.data.points
    assert predicting.seconds is None  # evaluate's rate is of other work
    alone = planned(DEMO, *words, "predict.checkpoint=network.safetensors")
    assert list(works(alone)) == ["start", "streetworld", "index", "predict"]
    assert (alone.data.train_frames, alone.data.eval_frames, alone.memory) == (0, 32, None)
    assert planned(DEMO, *words, "predict.checkpoint=n", frames=64).data.eval_frames == 64
    distilled = planned(DEMO, *words, "predict.network=distilled")
    assert list(works(distilled)) == ["start", "streetworld", "index", "extract", "distill", "predict"]
    test = planned(NUSCENES, *SMALL_TEACHER, *words[1:], "dataset.eval_split=test", there=machine(gpus=2))
    assert (test.data.frames, test.data.eval_frames) == (28_130 + 6_019 + 6_008, 6_008)
    root, version = streetworld_root
    held = (f"dataset.root={root}", f"dataset.version={version}", "dataset.kind=nuscenes", "predict.checkpoint=n")
    assert planned(DEMO, *words, *held).data.eval_frames == 4
    assert list(tmp_path.iterdir()) == []


def test_time_and_money_on_more_gpus():
    rates = read_rates().with_given(100.0, 5.0)
    words = (*OFFICIAL, *SMALL_TEACHER, "stage=distill")
    many = ("extract.num_actors=8", "resources.num_workers=4")
    two = planned(NUSCENES, *words, there=machine(gpus=8), rates=rates)
    more = planned(NUSCENES, *words, *many, there=machine(gpus=8), rates=rates)
    assert works(two)["extract"].seconds == pytest.approx(34_149 * 6 / 100 / 2)
    assert works(more)["extract"].seconds == pytest.approx(34_149 * 6 / 100 / 8)
    assert works(two)["distill"].seconds == pytest.approx(140_660 / 5 / 2)
    assert works(more)["distill"].seconds == pytest.approx(140_660 / 5 / 4)
    assert more.gpu_hours == pytest.approx(8 * more.seconds / 3600)
    assert plan_json(more, 3.0)["price"] == pytest.approx(24 * more.seconds / 3600)
    assert "scaled linearly from 1 to 4 workers" in works(more)["distill"].sources[0]
    assert any("6 of 8 GPUs stay idle" in note for note in two.notes)


@pytest.mark.parametrize(
    ("overrides", "gpus", "sentence"),
    [
        (
            ("extract.gpus_per_actor=0",),
            1,
            r"resources\.num_workers=2 with resources\.gpus_per_worker=1: .* room for 1",
        ),
        (("extract.num_actors=9",), 8, r"extract\.num_actors=9 with extract\.gpus_per_actor=1: .* room for 8"),
    ],
)
def test_a_plan_that_can_never_run_exits_with_status_1(overrides, gpus, sentence, capsys):
    words = ["plan", NUSCENES, *OFFICIAL, *SMALL_TEACHER, *overrides, "--gpus", str(gpus)]
    assert main(words) == 1
    printed = capsys.readouterr()
    assert "28,130 to train on" in printed.out
    (line,) = [line for line in printed.err.splitlines() if line.startswith("clip2scene: ")]
    assert "never schedulable" in line
    assert re.search(sentence, line)


def test_a_world_larger_than_the_disk(monkeypatch):
    here = Machine("this machine", ({"CPU": 2, "GPU": 2},), grows=True, is_here=True)
    large = (*OFFICIAL, *SMALL_TEACHER, "stage=index")
    monkeypatch.setattr("clip2scene.cluster.plan.free_bytes", lambda storage: 0)
    made = planned(NUSCENES, *large, there=here)
    assert made.refusal.startswith("disk too small: storage=")
    assert "GB, but only 0.0 GB are free" in made.problems[0]
    assert plan_json(made)["never_schedulable"] == []
    elsewhere = planned(NUSCENES, *large, "storage=s3://bucket/runs", there=here)
    assert elsewhere.stored_bytes == made.stored_bytes
    assert not elsewhere.problems


def test_a_sweep():
    made = planned(SPACES / "temperatures.yaml", job=DEMO)
    assert made.facts["trials"] == 12
    assert made.facts["trials at a time"] == 2
    assert made.facts["extractions"] == 1
    assert made.facts["epochs, no trial stopped"] == 12 * 12
    assert made.facts["epochs, at least"] == 12 * 3
    # All to epoch 3, half to 6, a quarter to 12.
    assert made.facts["epochs, expected"] == 12 * 3 + 6 * 3 + 3 * 6
    full = works(planned(SPACES / "temperatures.yaml", "scheduler.kind=none", job=DEMO))["distill"]
    assert full.amount == works(made)["distill"].amount
    assert works(made)["distill"].seconds == pytest.approx(full.seconds / 2)
    alone = planned(SPACES / "temperatures.yaml", job=DEMO, there=machine(cpus=1))
    assert works(alone)["distill"].seconds == pytest.approx(2 * works(made)["distill"].seconds, rel=1e-3)
    never = planned(SPACES / "temperatures.yaml", "resources={num_workers: 4, gpus_per_worker: 1}", job=DEMO)
    assert "a trial needs 4 workers" in never.problems[0]


def test_a_sweep_that_touches_features_says_what_that_costs():
    space = ("sweep=t", "touches_features=true", "scheduler.kind=none")
    grid = "parameters={teacher.keep_last_mlp: {grid: [false, true]}, distill.scr.tau: {grid: [0.2, 0.5]}}"
    made = planned(SPACES / "temperatures.yaml", *space, grid, "num_trials=1", job=DEMO)
    assert (made.facts["trials"], made.facts["extractions"]) == (4, 2)
    one = planned(SPACES / "grid_size.yaml", job=DEMO)
    assert works(made)["extract"].amount == 2 * works(one)["extract"].amount
    assert works(made)["extract"].stored_bytes == 2 * works(one)["extract"].stored_bytes
    assert works(made)["index"].amount == works(one)["index"].amount


def test_asha():
    assert asha_shares(Scheduler(kind="none"), 12) == (1, 1)
    assert asha_shares(Scheduler(grace_epochs=12), 12) == (1, 1)
    assert asha_shares(Scheduler(grace_epochs=1, reduction_factor=3), 10) == pytest.approx(
        (0.1, (1 + 2 / 3 + 6 / 9 + 1 / 27) / 10)
    )


def test_a_table_shares_worlds_features_and_pretrainings():
    made = planned(TABLE3, "seeds=[2, 3]")
    jobs = made.facts["jobs"]
    by_stage = works(made)
    one = works(planned(TABLE3, "seeds=[2]"))
    assert by_stage["streetworld"].amount == 2 * one["streetworld"].amount
    assert one["extract"].amount == 6 * one["index"].amount
    assert made.facts["pretrainings"] <= jobs
    assert by_stage["evaluate"].amount == jobs * made.data.eval_frames
    assert made.facts["jobs at a time"] == 2  # CPUs of the tests' machine


def test_the_memory_is_that_of_the_job_that_needs_the_most(tmp_path):
    words = [f"storage={tmp_path}/new", "stage=distill", "resources.cached_frames=1", "distill.optimiser.kind=sgd"]

    def memory(*jobs):
        return sum(plan_jobs(jobs, "m", Planner(machine(), read_rates())).memory.values())

    small = load_job(DEMO, words)
    for more in ("resources.cached_frames=9", "distill.optimiser.kind=adamw", "distill.batch_size=64"):
        large = load_job(DEMO, [*words, more])
        assert memory(small) < memory(large) == memory(large, small) == memory(small, large)


def test_memory_on_a_gpu_is_not_the_machines():
    def made(gpu_bytes, *words):
        there = Machine("a machine", ({"CPU": 8, "GPU": 2},), True, memory_bytes=10**12, gpu_memory_bytes=gpu_bytes)
        return planned(NUSCENES, *OFFICIAL, *SMALL_TEACHER, "stage=distill", *words, there=there)

    plan = made(80 * 10**9)
    assert plan.gpu_memory == plan.memory["network"] + plan.memory["step"]
    assert not any("memory" in note for note in plan.notes)
    on_gpu = plan_text(plan).partition(", and on its GPU ")[2]
    assert re.match(r"[\d.]+ GB \(network [\d.]+ MB, step [\d.]+ GB\)\n", on_gpu)
    (note,) = (note for note in made(4 * 10**9).notes if "memory" in note)
    assert note.startswith(f"memory: a GPU's training workers may want {plan.gpu_memory / 1e9:.1f} GB and a GPU of a")
    half = made(4 * 10**9, "resources.gpus_per_worker=0.5")
    assert any(f"may want {2 * plan.gpu_memory / 1e9:.1f} GB" in note for note in half.notes)
    without = made(4 * 10**9, "resources.gpus_per_worker=0")
    assert without.gpu_memory == 0
    assert "on its GPU" not in plan_text(without)


def test_settings_that_nothing_was_measured_with(tmp_path):
    words = (f"storage={tmp_path}/new", "student.voxel_size_m=0.2")
    made = planned(DEMO, *words)
    assert works(made)["distill"].seconds is None
    assert works(made)["extract"].seconds > 0
    assert "distill: not measured with these settings; no estimate" in plan_text(made)
    about = {"machine": "mine", "measured": "2026-11-24", "command": "by hand"}
    rows = [{"stage": "distill", "unit": "clouds", "per_second": 3.0, "match": {"student.voxel_size_m": 0.2}} | about]
    file = tmp_path / "rates.json"
    file.write_text(json.dumps({"rates": rows}))
    again = works(planned(DEMO, *words, rates=read_rates(file)))["distill"]
    assert again.seconds == pytest.approx(12 * 64 * 2 / 3 / 2)
    assert "mine" in again.sources[0]
    file.write_text(json.dumps({"rates": [rows[0] | {"per_second": -1}]}))
    with pytest.raises(ConfigError, match=r"rates\.0\.per_second=-1"):
        read_rates(file)


def test_json_and_arguments_that_are_refused(capsys, tmp_path):
    assert main(["plan", DEMO, f"storage={tmp_path}/new", "--json", "--cpus", "4"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["nodes"] == [{"CPU": 4.0, "GPU": values["machine"]["nodes"][0]["GPU"]}]
    assert values["seconds"] == pytest.approx(sum(stage["seconds"] for stage in values["stages"]))
    assert sum(values["memory"].values()) > values["memory"]["process"]
    for status, words, sentence in (
        (2, ["--frames", "0"], "--frames: 0: must be an integer above 0"),
        (2, ["--gpus", "-1"], "--gpus: -1: must be an integer of at least 0"),
        (2, ["--images-per-second", "nan"], "--images-per-second: nan: must be a number above 0"),
        (2, ["--price-per-gpu-hour", "inf"], "--price-per-gpu-hour: inf: must be a number"),
        (1, ["--dashboard", "http://x", "--gpus", "2"], "--dashboard cannot be combined with --cpus or --gpus"),
        (1, ["--job", DEMO], "--job JOB belongs to a search space"),
        (1, ["--rates", str(tmp_path / "none.json")], "cannot be read"),
    ):
        with pytest.raises(SystemExit) if status == 2 else contextlib.nullcontext():
            assert main(["plan", DEMO, *words]) == 1
        assert sentence in capsys.readouterr().err


MEASURE = r"""
import re, sys
from pathlib import Path
import torch
from clip2scene.jobfile import load_job
from clip2scene.stages import Stages
from clip2scene.training.fit import fit

stages = Stages(load_job(sys.argv[1], sys.argv[2:]))
training = stages.distillation()
training.build()
# Not getrusage's: a child inherits the peak of who started it.
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
fit(training, name="measured", folder=stages.storage.root / "train")
print(before, peak())
"""


def test_memory_of_a_worker_is_near_what_is_measured(streetworld_root, tmp_path):
    root, version = streetworld_root
    words = ["dataset.kind=nuscenes", f"dataset.root={root}", f"dataset.version={version}", f"storage={tmp_path}"]
    words += ["resources.num_workers=0", "distill.max_steps=1", "distill.num_sweeps=2", "distill.batch_size=4"]
    stages = Stages(load_job(DEMO, words))
    rng, shape = np.random.default_rng(0), (*stages.teacher.grid, stages.teacher.dim)
    frames = (*stages.train_frames, *stages.eval_frames)
    for frame in frames:
        features = {camera.name: rng.standard_normal(shape).astype(np.float16) for camera in frame.cameras}
        store.write_frame(stages.store_path, frame.frame_id, features, {}, stages.teacher.digest, stages.storage)
    about = {"index": stages.index.digest, "teacher": stages.teacher.digest, "grid": list(shape[:2]), "dim": shape[2]}
    counts = {"frames": len(frames), "images": 6 * len(frames), "broken": [], "dtype": "float16"}
    store.write_manifest(stages.store_path, about | counts, stages.storage)
    estimate = plan_jobs(
        [stages.job.model_copy(update={"stage": "distill"})], "m", Planner(machine(), read_rates())
    ).memory
    done = subprocess.run([sys.executable, "-c", MEASURE, DEMO, *words], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split()[-2:])
    beyond = sum(estimate.values()) - estimate["process"]
    assert peak - before > 150e6, "too small a job to say anything"
    assert beyond / WITHIN < peak - before < beyond * WITHIN
