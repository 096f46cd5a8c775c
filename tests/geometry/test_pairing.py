"""The points that make pairs, and their order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from one_image import points_at, small_camera

from clip2scene.data.clouds import read_cloud
from clip2scene.data.index import Camera, Index
from clip2scene.geometry.pairing import pair
from clip2scene.geometry.registration import register


def test_sweeps_registered_or_in_their_own_frame_give_the_same_pairs(street_index: Index) -> None:
    frame = next(frame for frame in street_index.frames if frame.sweeps)
    sweep = frame.sweeps[-1]
    points = read_cloud(street_index.root.path_of(sweep.path))[:, :3].astype(np.float64)
    own = pair(points, sweep.world_from_lidar, frame.cameras)
    registered = pair(
        register(points, sweep.world_from_lidar, frame.world_from_lidar), frame.world_from_lidar, frame.cameras
    )
    assert len(own) > 0
    np.testing.assert_array_equal(own.point_P, registered.point_P)
    np.testing.assert_allclose(own.pixel_P2, registered.pixel_P2, rtol=0, atol=1e-3)


def test_pairs_are_ordered_by_camera_then_point_and_keep_points_seen_twice() -> None:
    points = points_at([(10, 10), (60, 60), (500, 10)], 3.0)
    left = small_camera()
    pairs = pair(points, np.eye(4), [left, dataclasses.replace(left, name="TWIN", width=40)])
    np.testing.assert_array_equal(pairs.point_P, [0, 1, 0])
    np.testing.assert_array_equal(pairs.camera_P, [0, 0, 1])
    np.testing.assert_allclose(pairs.pixel_P2, [(10, 10), (60, 60), (10, 10)], atol=1e-4)
    assert (pairs.point_P.dtype, pairs.camera_P.dtype, pairs.pixel_P2.dtype) == (np.int64, np.int64, np.float32)


@pytest.mark.parametrize("cameras", [[], [small_camera()]])
def test_no_pairs(cameras: list[Camera]) -> None:
    pairs = pair(np.zeros((0, 3), np.float32), np.eye(4), cameras)
    assert (len(pairs), pairs.pixel_P2.shape) == (0, (0, 2))
    assert (pairs.point_P.dtype, pairs.camera_P.dtype, pairs.pixel_P2.dtype) == (np.int64, np.int64, np.float32)


def test_depth_map_hides_what_lies_behind_it_or_was_not_measured() -> None:
    # At pixel (10, 10) the wall stands 3 m away, at (60, 60) nothing was measured.
    depth_hw = np.full((40, 50), 3.0, np.float32)
    depth_hw[30, 30] = 0
    depths = [3.0, 3.049, 2.951, 3.051, 2.949, 5.0, 0.2]
    points = np.concatenate([points_at([(10, 10)], depth_m) for depth_m in depths] + [points_at([(60, 60)], 3.0)])
    pairs = pair(points, np.eye(4), [small_camera()], [depth_hw])
    np.testing.assert_array_equal(pairs.point_P, [0, 1, 2])
    np.testing.assert_allclose(pairs.pixel_P2, [(10, 10)] * 3, atol=1e-4)


def test_depth_map_admits_near_points_and_the_images_edge() -> None:
    edge = [(0.2, 0.2), (99.9, 79.9), (99.9, 0.2), (0.2, 79.9), (-0.2, 5), (100.1, 5), (5, -0.2), (5, 80.1)]
    points = np.concatenate((points_at(edge, 0.5), -points_at([(50, 40)], 0.5)))
    depth_hw = np.full((40, 50), 0.5, np.float32)
    np.testing.assert_array_equal(pair(points, np.eye(4), [small_camera()], [depth_hw]).point_P, [0, 1, 2, 3])
    assert len(pair(points, np.eye(4), [small_camera()])) == 0


def test_depth_map_is_read_where_the_image_shows_the_point() -> None:
    # Columns 0 to 24 of the map measure 2 m, columns 25 to 49 measure 4 m; each covers two columns of the image.
    depth_hw = np.repeat([[2.0, 4.0]], 25, axis=1).repeat(40, axis=0).astype(np.float32)
    pixels = [(49.4, 20.0), (49.6, 20.0)]
    near = pair(points_at(pixels, 2.0), np.eye(4), [small_camera()], [depth_hw])
    far = pair(points_at(pixels, 4.0), np.eye(4), [small_camera()], [depth_hw])
    assert (near.point_P.tolist(), far.point_P.tolist()) == ([0], [1])


def test_cameras_without_a_depth_map_keep_their_rule() -> None:
    points = np.concatenate((points_at([(10, 10), (60, 60)], 3.0), points_at([(30, 30)], 0.5)))
    plain = pair(points, np.eye(4), [small_camera(), small_camera()])
    mixed = pair(points, np.eye(4), [small_camera(), small_camera()], [None, np.full((40, 50), 0.5, np.float32)])
    np.testing.assert_array_equal(plain.point_P, [0, 1, 0, 1])
    np.testing.assert_array_equal(mixed.point_P, [0, 1, 2])
    np.testing.assert_array_equal(mixed.camera_P, [0, 0, 1])
    with pytest.raises(ValueError, match="zip"):
        pair(points, np.eye(4), [small_camera(), small_camera()], [None])
