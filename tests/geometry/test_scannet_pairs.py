"""Pairs of the real ScanNet scene: what is in view, and what the depth maps hide of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from one_image import project

from clip2scene.data.clouds import read_cloud, read_depths, read_image
from clip2scene.data.index import Camera, Frame, Index
from clip2scene.data.scannet import build_index
from clip2scene.data.vocabulary import vocabulary
from clip2scene.geometry.pairing import pair
from clip2scene.inspection import inspect_frame

IN_VIEW = {"000000": 3770, "000060": 7400, "000120": 6622, "000180": 5731, "000240": 2630, "000290": 8392}


@pytest.fixture(scope="module")
def index(real_data: Path) -> Index:
    return build_index(real_data / "scannet")


@pytest.fixture(scope="module")
def cloud_NI(index: Index) -> np.ndarray:
    return read_cloud(index.root.path_of(index.frames[0].cloud_path))


def _in_view(cloud_NI: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return project(cloud_NI[:, :3], np.eye(4), camera, min_depth_m=0, border_px=0)


def _by_camera(frame: Frame, index: Index, cloud_NI: np.ndarray) -> dict[str, np.ndarray]:
    pairs = pair(cloud_NI[:, :3], frame.world_from_lidar, frame.cameras, read_depths(index.root, frame))
    return {camera.name: pairs.point_P[pairs.camera_P == i] for i, camera in enumerate(frame.cameras)}


def test_as_many_vertices_are_in_view_as_counted_by_hand(index: Index, cloud_NI: np.ndarray) -> None:
    assert {c.name: int(_in_view(cloud_NI, c)[0].sum()) for c in index.frames[0].cameras} == IN_VIEW


def test_vertices_behind_others_are_hidden(index: Index, cloud_NI: np.ndarray) -> None:
    """Against a z-buffer of the vertices, without any depth map."""
    kept = _by_camera(index.frames[0], index, cloud_NI)
    for camera in index.frames[0].cameras:
        visible_N, pixels_N2, depth_N = _in_view(cloud_NI, camera)
        rows = np.flatnonzero(visible_N)
        # Cells of 16 pixels, so that the vertices, some 3 cm apart, leave few holes in a surface.
        column, row = (pixels_N2[rows] // 16).astype(int).T
        cell = row * (camera.width // 16 + 1) + column
        nearest = np.full(cell.max() + 1, np.inf)
        np.minimum.at(nearest, cell, depth_N[rows])
        behind_m = depth_N[rows] - nearest[cell]
        is_kept = np.isin(rows, kept[camera.name])
        assert 0.2 < is_kept.mean() < 0.6
        assert is_kept[behind_m > 0.5].mean() < 0.1
        assert is_kept[behind_m < 0.02].mean() > 0.4
        assert is_kept[behind_m < 0.02].mean() > 8 * is_kept[behind_m > 0.5].mean()


def test_kept_vertices_have_the_images_colour(index: Index, cloud_NI: np.ndarray) -> None:
    kept = _by_camera(index.frames[0], index, cloud_NI)
    errors: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for camera in index.frames[0].cameras:
        image = read_image(index.root.path_of(camera.image_path), camera.width, camera.height)
        grey = image @ np.array([0.299, 0.587, 0.114]) / 255
        visible_N, pixels_N2, _ = _in_view(cloud_NI, camera)
        rows = np.flatnonzero(visible_N)
        column, row = pixels_N2[rows].astype(int).T
        error = np.abs(grey[row, column] - cloud_NI[rows, 3])
        is_kept = np.isin(rows, kept[camera.name])
        errors[True].append(error[is_kept])
        errors[False].append(error[~is_kept])
    seen, hidden = (float(np.median(np.concatenate(errors[which]))) for which in (True, False))
    assert seen < 0.08 < 1.8 * seen < hidden


def test_images_in_the_layout_of_frames_25k_give_the_same_pairs(
    real_data: Path, index: Index, cloud_NI: np.ndarray, tmp_path: Path
) -> None:
    """And without depth maps the hidden vertices are paired too, by the visibility rule of images without any."""
    scene = tmp_path / "scans" / "scene0000_00"
    images = tmp_path / "scannet_frames_25k" / scene.name
    shutil.copytree(real_data / "scannet" / "scans", scene.parent)
    images.mkdir(parents=True)
    for part in ("color", "depth", "pose"):
        (scene / part).rename(images / part)
        for path in list((images / part).iterdir()):
            path.rename(path.with_stem(path.stem.zfill(6)))
    (scene / "intrinsic" / "intrinsic_color.txt").rename(images / "intrinsics_color.txt")
    moved = build_index(tmp_path)
    kept, kept_there = (_by_camera(one.frames[0], one, cloud_NI) for one in (index, moved))
    assert {name: points.tolist() for name, points in kept_there.items()} == {
        name: points.tolist() for name, points in kept.items()
    }
    shutil.rmtree(images / "depth")
    unmeasured = build_index(tmp_path)
    everything = _by_camera(unmeasured.frames[0], unmeasured, cloud_NI)
    for camera in unmeasured.frames[0].cameras:
        visible_N, *_ = project(cloud_NI[:, :3], np.eye(4), camera, min_depth_m=1, border_px=1)
        assert everything[camera.name].tolist() == np.flatnonzero(visible_N).tolist()
        assert len(everything[camera.name]) > len(kept[camera.name])


def test_inspection_counts_what_the_depth_test_leaves(index: Index, cloud_NI: np.ndarray) -> None:
    frame = index.frames[0]
    kept = _by_camera(frame, index, cloud_NI)
    counts = inspect_frame(index, frame, vocabulary("scannet"))
    assert counts["pairs"] == {name: len(points) for name, points in kept.items()}
    assert all(0 < counts["pairs"][name] < IN_VIEW[name] for name in IN_VIEW)
    assert counts["seen_by_any"] == len(np.unique(np.concatenate(list(kept.values()))))
