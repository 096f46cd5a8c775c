"""Two Ray workers train and count like one process, and a failure ends the group of workers with its message.

One group does all of it, as its start takes longer than what it does.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from clip2scene.config import ResourceSettings
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import TrainingError
from clip2scene.training.evaluate import Scores, evaluate, label_counts
from clip2scene.training.fit import Fitted, fit
from clip2scene.training.launch import worker_group
from clip2scene.training.methods import UNSEEN, ConstantMethod, EnsembleMethod, Method, StudentMethod, TeacherMethod
from clip2scene.training.metrics import mean_iou
from clip2scene.training.samples import SampleSource

WORDS = vocabulary("nuscenes")
TWO = ResourceSettings(num_workers=2, max_failures=0)


@dataclass(frozen=True)
class OnTwo:
    """What two Ray workers did: a training that failed, one by the workers that came after those, and its scores."""

    folder: Path
    failure: TrainingError
    heard: list[tuple[int, dict[str, float]]]
    fitted: Fitted
    source: SampleSource
    """Random labels, with ignored points and absent classes."""
    methods: Mapping[str, Method]
    scores: Scores


def run(training, folder, resources=TWO, **callbacks):
    return fit(replace(training, resources=resources), name="run", folder=folder, **callbacks)


@pytest.fixture(scope="module")
def on_two(tiny, ray_cluster, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("on-two"), np.random.default_rng(0)
    damaged, relabelled = (
        Path(shutil.copytree(tiny.index.root.path, folder / name)) for name in ("damaged", "relabelled")
    )
    (damaged / tiny.index.frames[1].cloud_path).write_bytes(b"123")
    kept = [0, *(raw for raw, label in enumerate(WORDS.raw_to_label) if label not in (-1, 0, 3, 7, 8, 16))]
    for frame in tiny.index.frames:
        file = relabelled / frame.label_path
        rng.choice(kept, size=file.stat().st_size).astype(np.uint8).tofile(file)
    source = SampleSource(DataRoot(relabelled), tiny.store, label_vocabulary=WORDS)
    training = tiny.distillation()
    torch.manual_seed(0)
    student = training.student, training.build().state_dict()
    methods = {
        "teacher": TeacherMethod(tiny.text_CD),
        "student": StudentMethod(*student, tiny.text_CD, 16),
        "ensemble": EnsembleMethod(*student, tiny.text_CD),
        "constant": ConstantMethod(3),
    }
    heard = []
    with worker_group(TWO):
        with pytest.raises(TrainingError) as caught:
            run(tiny.distillation(source=SampleSource(DataRoot(damaged), tiny.store)), folder / "failed")
        fitted = run(tiny.distillation(epochs=2), folder / "trained", on_epoch=lambda *about: heard.append(about))
        scores = evaluate(
            tiny.index.frames, source, methods, num_classes=16, name="evaluate", folder=folder, resources=TWO
        )
    return OnTwo(folder, caught.value, heard, fitted, source, methods, scores)


def test_a_damaged_cloud_stops_the_workers_with_its_message_and_the_next_gets_new_ones(on_two):
    assert re.search(r"LIDAR_TOP.*bytes", str(on_two.failure))
    assert "\n" not in str(on_two.failure)
    assert len(on_two.fitted.history) == 2
    assert not list(on_two.folder.rglob(".workers*"))


def test_two_workers_train(tiny, on_two):
    assert [epoch for epoch, _ in on_two.heard] == [1, 2]
    assert on_two.heard[-1][1]["loss"] == pytest.approx(on_two.fitted.history[-1]["loss"])
    assert set(on_two.fitted.weights) == set(tiny.distillation().build().state_dict())


def test_two_ranks_count_what_scikit_learn_counts(tiny, on_two):
    truth, seen, answers = [], [], {name: [] for name in on_two.methods}
    with torch.inference_mode():
        for frame in tiny.index.frames:
            sample = on_two.source.read(frame)
            truth.append(sample.labels_N.numpy().astype(int) - 1)
            seen.append(np.isin(np.arange(len(sample.points_NI)), sample.pair_point_P.numpy()))
            for name, method in on_two.methods.items():
                answers[name].append(method.prepare(torch.device("cpu"))(sample).numpy())
    truth, seen = np.concatenate(truth), np.concatenate(seen)
    assert (truth == -1).any()
    assert not set(np.unique(truth)) & {2, 6, 7, 15}
    for name in on_two.methods:
        classes = np.concatenate(answers[name])
        for domain, in_domain in (("seen", seen), ("all", classes != UNSEEN)):
            counted = in_domain & (truth >= 0)
            pair = truth[counted], classes[counted]
            counts = on_two.scores.counts[name][domain]
            np.testing.assert_array_equal(counts, confusion_matrix(*pair, labels=range(16)))
            present = sorted({*pair[0], *pair[1]})
            assert mean_iou(counts) == pytest.approx(jaccard_score(*pair, labels=present, average="macro"))


def test_counts_of_two_ranks_are_of_all_labels(tiny, on_two):
    counts, labelled = on_two.scores.counts, label_counts(tiny.index.frames, on_two.source, 16)
    assert (counts["constant"]["all"].sum(1) == labelled).all()
    assert counts["constant"]["all"][:, 3].sum() == labelled.sum()
    assert counts["teacher"]["all"].sum() == counts["student"]["seen"].sum() < labelled.sum()
    assert set(on_two.scores.example) == {"points", "truth", *on_two.methods}


def test_workers_that_do_not_see_the_folder_say_so_before_they_train(tiny, tmp_path, ray_cluster):
    def unmark():
        while not (marks := list(tmp_path.glob(".workers-*/mark"))):
            time.sleep(0.01)
        marks[0].unlink()  # as on a node that does not share the folder

    threading.Thread(target=unmark, daemon=True).start()
    with pytest.raises(TrainingError, match="does not see this folder of the driver's; give a storage"):
        run(tiny.distillation(epochs=1), tmp_path, ResourceSettings(num_workers=1, max_failures=0))
    assert not list(tmp_path.glob("run/checkpoint_*"))
