"""Keyframes as tensors: sweeps, pairs, augmentation, and what may never be read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2scene.config import AugmentSettings, DistillSettings
from clip2scene.data.clouds import read_cloud
from clip2scene.data.datasets import ego_half_edge_m
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import DataError
from clip2scene.geometry.interpolation import bilinear
from clip2scene.geometry.registration import choose_sweeps
from clip2scene.training.launch import Worker
from clip2scene.training.methods import UNSEEN, TeacherMethod, seen
from clip2scene.training.samples import SampleSource, augment, cached_reader, join, num_clouds, prefetched


@pytest.fixture
def later(tiny):
    """A keyframe with earlier sweeps."""
    return next(frame for frame in tiny.index.frames if len(frame.sweeps) >= 3)


def test_sweeps_are_separate_clouds_paired_with_the_same_images(tiny, later):
    one = SampleSource(tiny.index.root, tiny.store, num_sweeps=1).read(later)
    three = SampleSource(tiny.index.root, tiny.store, num_sweeps=3).read(later)
    assert three.cloud_N.unique().tolist() == [0, 1, 2]
    own = three.cloud_N == 0
    torch.testing.assert_close(three.points_NI[own], one.points_NI)
    assert (three.cloud_N[three.pair_point_P].bincount() > 100).all()
    torch.testing.assert_close(three.pair_xyz_P3, three.points_NI[three.pair_point_P, :3])
    assert three.pair_position_P2.min() > 0
    assert three.pair_position_P2.max() < 1


def test_an_earlier_sweep_loses_what_is_near_its_own_sensor(tiny, later):
    source = SampleSource(tiny.index.root, tiny.store, num_sweeps=3)
    whole, cut = source.read(later), replace(source, ego_half_edge_m=8.0).read(later)
    clouds = [read_cloud(tiny.index.root.path / sweep.path) for sweep in choose_sweeps(later, 3, 0.5)]
    far = [int((np.abs(cloud_N4[:, :2]).max(axis=1) >= 8).sum()) for cloud_N4 in clouds]
    assert cut.cloud_N.bincount().tolist() == [int((whole.cloud_N == 0).sum()), *far]
    assert all(kept < len(cloud_N4) for kept, cloud_N4 in zip(far, clouds, strict=True))
    assert len(cut.pair_point_P) < len(whole.pair_point_P)
    torch.testing.assert_close(cut.pair_xyz_P3, cut.points_NI[cut.pair_point_P, :3])
    # A street world's car is not hit.
    nuscenes = replace(source, ego_half_edge_m=ego_half_edge_m("streetworld")).read(later)
    assert torch.equal(nuscenes.points_NI, whole.points_NI)


def test_augmentation_moves_points_and_nothing_else(tiny, later):
    sample = SampleSource(tiny.index.root, tiny.store).read(later)
    moved = augment(sample, AugmentSettings(scale=0), np.random.default_rng(1))
    assert not torch.allclose(moved.points_NI, sample.points_NI)
    for column in ("pair_point_P", "pair_position_P2", "pair_xyz_P3", "features_MhwD"):
        assert torch.equal(getattr(moved, column), getattr(sample, column))
    norms = [s.points_NI[:, :3].norm(dim=1) for s in (moved, sample)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moved.points_NI[:, 2:], sample.points_NI[:, 2:])


def test_joined_keyframes_keep_their_own_pixels(tiny):
    source = SampleSource(tiny.index.root, tiny.store, num_sweeps=2)
    samples = [source.read(frame) for frame in tiny.index.frames[:3]]
    batch = join(samples)

    def pixels(sample):
        return bilinear(sample.features_MhwD, sample.pair_image_P, sample.pair_position_P2)

    torch.testing.assert_close(pixels(batch), torch.cat([pixels(sample) for sample in samples]))
    torch.testing.assert_close(batch.points_NI[batch.pair_point_P, :3], batch.pair_xyz_P3)
    assert batch.pair_frame_P.unique().tolist() == [0, 1, 2]
    assert int(batch.cloud_N[-1]) + 1 == sum(int(sample.cloud_N[-1]) + 1 for sample in samples)


def test_bilinear_equals_grid_sample():
    g = torch.Generator().manual_seed(0)
    grids, position = torch.randn(3, 5, 9, 4, generator=g), torch.rand(200, 2, generator=g)
    which = torch.randint(0, 3, (200,), generator=g)
    expected = torch.nn.functional.grid_sample(
        grids.permute(0, 3, 1, 2)[which], position[:, None, None] * 2 - 1, align_corners=False, padding_mode="border"
    )[:, :, 0, 0]
    torch.testing.assert_close(bilinear(grids, which, position), expected, rtol=1e-4, atol=1e-5)


def test_a_quarantined_image_gives_no_pairs(tiny, later, tmp_path):
    from clip2scene.teacher import store as stores

    kept = dict(list(tiny.store.read(later.frame_id).items())[1:])
    lost = next(c.name for c in later.cameras if c.name not in kept)
    stores.write_frame(tmp_path, later.frame_id, kept, {lost: "truncated"}, "random", tiny.store.storage)
    sample = SampleSource(tiny.index.root, replace(tiny.store, path=tmp_path)).read(later)
    whole = SampleSource(tiny.index.root, tiny.store).read(later)
    camera = [c.name for c in later.cameras].index(lost)
    assert len(sample.pair_point_P) == int((whole.pair_image_P != camera).sum())
    remaining = whole.features_MhwD[[i for i in range(len(later.cameras)) if i != camera]]
    assert torch.equal(sample.features_MhwD, remaining)


def test_a_keyframe_without_any_image_has_no_pairs_and_teaches_nothing(tiny, later, tmp_path):
    from clip2scene.teacher import store as stores

    stores.write_frame(
        tmp_path, later.frame_id, {}, {c.name: "truncated" for c in later.cameras}, "random", tiny.store.storage
    )
    sample = SampleSource(tiny.index.root, replace(tiny.store, path=tmp_path)).read(later)
    assert len(sample.points_NI) > 0
    assert len(sample.pair_point_P) == 0
    other = SampleSource(tiny.index.root, tiny.store).read(tiny.index.frames[0])
    assert torch.equal(join([sample, other]).features_MhwD, other.features_MhwD)
    assert not seen(sample).any()
    assert (TeacherMethod(tiny.text_CD).prepare(torch.device("cpu"))(sample) == UNSEEN).all()
    for method in ("clip2scene", "kl", "openscene", "ppkt"):
        training = tiny.distillation(method=method)
        model = training.build()
        terms = training.loss(model, sample, 0, 0)
        assert {value.item() for value in terms.values()} == {0}, method
        terms["loss"].backward()
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters()), method


def test_a_scene_without_cameras_is_read_and_has_no_pairs(tiny, later):
    sample = SampleSource(tiny.index.root, tiny.store, num_sweeps=2).read(replace(later, cameras=()))
    assert len(sample.points_NI) > 0
    assert len(sample.pair_point_P) == len(sample.features_MhwD) == 0
    assert sample.pair_position_P2.shape == (0, 2)
    assert sample.pair_position_P2.dtype == torch.float32
    assert not seen(sample).any()


def test_prefetched_batches_and_their_errors_are_the_same(tiny):
    source = SampleSource(tiny.index.root)
    assert [*prefetched(map(source.read, tiny.index.frames[:3]), lambda s: len(s.points_NI))] == [
        len(source.read(frame).points_NI) for frame in tiny.index.frames[:3]
    ]
    broken = replace(tiny.index.frames[1], cloud_path="nowhere.pcd.bin")
    batches = prefetched(map(source.read, (tiny.index.frames[0], broken)), lambda sample: sample)
    next(batches)
    with pytest.raises(DataError, match="nowhere"):
        next(batches)


@pytest.mark.parametrize("changes", [{}, {"sweep_window_s": 0.2}, {"sweep_choice": "random"}, {"num_sweeps": 1}])
def test_clouds_are_counted_as_they_are_read(tiny, changes):
    settings = DistillSettings(num_sweeps=4).model_copy(update=changes)
    source = SampleSource(tiny.index.root, None, settings.num_sweeps, settings.sweep_window_s, settings.sweep_choice)
    for frame in tiny.index.frames:
        sample = source.read(frame, np.random.default_rng(0))
        assert num_clouds(frame, settings) == int(sample.cloud_N.max()) + 1


def test_batches_read_by_several_threads_are_the_same(tiny):
    training, worker = tiny.distillation(batch_size=4), Worker(Path("unused"), lambda kind, value: None)

    def batches(read_map):
        read = cached_reader(training.source, training.frames, 3)
        return [batch for epoch in range(2) for batch in training._batches(read, worker, epoch, read_map)]

    with ThreadPoolExecutor(4) as readers:
        for one, several in zip(batches(map), batches(readers.map), strict=True):
            assert all(torch.equal(getattr(one, f.name), getattr(several, f.name)) for f in fields(one))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_pinned_batch_is_the_same_on_a_gpu(tiny, later):
    sample = SampleSource(tiny.index.root, tiny.store).read(later)
    there = sample.pinned().to(torch.device("cuda"))
    assert torch.equal(there.points_NI.cpu(), sample.points_NI)
    assert torch.equal(there.features_MhwD.cpu(), sample.features_MhwD)


def test_labels_are_read_only_where_asked_for(tiny, later):
    assert not len(SampleSource(tiny.index.root, tiny.store).read(later).labels_N)
    labelled = SampleSource(tiny.index.root, label_vocabulary=vocabulary("nuscenes"))
    assert len(labelled.read(later).labels_N) == len(labelled.read(later).points_NI)
    with pytest.raises(DataError, match="has no label file, and labels are needed"):
        labelled.read(replace(later, label_path=None))


def test_the_cache_is_bounded(tiny):
    read = cached_reader(SampleSource(tiny.index.root), tiny.index.frames, 2)
    first = read(0, None)
    assert read(0, None) is first
    for position in (1, 2):
        assert len(read(position, None).points_NI)
    assert read(0, None) is not first


def test_random_sweeps_are_drawn_again_every_time(tiny, later):
    source = SampleSource(tiny.index.root, num_sweeps=3, sweep_choice="random")
    read, rng = cached_reader(source, (later,), 2), np.random.default_rng(0)
    assert len({read(0, rng).points_NI.sum().item() for _ in range(10)}) > 1
