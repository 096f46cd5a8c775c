"""Full fine-tuning moves the whole network; a linear probe only its classifier."""

from __future__ import annotations

import pytest
import torch

from clip2scene.config import FinetuneSettings, OptimiserSettings
from clip2scene.training.fit import fit
from clip2scene.training.samples import join

PROBE = FinetuneSettings(mode="linear_probe")


@pytest.fixture(scope="module")
def distilled(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    return fit(tiny.distillation(epochs=1), name="run", folder=folder).weights


def train(tiny, folder, **changes):
    """Weights before and after, and the history."""
    training = tiny.finetuning(**changes)
    torch.manual_seed(training.seed)
    before = {key: value.clone() for key, value in training.build().state_dict().items()}
    fitted = fit(training, name="run", folder=folder)
    return before, fitted.weights, fitted.history


def moved(before, after):
    """Whether (any of the backbone, including batch norm's statistics; all of the classifier) has changed."""
    changed = {key: not torch.equal(value, after[key]) for key, value in before.items()}
    return (
        any(value for key, value in changed.items() if key.startswith("backbone.")),
        all(value for key, value in changed.items() if key.startswith("heads.")),
    )


@pytest.mark.parametrize("start", ["pretrained", "scratch"])
def test_a_linear_probe_moves_only_the_classifier(tiny, tmp_path, distilled, start):
    pretrained = distilled if start == "pretrained" else None
    before, after, history = train(tiny, tmp_path, settings=PROBE, pretrained=pretrained, epochs=8)
    assert moved(before, after) == (False, True)
    if pretrained is not None:
        assert all(torch.equal(after[k], v) for k, v in pretrained.items() if k.startswith("backbone."))
    assert history[-1]["loss"] < history[0]["loss"]


def test_full_finetuning_moves_both(tiny, tmp_path, distilled):
    before, after, _ = train(tiny, tmp_path, pretrained=distilled, epochs=1)
    assert moved(before, after) == (True, True)


def test_lovasz_is_added_to_the_cross_entropy(tiny):
    terms = []
    for loss in ("cross_entropy", "lovasz"):
        training = tiny.finetuning(settings=FinetuneSettings(loss=loss))
        torch.manual_seed(0)
        terms.append(training.loss(training.build(), join([training.source.read(f) for f in training.frames]), 0, 0))
    assert 0 < terms[1]["lovasz"] < 1
    assert terms[1]["loss"].item() == pytest.approx((terms[0]["loss"] + terms[1]["lovasz"]).item())


def test_the_head_learns_faster_than_the_backbone_by_its_scale(tiny, tmp_path):
    """SGD without decay moves a weight by the learning rate times the gradient, which is equal in both runs."""
    plain = OptimiserSettings(kind="sgd", learning_rate=1e-3, momentum=0, dampening=0, weight_decay=0)
    steps = []
    for scale in (1.0, 100.0):
        settings = FinetuneSettings(head_learning_rate_scale=scale)
        before, after, _ = train(tiny, tmp_path / f"{scale}", settings=settings, optimiser=plain, epochs=1)
        steps.append({key: after[key] - value for key, value in before.items() if value.is_floating_point()})
    for key, step in steps[0].items():
        faster = 100 if key.startswith("heads.") else 1
        torch.testing.assert_close(steps[1][key], faster * step, rtol=1e-3, atol=1e-6 * faster)


def test_weight_decay_and_momentum_leave_a_frozen_backbone_alone(tiny, tmp_path, distilled):
    sgd = OptimiserSettings(kind="sgd", learning_rate=0.01, weight_decay=0.1)
    before, after, _ = train(tiny, tmp_path, settings=PROBE, pretrained=distilled, optimiser=sgd, epochs=1)
    assert moved(before, after) == (False, True)


def test_data_parallel_training_takes_a_frozen_backbone(tiny, distilled):
    model = tiny.finetuning(settings=PROBE, pretrained=distilled).build()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model).train()
        points = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * 10
        wrapped(points, torch.zeros(200, dtype=torch.long))["classifier"].square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(v, distilled[k]) for k, v in model.state_dict().items() if k.startswith("backbone."))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        "heads.classifier.weight",
        "heads.classifier.bias",
    }
