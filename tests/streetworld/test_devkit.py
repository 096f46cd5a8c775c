"""The unmodified nuscenes-devkit loads the world, renders it and projects it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from clip2scene.streetworld.record import KEYFRAME_PERIOD_S
from clip2scene.streetworld.render import Tracer, render_camera
from clip2scene.streetworld.sensors import CAMERA_NAMES, make_rig
from clip2scene.streetworld.world import CATEGORIES, make_scene
from tiny_world import TINY_WORLD

mpl.use("Agg")


@pytest.fixture(scope="module")
def devkit(streetworld_root: tuple[Path, str]) -> Any:
    from nuscenes import NuScenes

    root, version = streetworld_root
    return NuScenes(version, str(root), verbose=False)


def test_it_loads_with_all_records_and_sweeps(devkit: Any) -> None:
    assert [len(devkit.scene), len(devkit.sample), len(devkit.lidarseg)] == [4, 8, 8]
    assert len(devkit.sample_data) == 8 * 7 + 4 * 3
    assert [row["name"] for row in sorted(devkit.category, key=lambda row: row["index"])] == list(CATEGORIES)
    assert list(devkit.colormap) == list(CATEGORIES)
    starts = [devkit.get("sample", scene["first_sample_token"])["timestamp"] for scene in devkit.scene]
    assert len(set(starts)) == len(starts)
    for scene in devkit.scene:
        first = devkit.get("sample", scene["first_sample_token"])
        chain = [devkit.get("sample_data", first["data"]["LIDAR_TOP"])]
        while chain[-1]["next"]:
            chain.append(devkit.get("sample_data", chain[-1]["next"]))
        assert [row["is_key_frame"] for row in chain] == [True, False, False, False, True]
        assert np.allclose(np.diff([row["timestamp"] for row in chain]), KEYFRAME_PERIOD_S / 4 * 1e6, atol=2)


def test_boxes_hold_the_points_of_their_class(devkit: Any) -> None:
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    held = outside = 0
    for sample in devkit.sample:
        token = sample["data"]["LIDAR_TOP"]
        path, boxes, _ = devkit.get_sample_data(token)
        points = LidarPointCloud.from_file(path).points[:3]
        labels = np.fromfile(f"{devkit.dataroot}/{devkit.get('lidarseg', token)['filename']}", np.uint8)
        assert len(labels) == points.shape[1]
        inside = np.zeros(len(labels), bool)
        for box in boxes:
            mask = points_in_box(box, points, wlh_factor=1.05)
            inside |= mask
            held += int((labels[mask] == CATEGORIES.index(box.name)).sum())
        outside += int((~inside & (labels < 24)).sum())
    assert held > 2000
    assert outside < 0.05 * held


def test_it_renders_and_lists_classes(devkit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = devkit.sample[0]
    devkit.list_lidarseg_categories()
    assert "vehicle.bus.rigid" in capsys.readouterr().out
    devkit.render_sample_data(sample["data"]["CAM_FRONT"], out_path=str(tmp_path / "camera.png"), verbose=False)
    devkit.render_sample_data(
        sample["data"]["LIDAR_TOP"], show_lidarseg=True, out_path=str(tmp_path / "lidar.png"), verbose=False
    )
    devkit.render_pointcloud_in_image(
        sample["token"],
        camera_channel="CAM_BACK",
        show_lidarseg=True,
        out_path=str(tmp_path / "both.png"),
        verbose=False,
    )
    for name in ("camera.png", "lidar.png", "both.png"):
        with Image.open(tmp_path / name) as image:
            assert np.asarray(image.convert("L")).std() > 10


def test_projected_points_hit_the_objects_that_the_renderer_saw(devkit: Any) -> None:
    """The devkit's projection through the noisy calibration, against the renderer's object buffer."""
    from nuscenes.nuscenes import NuScenesExplorer

    seed, agree, total = 7, 0, 0
    for number, row in enumerate(devkit.scene):
        sample = devkit.get("sample", row["first_sample_token"])
        scene = make_scene(seed, number, 2 * KEYFRAME_PERIOD_S)
        tracer = Tracer(scene)
        category = np.array([thing.category for thing in scene.things] + [0])
        rig = make_rig(np.random.default_rng(0), TINY_WORLD["image_width_px"], TINY_WORLD["image_height_px"])
        lidar = sample["data"]["LIDAR_TOP"]
        labels = np.fromfile(f"{devkit.dataroot}/{devkit.get('lidarseg', lidar)['filename']}", np.uint8)
        for camera in rig.cameras:
            record = devkit.get("sample_data", sample["data"][camera.name])
            time_s = (record["timestamp"] - sample["timestamp"]) / 1e6
            assert abs(time_s - camera.delay_s) < 0.0015
            image, seen = render_camera(tracer, camera, time_s, np.random.default_rng(0))
            stored = np.asarray(Image.open(f"{devkit.dataroot}/{record['filename']}"))
            assert np.abs(stored.astype(float) - image).mean() < 20
            points, found, _ = NuScenesExplorer(devkit).map_pointcloud_to_image(
                lidar, record["token"], render_intensity=False, show_lidarseg=True, filter_lidarseg_labels=None
            )
            assert found is not None
            inside = _visible(devkit, lidar, record["token"])
            pixels = np.floor(points[:2]).astype(int)
            agree += int((category[seen[pixels[1], pixels[0]]] == labels[inside]).sum())
            total += int(inside.sum())
    assert total > 8000
    assert agree / total > 0.85


def _visible(devkit: Any, lidar: str, camera: str) -> np.ndarray:
    """The points that the devkit keeps by its own rule."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    source, target = devkit.get("sample_data", lidar), devkit.get("sample_data", camera)
    cloud = LidarPointCloud.from_file(f"{devkit.dataroot}/{source['filename']}")
    for record, table in ((source, "calibrated_sensor"), (source, "ego_pose")):
        pose = devkit.get(table, record[f"{table}_token"])
        cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix)
        cloud.translate(np.array(pose["translation"]))
    for table in ("ego_pose", "calibrated_sensor"):
        pose = devkit.get(table, target[f"{table}_token"])
        cloud.translate(-np.array(pose["translation"]))
        cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix.T)
    depth = cloud.points[2]
    u, v, _ = view_points(
        cloud.points[:3],
        np.array(devkit.get("calibrated_sensor", target["calibrated_sensor_token"])["camera_intrinsic"]),
        True,
    )
    return (depth > 1) & (u > 1) & (u < target["width"] - 1) & (v > 1) & (v < target["height"] - 1)


def test_each_sensor_has_its_own_time_and_pose(devkit: Any) -> None:
    sample = devkit.sample[0]
    records = [devkit.get("sample_data", sample["data"][name]) for name in ("LIDAR_TOP", *CAMERA_NAMES)]
    assert len({record["timestamp"] for record in records}) == 7
    places = {tuple(devkit.get("ego_pose", record["ego_pose_token"])["translation"]) for record in records}
    assert len(places) == 7
