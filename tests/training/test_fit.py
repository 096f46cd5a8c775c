"""The training loop: resumed and uninterrupted; test_two_workers.py has two Ray workers."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from clip2scene.config import DistillSettings, FinetuneSettings, OptimiserSettings, ScrSettings
from clip2scene.errors import ConfigError, DivergedError
from clip2scene.training.finetune import choose_labelled
from clip2scene.training.fit import _data_parallel, fit
from clip2scene.training.launch import launch


def run(training, folder, **callbacks):
    return fit(training, name="run", folder=folder, **callbacks)


def test_a_resumed_training_equals_an_uninterrupted_one(tiny, tmp_path):
    whole = run(tiny.distillation(), tmp_path / "whole")

    def stop(epoch, metrics):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny.distillation(), tmp_path / "parts", on_epoch=stop)
    epochs, steps = [], []
    resumed = run(
        training := tiny.distillation(),
        tmp_path / "parts",
        on_epoch=lambda epoch, metrics: epochs.append(epoch),
        on_steps=lambda count, restored=False: steps.append((count, restored)),
    )
    assert epochs == [1, 2, 3, 4]
    assert steps[0] == (training.steps_per_epoch, True)  # the second epoch was not saved
    assert sum(count for count, restored in steps if not restored) == 3 * training.steps_per_epoch
    assert all(torch.equal(whole.weights[key], value) for key, value in resumed.weights.items())


def test_a_final_checkpoint_that_is_damaged_is_trained_again(tiny, tmp_path, monkeypatch):
    whole = run(tiny.distillation(), tmp_path / "whole")
    launched = []

    def launch_and_damage(*args, **kwargs):
        newest = launch(*args, **kwargs)
        launched.append(newest.name)
        if len(launched) > 1:
            return newest
        (newest / "model.safetensors").write_bytes(b"")
        return newest.with_name("checkpoint_000002")

    monkeypatch.setattr("clip2scene.training.fit.launch", launch_and_damage)
    again = run(tiny.distillation(), tmp_path / "damaged")
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
    multiprocessing.set_forkserver_preload(["clip2scene.training.fit"])  # once for all ranks
    torch.multiprocessing.start_processes(three_ranks, (tmp_path,), nprocs=3, start_method="forkserver")
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
    assert choose_labelled(frames, FinetuneSettings(label_fraction=1.0)) == frames
    assert choose_labelled(frames, FinetuneSettings(label_fraction=0.5)) == frames[::2]
    by_scene = choose_labelled(frames, FinetuneSettings(protocol="slidr_scene", label_fraction=0.5))
    assert {frame.scene for frame in by_scene} == set(list(dict.fromkeys(f.scene for f in frames))[1::2])
    with pytest.raises(ConfigError, match=r"label_fraction=0.01: one scene in 100, and the training split has \d"):
        choose_labelled(frames, FinetuneSettings(protocol="slidr_scene", label_fraction=0.01))
