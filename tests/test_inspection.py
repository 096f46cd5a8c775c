"""The counts of a keyframe: known ones, and sums that must agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Index
from clip2scene.data.nuscenes import build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.errors import DataError
from clip2scene.inspection import format_table, inspect_frame

REAL_PAIRS = {
    "CAM_FRONT": 3053,
    "CAM_FRONT_RIGHT": 3076,
    "CAM_FRONT_LEFT": 3696,
    "CAM_BACK": 4820,
    "CAM_BACK_LEFT": 4089,
    "CAM_BACK_RIGHT": 3369,
}
"""Pairs that nuscenes-devkit keeps, from the README beside the real keyframe."""


def test_real_keyframe_has_exactly_the_devkits_pairs(real_data: Path) -> None:
    real_index = build_index(real_data / "nuscenes_keyframe", "v1.0-mini")
    report = inspect_frame(real_index, real_index.frames[0], vocabulary("nuscenes"))
    labels = report.pop("labels")
    assert report == {
        "frame_id": "ca9a282c9e77460f8360f564131a8af5",
        "points": 34_688,
        "pairs": REAL_PAIRS,
        "seen_by_any": 20_180,
        "seen_by_two_or_more": 1_923,
        "sweeps": 0,
    }
    assert sum(labels.values()) == 34_688
    assert set(labels) <= {*vocabulary("nuscenes").classes, "ignore"}
    assert "CAM_BACK_RIGHT         3,369" in format_table([report | {"labels": labels}])


def test_streetworld_inspection_counts_what_there_is(street_index: Index) -> None:
    for frame in street_index.frames:
        report = inspect_frame(street_index, frame, vocabulary("nuscenes"))
        assert report["sweeps"] == len(frame.sweeps)
        assert sum(report["labels"].values()) == report["points"]
        assert sum(report["pairs"].values()) >= report["seen_by_any"] + report["seen_by_two_or_more"]
        assert 0 < report["seen_by_any"] <= report["points"]
        assert (
            inspect_frame(street_index, dataclasses.replace(frame, label_path=None), vocabulary("nuscenes"))["labels"]
            == {}
        )


def test_damaged_files_are_named(street_index: Index, tmp_path: Path) -> None:
    frame = street_index.frames[0]
    assert frame.label_path is not None
    index = dataclasses.replace(street_index, root=DataRoot(tmp_path))
    for relative in (frame.cloud_path, frame.label_path):
        (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / relative).write_bytes((street_index.root.path / relative).read_bytes())
    labels = (tmp_path / frame.label_path).read_bytes()

    (tmp_path / frame.label_path).write_bytes(labels[:-1])
    with pytest.raises(DataError, match=rf"{frame.label_path}: {len(labels) - 1} labels for a cloud of {len(labels)}"):
        inspect_frame(index, frame, vocabulary("nuscenes"))
    (tmp_path / frame.label_path).write_bytes(labels[:-1] + b"\x63")
    with pytest.raises(DataError, match=rf"{frame.label_path}: label ids \[99\] are unknown"):
        inspect_frame(index, frame, vocabulary("nuscenes"))
    (tmp_path / frame.cloud_path).write_bytes((tmp_path / frame.cloud_path).read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{frame.cloud_path}: truncated point cloud"):
        inspect_frame(index, frame, vocabulary("nuscenes"))
    with pytest.raises(DataError, match=r"path '\.\./cloud\.bin' leaves the dataset's root"):
        inspect_frame(index, dataclasses.replace(frame, cloud_path="../cloud.bin"), vocabulary("nuscenes"))
