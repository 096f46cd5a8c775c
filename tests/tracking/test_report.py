from __future__ import annotations

import json
import math
import re

import pytest

from clip2scene.tracking.report import percent, summary_text

REPORT = {
    "seed": 1,
    "teacher_2d_miou": 0.3718,
    "student_3d_miou": 0.42634,
    "finetuned_miou": {"pretrained": 0.571, "scratch": 0.4821},
    "label_fraction": 0.0625,
    "majority_miou": 0.0213,
    "per_class": {"2d_only": {"car": 0.5, "construction_vehicle": None}, "3d_only": {"car": 0.625}},
    "images_encoded": 576,
    "seconds": {"index": 0.4, "extract": 30.1, "distill": 101.0},
    "protocol": "clip2scene_frame",
    "vocabulary": "nuscenes",
    "digests": {"index": "0123456789abcdef"},
}


def rows(text: str) -> dict[str, list[str]]:
    """Lines of the tables: label to the cells after it."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: rest for first, *rest in cells}


def test_every_score_that_was_asked_for_is_shown():
    scores = {f"{name}_miou": 0.1 for name in ("ensemble", "pointclip", "student_3d_all_points")}
    shown = rows(summary_text(scores))
    assert shown["both together, no label read"] == ["10.0"]
    assert shown["PointCLIP carried to scenes, no label read"] == ["10.0"]
    assert shown["3D-only, also on points that no image shows"] == ["10.0"]


def test_every_number_is_shown_in_its_row():
    text = summary_text(json.loads(json.dumps(REPORT)))
    shown = rows(text)
    assert shown["majority class everywhere"] == ["2.1"]
    assert shown["2D-only: the teacher's labels on the points"] == ["37.2"]
    assert shown["3D-only: the student, no label read"] == ["42.6"]
    assert shown["fine-tuned on 6.25% of the labels, from the student"] == ["57.1"]
    assert shown["fine-tuned on 6.25% of the labels, from random weights"] == ["48.2"]
    assert shown["class"] == ["2d only", "3d only"]
    assert shown["car"] == ["50.0", "62.5"]
    assert shown["construction vehicle"] == ["–", "–"]
    assert shown["extract"] == ["30 s"]
    assert shown["total"] == ["2 min 12 s"]
    assert "seed 1, protocol clip2scene_frame, vocabulary nuscenes, images encoded 576" in text
    assert "\x1b" not in text


def test_a_pipeline_that_stopped_early_has_a_table_too():
    shown = rows(summary_text({"seed": 0, "teacher_2d_miou": 0.25, "seconds": {"extract": 3.0}}))
    assert shown["2D-only: the teacher's labels on the points"] == ["25.0"]
    assert "class" not in shown


@pytest.mark.parametrize(("value", "text"), [(0.41151, "41.2"), (0.0, "0.0"), (None, "–"), (math.nan, "–")])
def test_percent(value, text):
    assert percent(value) == text
