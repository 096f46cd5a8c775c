"""The training loop: in this process and on two Ray workers, resumed and uninterrupted."""

from __future__ import annotations

import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clip2scene.config import ConfigError, DistillSettings, OptimiserSettings, ResourceSettings, ScrSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.training.evaluate import ConstantMethod, Scores, StudentMethod, TeacherMethod, evaluate, label_counts
from clip2scene.training.finetune import choose_labelled
from clip2scene.training.fit import Fitted, _data_parallel, fit
from clip2scene.training.launch import DivergedError, TrainingError, launch, worker_group
from clip2scene.training.samples import SampleSource

HERE = ResourceSettings(num_workers=0)
LABELS = vocabulary("nuscenes")


def run(training, folder, resources=HERE, **callbacks):
    return fit(training, name="run", folder=folder, resources=resources, **callbacks)


def test_a_resumed_training_equals_an_uninterrupted_one(tiny, tmp_path):
    whole = run(tiny.distillation(), tmp_path / "whole")

    def stop(epoch, metrics):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.distillation(), tmp_path / "parts", on_epoch=stop)
    epochs = []
    resumed = run(tiny.distillation(), tmp_path / "parts", on_epoch=lambda epoch, metrics: epochs.append(epoch))
    assert epochs == [1, 2, 3, 4]
    assert all(torch.equal(whole.weights[key], value) for key, value in resumed.weights.items())


def test_a_final_checkpoint_that_is_damaged_is_trained_again(tiny, tmp_path, monkeypatch):
    often = ResourceSettings(num_workers=0, checkpoint_every_epochs=1)
    whole = run(tiny.distillation(), tmp_path / "whole", often)
    launched = []

    def launch_and_damage(*args, **kwargs):
        newest = launch(*args, **kwargs)
        launched.append(newest.name)
        if len(launched) > 1:
            return newest
        (newest / "model.safetensors").write_bytes(b"")
        return newest.with_name("checkpoint_000002")

    monkeypatch.setattr("clip2scene.training.fit.launch", launch_and_damage)
    again = run(tiny.distillation(), tmp_path / "damaged", often)
    assert launched == ["checkpoint_000003", "checkpoint_000004"]
    assert len(again.history) == 4
    assert all(torch.equal(whole.weights[key], value) for key, value in again.weights.items())


def three_ranks(rank, folder):
    """Six steps of a network, and the same with a restart after three; rank 0 reports whether the results are equal."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)

    def learn(weights, steps):
        torch.manual_seed(0)
        layers = (layer for _ in range(6) for layer in (torch.nn.Linear(97, 97), torch.nn.ReLU()))
        model = torch.nn.Sequential(*layers, torch.nn.Linear(97, 300))
        model.load_state_dict(weights or model.state_dict())
        wrapped, optimiser = _data_parallel(model), torch.optim.SGD(model.parameters(), 0.1)
        for step in steps:
            inputs = torch.randn(8, 97, generator=torch.Generator().manual_seed(3 * step + rank))
            optimiser.zero_grad()
            wrapped(inputs).square().mean().backward()
            optimiser.step()
        return model.state_dict()

    whole, parts = learn(None, range(6)), learn(learn(None, range(3)), range(3, 6))
    if rank == 0:
        same = all(torch.equal(value, parts[name]) for name, value in whole.items())
        (folder / "same").write_text(str(same))
    torch.distributed.destroy_process_group()


def test_three_restarted_ranks_sum_their_gradients_in_the_same_order(tmp_path):
    torch.multiprocessing.spawn(three_ranks, (tmp_path,), nprocs=3)
    assert (tmp_path / "same").read_text() == "True"


def test_max_steps_ends_early_and_a_short_dataset_fills_its_batches(tiny, tmp_path):
    steps = []
    fitted = run(
        tiny.distillation(frames=tiny.index.frames[:1], batch_size=4, epochs=20, max_steps=3),
        tmp_path,
        on_steps=steps.append,
    )
    assert sum(steps) == 3
    assert len(fitted.history) == 3


@pytest.mark.parametrize("weight", [(1, 0), (0, 1)])
def test_either_loss_alone(tiny, tmp_path, weight):
    settings = DistillSettings(scr={"weight": weight[0]}, stcr={"weight": weight[1]})
    history = run(tiny.distillation(settings=settings, epochs=1), tmp_path).history
    kept = "scr" if weight[0] else "stcr"
    assert history[0]["loss"] == pytest.approx(history[0][kept])


def test_a_diverging_run_says_so(tiny, tmp_path):
    wild = tiny.distillation(
        optimiser=OptimiserSettings(learning_rate=1e30),
        settings=DistillSettings(scr=ScrSettings(), normalise_features=False),
    )
    with pytest.raises(DivergedError, match=r"not finite after epoch \d+"):
        run(wild, tmp_path)


def test_finetuning_starts_from_the_backbone_it_is_given(tiny, tmp_path):
    student = run(tiny.distillation(epochs=1), tmp_path / "distill").weights
    start = tiny.finetuning(pretrained=student).build().state_dict()
    assert all(torch.equal(start[k], v) for k, v in student.items() if k.startswith("backbone."))
    fitted = run(tiny.finetuning(pretrained=student), tmp_path / "finetune")
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]


def test_labelled_fractions(tiny):
    frames = tiny.index.frames
    assert choose_labelled(frames, "clip2scene_frame", 1.0) == frames
    assert choose_labelled(frames, "clip2scene_frame", 0.5) == frames[::2]
    by_scene = choose_labelled(frames, "slidr_scene", 0.5)
    assert {frame.scene for frame in by_scene} == set(list(dict.fromkeys(f.scene for f in frames))[1::2])
    with pytest.raises(ConfigError, match=r"label_fraction=0.01: one scene in 100, and the training split has \d"):
        choose_labelled(frames, "slidr_scene", 0.01)


@dataclass(frozen=True)
class OnTwo:
    """What two Ray workers did: a training that failed, one by the workers that came after those, and its scores."""

    folder: Path
    failure: TrainingError
    heard: list[tuple[int, dict[str, float]]]
    fitted: Fitted
    here: Scores
    there: Scores


@pytest.fixture(scope="module")
def on_two(tiny, ray_cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-two")
    shutil.copytree(tiny.index.root, folder / "world")
    (folder / "world" / tiny.index.frames[1].cloud_path).write_bytes(b"123")
    broken = tiny.distillation(source=SampleSource(folder / "world", tiny.store))
    student = run(tiny.distillation(epochs=1), folder / "student").weights
    methods = {
        "teacher": TeacherMethod(tiny.text_CD),
        "student": StudentMethod(tiny.distillation().student, student, tiny.text_CD, 16),
        "constant": ConstantMethod(10),
    }
    source = SampleSource(tiny.index.root, tiny.store, label_vocabulary=LABELS)
    two, heard = ResourceSettings(num_workers=2, max_failures=0), []
    with worker_group(two):
        with pytest.raises(TrainingError) as caught:
            run(broken, folder / "broken", two)
        fitted = run(tiny.distillation(epochs=2), folder / "two", two, on_epoch=lambda *about: heard.append(about))
        here, there = (
            evaluate(
                tiny.index.frames, source, methods, num_classes=16, name="evaluate", folder=folder, resources=resources
            )
            for resources in (HERE, two)
        )
    return OnTwo(folder, caught.value, heard, fitted, here, there)


def test_a_damaged_cloud_stops_the_workers_with_its_message_and_the_next_gets_new_ones(on_two):
    assert re.search(r"LIDAR_TOP.*bytes", str(on_two.failure))
    assert "\n" not in str(on_two.failure)
    assert len(on_two.fitted.history) == 2
    assert not list(on_two.folder.rglob(".workers*"))


def test_two_workers_train_like_one(tiny, on_two):
    assert [epoch for epoch, _ in on_two.heard] == [1, 2]
    assert on_two.heard[-1][1]["loss"] == pytest.approx(on_two.fitted.history[-1]["loss"])
    assert set(on_two.fitted.weights) == set(tiny.distillation().build().state_dict())


def test_two_workers_count_like_one(tiny, on_two):
    """Exactly the counts of one process."""
    here, there = on_two.here.counts, on_two.there.counts
    for method in here:
        for domain in ("seen", "all"):
            assert (here[method][domain] == there[method][domain]).all()
    source = SampleSource(tiny.index.root, tiny.store, label_vocabulary=LABELS)
    labelled = label_counts(tiny.index.frames, source, 16)
    assert (here["constant"]["all"].sum(1) == labelled).all()
    assert here["constant"]["all"][:, :10].sum() == 0
    assert here["teacher"]["all"].sum() == here["student"]["seen"].sum() < labelled.sum()
    assert set(on_two.there.example) == {"points", "truth", *here}


def test_workers_that_do_not_see_the_folder_say_so_before_they_train(tiny, tmp_path, ray_cluster):
    def unmark():
        while not (marks := list(tmp_path.glob(".workers-*/mark"))):
            time.sleep(0.01)
        marks[0].unlink()  # as on a node that does not share the folder

    threading.Thread(target=unmark, daemon=True).start()
    with pytest.raises(TrainingError, match="does not see this folder of the driver's; give a storage"):
        run(tiny.distillation(epochs=1), tmp_path, ResourceSettings(num_workers=2, max_failures=0))
    assert not list(tmp_path.glob("run/checkpoint_*"))


def test_the_same_training_started_twice_is_done_once(tmp_path, caplog):
    started, steps = threading.Event(), []

    def work(worker):
        if worker.last_checkpoint() is None:
            steps.append("trained")
            started.set()
            while "another run trains this; waiting for it" not in caplog.text:
                time.sleep(0.01)
            worker.save(lambda folder: (folder / "weights").write_text("w"))

    def start():
        ended.append(launch(work, name="run", folder=tmp_path, resources=HERE))

    ended: list[Path | None] = []
    both = [threading.Thread(target=start) for _ in range(2)]
    both[0].start()
    assert started.wait(timeout=20)
    both[1].start()
    for thread in both:
        thread.join(timeout=20)
    assert steps == ["trained"]
    assert [folder.name for folder in ended if folder] == ["checkpoint_000000"] * 2
