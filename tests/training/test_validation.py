"""Scores during training equal those of an evaluation and of plain loops."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from clip2scene.config import ResourceSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.training.evaluate import evaluate
from clip2scene.training.fit import fit
from clip2scene.training.launch import Worker
from clip2scene.training.methods import StudentMethod, TeacherMethod, seen
from clip2scene.training.metrics import confusion, mean_iou
from clip2scene.training.samples import SampleSource
from clip2scene.training.validation import CELL_M, Validation, same_in_both_sweeps

HERE = ResourceSettings(num_workers=0)


@pytest.fixture
def validation(tiny):
    source = SampleSource(tiny.index.root, tiny.store, num_sweeps=2, label_vocabulary=vocabulary("nuscenes"))
    return Validation(tiny.index.frames[4:], source, tiny.text_CD)


def test_scores_are_those_of_an_evaluation_of_the_same_weights(tiny, validation, tmp_path):
    training = tiny.distillation(epochs=2, validation=validation)
    fitted = fit(training, name="run", folder=tmp_path)
    method = StudentMethod(training.student, fitted.weights, tiny.text_CD, 16)
    source = dataclasses.replace(validation.source, num_sweeps=1)
    scores = evaluate(
        validation.frames, source, {"student": method}, num_classes=16, name="e", folder=tmp_path, resources=HERE
    )
    last = fitted.history[-1]
    # There the network got two sweeps as separate clouds, here one: batch norm in eval mode treats them independently.
    assert last["verifying/miou"] == pytest.approx(mean_iou(scores.counts["student"]["seen"]), abs=1e-6)
    assert last["verifying/label_free"] == pytest.approx(
        (last["verifying/agreement"] * last["verifying/consistency"]) ** 0.5
    )
    assert 0 < last["verifying/consistency"] <= 1


def test_agreement_takes_the_teacher_for_the_truth(tiny, validation):
    model = tiny.distillation().build()
    scores = validation.prepare(Worker(Path(), lambda kind, value: None))(model)
    counts = np.zeros((16, 16), dtype=np.int64)
    model.eval()
    for frame in validation.frames:
        sample = dataclasses.replace(validation.source, num_sweeps=1).read(frame)
        with torch.no_grad():
            student_N = (model(sample.points_NI, sample.cloud_N)["scr"] @ tiny.text_CD.T).argmax(1)
        teacher_N = TeacherMethod(tiny.text_CD).prepare(torch.device("cpu"))(sample)
        shown_N = seen(sample)
        counts += confusion((teacher_N[shown_N] + 1).numpy(), student_N[shown_N].numpy(), 16)
    assert scores["verifying/agreement"] == pytest.approx(mean_iou(counts), abs=1e-6)


def test_without_labels_no_label_file_is_needed(tiny, validation, tmp_path):
    bare = dataclasses.replace(
        validation,
        frames=tuple(dataclasses.replace(frame, label_path=None) for frame in validation.frames),
        source=dataclasses.replace(validation.source, label_vocabulary=None),
    )
    history = fit(tiny.distillation(epochs=1, validation=bare), name="run", folder=tmp_path).history
    assert "verifying/miou" not in history[0]
    assert history[0]["verifying/label_free"] > 0


def test_validation_runs_when_it_is_due_and_does_not_change_what_is_learned(tiny, validation, tmp_path):
    every_second = dataclasses.replace(validation, every_epochs=2)
    with_it = fit(tiny.distillation(epochs=3, validation=every_second), name="a", folder=tmp_path)
    without = fit(tiny.distillation(epochs=3), name="b", folder=tmp_path)
    assert all(torch.equal(value, without.weights[key]) for key, value in with_it.weights.items())
    assert ["verifying/miou" in row for row in with_it.history] == [False, True, True]


def test_cells_agree_where_both_sweeps_have_the_same_most_frequent_class():
    rng = np.random.default_rng(0)
    points_N3 = torch.from_numpy(rng.uniform(0, 1, (400, 3)))
    cloud_N, classes_N = (torch.from_numpy(rng.integers(0, high, 400)) for high in (2, 3))
    cells: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for xyz, cloud, label in zip(points_N3.tolist(), cloud_N.tolist(), classes_N.tolist(), strict=True):
        cells.setdefault(tuple(int(value // CELL_M) for value in xyz), ([], []))[cloud].append(label)
    both = [pair for pair in cells.values() if pair[0] and pair[1]]
    same = sum(np.bincount(a, minlength=3).argmax() == np.bincount(b, minlength=3).argmax() for a, b in both)
    assert 0 < same < len(both)
    assert same_in_both_sweeps(points_N3, cloud_N, classes_N, 3).tolist() == [same, len(both)]
