"""Scenes are pure functions of their seed; the street's coordinates and the meshes are sound."""

from __future__ import annotations

import numpy as np
import pytest

from clip2scene.streetworld.lidar import RANGE_M, scan
from clip2scene.streetworld.meshes import blob, box, cylinder, merge
from clip2scene.streetworld.render import Tracer
from clip2scene.streetworld.sensors import disturb, make_rig
from clip2scene.streetworld.street import make_street
from clip2scene.streetworld.tables import quaternion
from clip2scene.streetworld.world import CATEGORIES, make_scene


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_street_coordinates_invert(seed: int) -> None:
    rng = np.random.default_rng(seed)
    street = make_street(rng, 20.0)
    s, d = rng.uniform(-50, 60, 500), rng.uniform(-45, 45, 500)
    x, y, _ = street.place(s, d)
    back = street.locate(x.astype(np.float32), y.astype(np.float32))
    np.testing.assert_allclose(back[0], s, atol=2e-3)
    np.testing.assert_allclose(back[1], d, atol=2e-3)


def test_meshes_have_a_material_per_triangle_and_valid_corners() -> None:
    whole = merge([box(1, 2, 3, (1, 0, 0)), cylinder(1, 2, (0, 1, 0)), blob((1, 1, 1), (0, 0, 1))]).moved(
        x=1, yaw=0.3, pitch=0.2
    )
    assert len(whole.triangles) == len(whole.colours) == len(whole.textures)
    assert whole.triangles.max() == len(whole.vertices) - 1
    assert whole.triangles.min() == 0


def test_rotation_becomes_its_quaternion() -> None:
    from pyquaternion import Quaternion

    rng = np.random.default_rng(0)
    for _ in range(20):
        pose = np.eye(4)
        pose[:3, :3] = Quaternion(rng.standard_normal(4)).rotation_matrix
        np.testing.assert_allclose(Quaternion(quaternion(pose)).rotation_matrix, pose[:3, :3], atol=1e-9)
        noisy = disturb(rng, pose, 0.01, 0.001)
        np.testing.assert_allclose(noisy[:3, :3] @ noisy[:3, :3].T, np.eye(3), atol=1e-9)
        assert 0 < np.abs(noisy - pose).max() < 0.06


@pytest.mark.parametrize("seed", [11, 12])
def test_every_scene_holds_every_thing_and_the_lidar_sees_most(seed: int) -> None:
    wanted = {
        "movable_object.barrier", "vehicle.bicycle", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
        "vehicle.motorcycle", "human.pedestrian.adult", "movable_object.trafficcone", "vehicle.trailer",
        "vehicle.truck",
    }  # fmt: skip
    seen = []
    for number in range(3):
        scene = make_scene(seed, number, 2.0)
        assert wanted - {"vehicle.car"} <= {CATEGORIES[thing.category] for thing in scene.things}
        pose = scene.world_from_ego(0.5) @ make_rig(np.random.default_rng(0), 64, 32).ego_from_lidar
        points, labels, things = scan(Tracer(scene), pose, 0.5, 24, 450, np.random.default_rng(0))
        assert points.dtype == np.float32
        assert len(points) == len(labels) == len(things)
        assert np.linalg.norm(points[:, :3], axis=1).max() < RANGE_M + 1
        road = points[labels == CATEGORIES.index("flat.driveable_surface")]
        assert abs(np.median(road[:, 2]) + 1.84) < 0.1
        seen.append(len(np.unique(labels)))
    assert np.mean(seen) > 13
    assert min(seen) >= 10


def test_moving_things_move_and_the_ego_drives() -> None:
    scene = make_scene(5, 0, 2.0)
    movers = [thing for thing in scene.things if thing.moves]
    assert len(movers) > 5
    for thing in movers:
        start, end = (np.array(scene.pose(thing, time_s)[:2]) for time_s in (0.0, 1.0))
        assert np.linalg.norm(end - start) == pytest.approx(abs(thing.placement.speed_m_s), rel=0.2)
    drive = scene.world_from_ego(1.0)[:2, 3] - scene.world_from_ego(0.0)[:2, 3]
    assert np.linalg.norm(drive) == pytest.approx(scene.ego_speed_m_s, rel=0.1)
