"""Annotation-free methods against plain loops, and how points and answers are counted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clip2scene.config import ResourceSettings, TeacherSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.geometry.interpolation import bilinear
from clip2scene.student.network import Student
from clip2scene.teacher.clip import load_teacher
from clip2scene.teacher.prompts import text_embeddings
from clip2scene.training.evaluate import answered, evaluate
from clip2scene.training.methods import UNSEEN, ConstantMethod, EnsembleMethod, PointClipMethod, StudentMethod
from clip2scene.training.samples import SampleSource

HERE = ResourceSettings(num_workers=0)
CPU = torch.device("cpu")
WORDS = vocabulary("nuscenes")


@dataclass(frozen=True)
class Silent:
    """Answers every other point."""

    def prepare(self, device):
        return lambda sample: torch.where(torch.arange(len(sample.points_NI)) % 2 == 0, 4, UNSEEN)


def labelled(tiny):
    return SampleSource(tiny.index.root, tiny.store, label_vocabulary=WORDS)


def score(tiny, folder, methods, source=None, resources=HERE):
    return evaluate(
        tiny.index.frames,
        source or labelled(tiny),
        methods,
        num_classes=16,
        name="evaluate",
        folder=folder,
        resources=resources,
    )


@pytest.fixture(scope="module")
def student(tiny):
    training = tiny.distillation()
    torch.manual_seed(0)
    model = training.build()
    return training.student, model.state_dict()


@pytest.fixture(scope="module")
def pointclip():
    settings = TeacherSettings(model="streetworld", image_height_px=224, image_width_px=400)
    text_CD = text_embeddings(load_teacher(settings), WORDS, "depth_map")
    return PointClipMethod(settings, text_CD)


def test_in_seen_all_methods_are_scored_on_the_same_points_and_no_answer_is_wrong(tiny, tmp_path):
    scores = score(tiny, tmp_path, {"constant": ConstantMethod(4), "silent": Silent(), "both": ConstantMethod(0)})
    counts = scores.counts
    per_class = counts["constant"]["seen"].sum(1)
    for method in counts.values():
        np.testing.assert_array_equal(method["seen"].sum(1), per_class)
    silent, sure = counts["silent"], counts["constant"]
    assert 0 < silent["all"].sum() < sure["all"].sum()
    assert 0 < silent["seen"][4, 4] < sure["seen"][4, 4]
    assert silent["seen"][4].sum() - silent["seen"][4, 4] > 0


def test_a_missing_answer_counts_as_wrong_and_adds_no_class():
    classes = np.array([2, 2, 2, 5, 5, UNSEEN, UNSEEN, UNSEEN])
    truth = np.array([3, 1, 3, 6, 0, 3, 6, 0])
    full = answered(classes, truth, 16)
    np.testing.assert_array_equal(full, [2, 2, 2, 5, 5, 5, 2, 2])
    assert (full[5:7] != truth[5:7] - 1).all()


def test_the_ensemble_equals_a_plain_loop(tiny, student):
    settings, weights = student
    sample = labelled(tiny).read(tiny.index.frames[0])
    with torch.inference_mode():
        # Cosines, so the length of the texts does not matter.
        classes = EnsembleMethod(settings, weights, 3 * tiny.text_CD).prepare(CPU)(sample)
        model = Student(settings, embedding_dim=12)
        model.load_state_dict(weights)
        points_ND = model.eval()(sample.points_NI, sample.cloud_N)["scr"]
        pixels_PD = normalize(bilinear(sample.features_MhwD, sample.pair_image_P, sample.pair_position_P2), dim=1)
    winners = []
    for point in range(len(sample.points_NI)):
        cosines_3d = normalize(points_ND[point], dim=0) @ tiny.text_CD.T
        expected, winner = int(cosines_3d.argmax()), "3d"
        mine = pixels_PD[sample.pair_point_P == point]
        if len(mine):
            cosines_2d = normalize(mine.mean(0), dim=0) @ tiny.text_CD.T
            if cosines_2d.max() > cosines_3d.max():
                expected, winner = int(cosines_2d.argmax()), "2d"
            else:
                winner = "3d of both"
        winners.append(winner)
        assert classes[point] == expected
    assert set(winners) == {"2d", "3d", "3d of both"}


def test_a_student_of_one_loss_is_scored_by_its_one_head(tiny, student):
    settings, weights = student
    alone = {name: value for name, value in weights.items() if not name.startswith("heads.stcr.")}
    assert len(alone) < len(weights)
    sample = labelled(tiny).read(tiny.index.frames[0])
    with torch.inference_mode():
        for method in (
            StudentMethod(settings, weights, tiny.text_CD, 16),
            EnsembleMethod(settings, weights, tiny.text_CD),
        ):
            expected = method.prepare(CPU)(sample)
            assert torch.equal(replace(method, weights=alone).prepare(CPU)(sample), expected)


def test_pointclip_answers_every_point_from_the_cloud_alone_and_deterministically(tiny, pointclip):
    sample = labelled(tiny).read(tiny.index.frames[0])
    with torch.inference_mode():
        predict = pointclip.prepare(CPU)
        classes = predict(sample)
        without_cameras = SampleSource(tiny.index.root).read(tiny.index.frames[0])
        again = pointclip.prepare(CPU)(without_cameras)
        bare = replace(without_cameras, points_NI=sample.points_NI * torch.tensor([1, 1, 1, 0]))
        assert torch.equal(predict(bare), classes)
    assert classes.shape == (len(sample.points_NI),)
    assert classes.dtype == torch.int64
    assert torch.equal(again, classes)
    assert classes.min() >= 0
    assert classes.max() < 16
    assert len(classes.unique()) > 1
    moved = torch.cat((sample.points_NI[:, :3] + torch.tensor([100.0, -50, 7]), sample.points_NI[:, 3:]), dim=1)
    centred = replace(pointclip, sensor_at_centre=True)
    with torch.inference_mode():
        here, there = (centred.prepare(CPU)(replace(sample, points_NI=p)) for p in (sample.points_NI, moved))
    # Seen from its centre, the position of a cloud does not matter, except for rounding at the edges of pixels.
    assert (here == there).float().mean() > 0.9
    assert not torch.equal(here, classes)


def test_pointclip_has_no_answer_at_the_position_of_the_sensor(tiny, pointclip):
    sample = SampleSource(tiny.index.root).read(tiny.index.frames[0])
    points = sample.points_NI.clone()
    points[:3, :3] = 0
    with torch.inference_mode():
        classes = pointclip.prepare(CPU)(replace(sample, points_NI=points))
    assert (classes[:3] == UNSEEN).all()
    assert (classes[3:] != UNSEEN).all()
