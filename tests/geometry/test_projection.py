"""Projection against nuscenes-devkit and against arithmetic."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from one_image import points_at, project, small_camera

from clip2scene.data.clouds import read_cloud
from clip2scene.data.index import Camera, Index
from clip2scene.data.poses import inverse


def _camera_at_lidar_time(index: Index, name: str) -> Camera:
    """The camera as if exposed at the LiDAR's time: its calibration on the LiDAR's ego pose."""
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    nusc = NuScenes(index.version, str(index.root.path), verbose=False)
    data = nusc.get("sample", index.frames[0].frame_id)["data"]
    sensor = nusc.get("sample_data", data[name])["calibrated_sensor_token"]
    ego = nusc.get("ego_pose", nusc.get("sample_data", data["LIDAR_TOP"])["ego_pose_token"])
    world_from_ego, ego_from_camera = (
        transform_matrix(pose["translation"], Quaternion(pose["rotation"]))
        for pose in (ego, nusc.get("calibrated_sensor", sensor))
    )
    camera = next(camera for camera in index.frames[0].cameras if camera.name == name)
    return dataclasses.replace(camera, camera_from_world=inverse(world_from_ego @ ego_from_camera))


@pytest.mark.parametrize(("name", "kept", "median_shift_px"), [("CAM_FRONT", 2871, 13), ("CAM_FRONT_LEFT", None, 36)])
def test_without_ego_motion_compensation_pixels_shift(
    real_index: Index, name: str, kept: int | None, median_shift_px: int
) -> None:
    frame = real_index.frames[0]
    points = read_cloud(real_index.root.path_of(frame.cloud_path))[:, :3]
    own_time = next(camera for camera in frame.cameras if camera.name == name)
    seen, pixels, _ = project(points, frame.world_from_lidar, own_time)
    seen_wrong, pixels_wrong, _ = project(points, frame.world_from_lidar, _camera_at_lidar_time(real_index, name))
    assert seen.sum() == {"CAM_FRONT": 3053, "CAM_FRONT_LEFT": 3696}[name]
    assert kept is None or seen_wrong.sum() == kept
    both = seen & seen_wrong
    shift_px = np.median(np.linalg.norm(pixels[both] - pixels_wrong[both], axis=1))
    assert shift_px == pytest.approx(median_shift_px, abs=0.5)


@pytest.mark.parametrize("world", ["real_index", "street_index"])
def test_pixels_are_the_devkits(world: str, request: pytest.FixtureRequest) -> None:
    from nuscenes.nuscenes import NuScenes

    index: Index = request.getfixturevalue(world)
    nusc = NuScenes(index.version, str(index.root.path), verbose=False)
    for frame in index.frames[:2]:
        points = read_cloud(index.root.path_of(frame.cloud_path))[:, :3]
        data = nusc.get("sample", frame.frame_id)["data"]
        for camera in frame.cameras:
            visible, pixels, depth = project(points, frame.world_from_lidar, camera)
            theirs, their_depth, _ = nusc.explorer.map_pointcloud_to_image(data["LIDAR_TOP"], data[camera.name])
            # The devkit carries points through world coordinates in float32, which resolves 0.1 mm at 1 km: a point
            # that close to the limits may fall on either side.
            surely, perhaps = (
                project(points, frame.world_from_lidar, camera, 1 + slack, 1 + slack)[0] for slack in (0.1, -0.1)
            )
            assert visible.any()
            assert surely.sum() <= theirs.shape[1] <= perhaps.sum()
            if world == "real_index" or surely.sum() == perhaps.sum():
                np.testing.assert_allclose(pixels[visible], theirs[:2].T, rtol=0, atol=0.1)
                np.testing.assert_allclose(depth[visible], their_depth, rtol=0, atol=1e-3)


def test_border_is_excluded_on_every_side_and_on_the_limit() -> None:
    # Sixteenths are exact in binary, so that a point on the limit is on it in floating point, too.
    step = 1 / 16
    inside = [(1 + step, 40), (99 - step, 40), (50, 1 + step), (50, 79 - step)]
    outside = [(1, 40), (99, 40), (50, 1), (50, 79), (1 - step, 40), (99 + step, 40), (50, -5), (50, 900)]
    camera = dataclasses.replace(small_camera(), intrinsics=np.array([[64.0, 0, 50], [0, 64, 40], [0, 0, 1]]))
    points = np.array([((u - 50) / 64 * 4, (v - 40) / 64 * 4, 4) for u, v in inside + outside])
    visible, pixels, _ = project(points, np.eye(4), camera)
    np.testing.assert_array_equal(visible, [True] * 4 + [False] * 8)
    np.testing.assert_array_equal(pixels, np.array(inside + outside, np.float32))
    assert project(points, np.eye(4), camera, border_px=0)[0].sum() == 10


def test_depth_limit_and_points_behind_the_camera() -> None:
    points = np.array([[0, 0, 1.0], [0, 0, 1.0001], [0, 0, 0], [0, 0, -4], [np.nan, 0, 4]])
    visible, pixels, depth = project(points, np.eye(4), small_camera())
    np.testing.assert_array_equal(visible, [False, True, False, False, False])
    np.testing.assert_array_equal(depth[:4], points[:4, 2])
    assert np.isnan(pixels[[0, 2, 3]]).all()
    assert project(points, np.eye(4), small_camera(), min_depth_m=0.5)[0].sum() == 2


@pytest.mark.parametrize("seed", range(5))
def test_projection_does_not_depend_on_where_the_world_begins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = points_at([tuple(pixel) for pixel in rng.uniform(-20, 120, (500, 2))], 7.0).astype(np.float32)
    far = np.eye(4)
    far[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    far[:3, 3] = rng.uniform(-1e4, 1e4, 3)
    here = project(points, np.eye(4), small_camera())
    there = project(points, far, dataclasses.replace(small_camera(), camera_from_world=inverse(far)))
    np.testing.assert_array_equal(here[0], there[0])
    np.testing.assert_allclose(here[1], there[1], rtol=0, atol=1e-4)
