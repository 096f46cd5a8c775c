"""Training in half precision: the loop and its scaled loss with a network that has fp16 on CPUs; spconv on GPUs."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import ray
import torch

from clip2scene.config import FinetuneSettings, OptimiserSettings, ResourceSettings
from clip2scene.errors import ConfigError
from clip2scene.jobfile import load_job
from clip2scene.training.finetune import Finetuning
from clip2scene.training.fit import fit
from clip2scene.training.samples import join
from commands import REPOSITORY

JOBS = REPOSITORY / "jobs"
HERE = ResourceSettings(num_workers=0, checkpoint_every_epochs=1)


class PointNetwork(torch.nn.Module):
    seen: set[torch.dtype] = set()  # noqa: RUF012
    latest: PointNetwork

    def __init__(self):
        super().__init__()
        PointNetwork.latest = self
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))

    def forward(self, points_NI, cloud_N):
        logits_NC = self.layers(points_NI)
        self.seen.add(logits_NC.dtype)
        return {"classifier": logits_NC}


@dataclasses.dataclass(frozen=True)
class PointTraining(Finetuning):
    """Scales the loss by ``factor``: a large one overflows fp16 until the loss scale is small enough."""

    factor: float = 1.0

    def build(self):
        return PointNetwork()

    def loss(self, *args):
        terms = super().loss(*args)
        return terms | {"loss": terms["loss"] * self.factor}


@dataclasses.dataclass(frozen=True)
class RankedTraining(PointTraining):
    """Only rank 0's loss is large; ``apart`` is the distance between the ranks' weights before the step."""

    def loss(self, *args):
        rank = torch.distributed.get_rank()
        terms = Finetuning.loss(self, *args)
        mine = torch.nn.utils.parameters_to_vector(PointNetwork.latest.parameters()).detach()
        least, most = mine.clone(), mine.clone()
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return terms | {"loss": terms["loss"] * (self.factor if rank == 0 else 1), "apart": (most - least).max()}


@pytest.fixture
def training(tiny):
    def make(precision, factor=1.0, **changes):
        plain = tiny.finetuning(**changes, settings=FinetuneSettings(precision=precision), resources=HERE)
        values = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return PointTraining(**values, factor=factor)

    return make


def run(training, folder, **callbacks):
    return fit(training, name="run", folder=folder, **callbacks)


def scaler_state(folder):
    newest = max(folder.glob("run/checkpoint_*"))
    return torch.load(newest / "optimiser.pt", weights_only=True)["scaler"]


def test_the_network_computes_in_fp16_and_learns_the_same(training, tmp_path):
    fitted = {}
    for precision, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        PointNetwork.seen.clear()
        fitted[precision] = run(training(precision, epochs=60), tmp_path / precision)
        assert PointNetwork.seen == {dtype}
        assert {value.dtype for value in fitted[precision].weights.values()} == {torch.float32}
    full, half = fitted["fp32"].history, fitted["fp16"].history
    assert full != half
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.03)
    assert half[-1]["loss"] < 0.9 * half[0]["loss"]
    assert not scaler_state(tmp_path / "fp32")
    assert 2**10 < scaler_state(tmp_path / "fp16")["scale"] < 2**16  # it starts at 2**16, which overflows


def test_steps_that_overflow_are_skipped_and_the_scale_survives_a_restart(training, tmp_path):
    sgd = OptimiserSettings(kind="sgd", learning_rate=1e-9)
    overflowing = training("fp16", factor=1e6, epochs=6, optimiser=sgd)

    def stop(epoch, metrics):
        if epoch == 3:
            raise KeyboardInterrupt

    whole = run(overflowing, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(overflowing, tmp_path / "parts", on_epoch=stop)
    before = scaler_state(tmp_path / "parts")["scale"]
    resumed = run(overflowing, tmp_path / "parts")
    assert before < 2**16
    assert scaler_state(tmp_path / "parts") == scaler_state(tmp_path / "whole")
    assert all(torch.equal(whole.weights[key], value) for key, value in resumed.weights.items())
    assert all(value.isfinite().all() for value in whole.weights.values())


@pytest.mark.long
def test_ranks_agree_on_the_scale(training, tmp_path, ray_cluster):
    """If only rank 0 overflows, both ranks skip the step; otherwise their weights would diverge."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import it
    two = ResourceSettings(num_workers=2, checkpoint_every_epochs=1)
    sgd = OptimiserSettings(kind="sgd", learning_rate=1e-9)
    overflowing = vars(training("fp16", factor=1e6, epochs=30, optimiser=sgd)) | {"resources": two}
    fitted = run(RankedTraining(**overflowing), tmp_path)
    assert scaler_state(tmp_path)["scale"] < 2**16
    assert all(row["apart"] == 0 for row in fitted.history)


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_fp16_without_gpus_is_refused(stage):
    with pytest.raises(ConfigError, match=rf"{stage}\.precision=fp16 needs resources\.gpus_per_worker above 0"):
        load_job(JOBS / "demo.yaml", [f"{stage}.precision=fp16"])
    job = load_job(JOBS / "nuscenes.yaml", [f"{stage}.precision=fp16", "dataset.root=/data"])
    assert getattr(job, stage).precision == "fp16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", ["clip2scene", "pointcontrast"])
def test_a_step_in_fp16_has_the_gradients_of_fp32(distillation, method):
    training = distillation(method)
    batch = join([training.source.read(frame) for frame in training.frames]).to(torch.device("cuda"))
    gradients = []
    for half in (False, True):
        torch.manual_seed(0)
        model = training.build().cuda()
        network = torch.autocast("cuda", torch.float16, enabled=half)(lambda *given: model(*given))  # noqa: B023
        features = network(batch.points_NI, batch.cloud_N)["scr"]
        assert features.dtype == (torch.float16 if half else torch.float32)
        (2**10 * training.loss(network, batch, 0, 0)["loss"]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]) / 2**10)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
