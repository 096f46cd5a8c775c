"""Pre-training by every method: it learns, it is seeded, every parameter has a gradient, no label is opened."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace

import pytest
import torch

from clip2scene.config import DistillSettings, Job
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.vocabulary import vocabulary
from clip2scene.training.fit import fit
from clip2scene.training.objectives import LOSSES, Step
from clip2scene.training.samples import SampleSource, join
from tiny_training import CONTRAST


def train(training, folder):
    return fit(training, name="run", folder=folder)


def first_batch(training):
    return join([training.source.read(frame) for frame in training.frames])


def equal(first, second):
    return all(torch.equal(second.weights[key], value) for key, value in first.weights.items())


@pytest.mark.parametrize("method", LOSSES)
def test_every_method_learns_and_is_seeded(distillation, tmp_path, method):
    first = train(distillation(method), tmp_path / "first")
    assert first.history[-1]["loss"] < first.history[0]["loss"]
    assert ("agreement" in first.history[0]) == (method != "pointcontrast")
    assert equal(first, train(distillation(method), tmp_path / "again"))
    assert not equal(first, train(distillation(method, seed=1), tmp_path / "other"))


def test_a_contrastive_step_draws_different_rows_seeded_and_at_most_so_many():
    settings, cpu = DistillSettings(contrast=CONTRAST), torch.device("cpu")
    step = Step(settings, voxel_size_m=1, text_CD=torch.zeros(1, 1), seed=0, epoch=0, number=0, rank=0)
    rows = step.rows(1000, cpu)
    assert len(set(rows.tolist())) == len(rows) == CONTRAST.max_pairs
    assert torch.equal(rows, step.rows(1000, cpu))
    assert not any(torch.equal(rows, replace(step, **{name: 1}).rows(1000, cpu)) for name in ("seed", "number", "rank"))
    assert sorted(step.rows(5, cpu).tolist()) == [0, 1, 2, 3, 4]


def test_pointcontrast_draws_voxels_not_points(distillation):
    training = distillation("pointcontrast")
    batch = first_batch(training)
    denser = replace(
        batch,
        points_NI=torch.cat((batch.points_NI, batch.points_NI + 1e-9)),
        cloud_N=torch.cat((batch.cloud_N, batch.cloud_N)),
    )
    projection = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))

    def network(points_NI, cloud_N):
        return {"scr": points_NI[:, :3] @ projection}

    losses = [training.loss(network, points, 0, 0)["loss"] for points in (batch, denser)]
    assert losses[0] > 0
    assert losses[0] == losses[1]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_both_variants_learn_through_the_switch(distillation, tmp_path, variant):
    values = {"name": "x", "variant": variant, "dataset": {"kind": "streetworld"}}
    settings = Job.model_validate(values | {"distill": {"s3": {"start_epoch": 2}}}).distill
    history = train(distillation(settings=settings), tmp_path).history
    assert history[1]["loss"] < history[0]["loss"]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in history)


def test_every_switch_changes_the_loss(distillation):
    switches = [
        {},
        {"scr": {"form": "cross_entropy"}},
        {"scr": {"tau": 0.1}},
        {"stcr": {"lambda": 0.1}},
        {"stcr": {"grid": "voxel"}},
        {"stcr": {"pixel_term": False}},
        {"stcr": {"cell_text": "first"}},
        {"stcr": {"max_points_per_cell": 1}},
        {"stcr": {"max_points_per_cell": 1000, "count_empty_slots": True}},
        {"s3": {"start_epoch": 0, "probability": 1.0}},
        {"normalise_features": False},
    ]
    losses = []
    for switch in switches:
        training = distillation(settings=DistillSettings.model_validate(switch))
        torch.manual_seed(0)
        losses.append(training.loss(training.build(), first_batch(training), 0, 0)["loss"].item())
    assert len({round(loss, 5) for loss in losses}) == len(switches)


def test_voxel_cells_are_the_students_voxels(distillation, tiny):
    losses = []
    for stcr in ({"grid": "voxel"}, {"grid_size_m": tiny.distillation().student.voxel_size_m}):
        training = distillation(settings=DistillSettings(stcr=stcr))
        torch.manual_seed(0)
        losses.append(training.loss(training.build(), first_batch(training), 0, 0)["stcr"].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "settings",
    [{"method": method} for method in LOSSES] + [{"scr": {"weight": 0}}, {"stcr": {"weight": 0}}],
    ids=str,
)
def test_every_parameter_has_a_gradient(distillation, settings):
    """Data-parallel training needs this: it fails at a parameter without one."""
    training = distillation(settings=DistillSettings(**settings))
    model = training.build()
    training.loss(model, first_batch(training), 0, 0)["loss"].backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_pairs_without_a_superpixel_are_left_out(distillation):
    training = distillation("slidr")
    batch = first_batch(training)
    torch.manual_seed(0)
    model = training.build()
    before = training.loss(model, batch, 0, 0)["loss"].item()
    batch.pair_segment_P[batch.pair_segment_P % 2 == 0] = -1
    assert 0 < training.loss(model, batch, 0, 0)["loss"].item() < before


def test_impossible_trainings_are_refused(tiny):
    source = SampleSource(tiny.index.root, tiny.store, label_vocabulary=vocabulary("nuscenes"))
    with pytest.raises(ValueError, match="must not read labels"):
        tiny.distillation(source=source, settings=DistillSettings(method="kl"))
    with pytest.raises(AssertionError, match="needs a source with superpixels"):
        tiny.distillation(settings=DistillSettings(method="slidr"))


_opened: list[str] | None = None


def _listen(event, arguments):
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


@pytest.mark.parametrize("method", LOSSES)
def test_training_never_opens_a_label_file(distillation, tiny, tmp_path, method):
    """The process's record of opened files has none, and training works where there are none."""
    global _opened
    sys.addaudithook(_listen)
    _opened = []
    try:
        with_labels = train(distillation(method, epochs=1), tmp_path / "with")
    finally:
        opened, _opened = _opened, None
    label_files = {frame.label_path for frame in tiny.index.frames}
    assert all((tiny.index.root.path / path).is_file() for path in label_files)
    assert any("LIDAR_TOP" in name for name in opened)
    assert not [name for name in opened if "lidarseg" in name]

    bare = tmp_path / "bare"
    shutil.copytree(tiny.index.root.path, bare, ignore=shutil.ignore_patterns("lidarseg", "*_lidarseg.bin"))
    assert not any((bare / path).exists() for path in label_files)
    assert equal(with_labels, train(distillation(method, root=DataRoot(bare), epochs=1), tmp_path / "without"))
