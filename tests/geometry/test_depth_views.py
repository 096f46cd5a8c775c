"""Depth views of a cloud alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clip2scene.geometry.depth_views import YAW_PITCH_DEG, Projected, project_into_views, render, view_from_cloud

HEIGHT, WIDTH = 112, 208


def directions(num: int) -> torch.Tensor:
    """Unit vectors all around."""
    vectors = np.random.default_rng(0).standard_normal((num, 3))
    return torch.from_numpy((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))


def test_views_are_rotations_that_look_where_they_say():
    rotations = view_from_cloud()
    np.testing.assert_allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3)[None].repeat(12, 0), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    # The first looks along x with z up: the cloud's y is to its left.
    np.testing.assert_allclose(rotations[0] @ [1, 0, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(rotations[0] @ [0, 1, 0], [-1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(rotations[0] @ [0, 0, 1], [0, -1, 0], atol=1e-12)
    pitch = np.deg2rad([pitch for _, pitch in YAW_PITCH_DEG])
    np.testing.assert_allclose(rotations[:, 2, 2], np.sin(pitch), atol=1e-12)


@pytest.mark.parametrize("view", range(6))
def test_a_point_straight_ahead_falls_in_the_centre(view):
    yaw = np.deg2rad(YAW_PITCH_DEG[view][0])
    projected = project_into_views(torch.tensor([[7 * np.cos(yaw), 7 * np.sin(yaw), 0]]).float(), HEIGHT, WIDTH)
    row = projected.view_P.tolist().index(view)
    np.testing.assert_allclose(projected.pixel_P2[row], [WIDTH / 2, HEIGHT / 2], atol=1e-3)
    assert projected.depth_P[row] == pytest.approx(7)


def test_up_and_left_are_up_and_left_in_the_image():
    projected = project_into_views(torch.tensor([[5.0, 1.0, 0.5]]), HEIGHT, WIDTH)
    u, v = projected.pixel_P2[projected.view_P == 0][0]
    assert u < WIDTH / 2
    assert v < HEIGHT / 2


@pytest.mark.parametrize("size", [(112, 208), (64, 64), (32, 208)])
def test_every_direction_is_read_back_and_a_lidars_field_from_level_views_alone(size):
    points = 5 * directions(20000)
    projected = project_into_views(points, *size)
    read_back = torch.zeros(len(points), dtype=torch.bool)
    read_back[projected.point_P[projected.read_back_P]] = True
    assert read_back.all()
    elevation = torch.rad2deg(torch.arcsin(points[:, 2] / 5))
    from_tilted = projected.point_P[projected.read_back_P & (projected.view_P >= 6)]
    assert len(from_tilted)
    assert elevation[from_tilted].abs().min() > 33


def test_a_flat_cloud_needs_no_tilted_view():
    points = 9 * directions(2000) * torch.tensor([1, 1, 0.3])
    points = points[points[:, 2].abs() < 0.5 * points[:, :2].norm(dim=1)]
    assert set(project_into_views(points, HEIGHT, WIDTH).view_P.tolist()) == set(range(6))


def test_only_the_sensors_own_place_is_shown_by_no_view():
    projected = project_into_views(torch.tensor([[0.0, 0, 0], [0.1, 0.1, 0.1]]), HEIGHT, WIDTH)
    assert projected.point_P.unique().tolist() == [1]


def test_back_projection_returns_each_points_own_pixel():
    points = 3 * directions(500)
    projected = project_into_views(points, HEIGHT, WIDTH)
    rotations = view_from_cloud()
    tangent = np.tan(np.deg2rad([55, 37.5]))
    for at in range(0, len(projected.point_P), 37):
        x, y, z = rotations[projected.view_P[at]] @ points[projected.point_P[at]].double().numpy()
        expected = (np.array([x, y]) / z / tangent + 1) / 2 * [WIDTH, HEIGHT]
        np.testing.assert_allclose(projected.pixel_P2[at], expected, atol=1e-3)
    inside = (projected.pixel_P2 >= 0).all() & (projected.pixel_P2 < torch.tensor([WIDTH, HEIGHT])).all()
    assert inside


def test_the_nearer_point_wins_and_both_are_shown():
    # The nearest and the farthest point set the scale; the two between them share a pixel.
    points = torch.tensor([[1.0, 0, 0], [0, 4, 0], [0, 8, 0], [-64, 0, 0]])
    turned = points @ torch.from_numpy(view_from_cloud()[1]).float()  # some general direction
    projected = project_into_views(turned, HEIGHT, WIDTH)
    alone = project_into_views(turned[[0, 1, 3]], HEIGHT, WIDTH)
    both = {tuple(pair) for pair in zip(projected.view_P.tolist(), projected.point_P.tolist(), strict=True)}
    assert {(view, 2) for view, point in both if point == 1} == {pair for pair in both if pair[1] == 2}
    torch.testing.assert_close(render(projected, HEIGHT, WIDTH), render(alone, HEIGHT, WIDTH))


def test_brightness_falls_with_depth_and_points_make_surfaces():
    depth = torch.tensor([1.0, 2, 4, 8, 16])
    pixel = torch.stack((torch.arange(5) * 40 + 20.5, torch.full((5,), 50.5)), dim=1)
    projected = Projected(torch.zeros(5).long(), torch.arange(5), pixel, depth, torch.ones(5, dtype=torch.bool))
    images = render(projected, HEIGHT, WIDTH)
    assert images.shape == (12, HEIGHT, WIDTH)
    # Every doubling of depth takes as much: the logarithm counts.
    torch.testing.assert_close(images[0, 50, pixel[:, 0].long()], torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))
    around = images[0, 49:52, 19:22]
    assert (around == 1).all()
    assert (images[0] > 0).sum() == 5 * 9
    assert (images[1:] == 0).all()


def test_nothing_in_view_is_black():
    assert (render(project_into_views(torch.zeros(3, 3), HEIGHT, WIDTH), HEIGHT, WIDTH) == 0).all()
