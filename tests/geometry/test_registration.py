from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip2scene.data.index import Frame, Sweep
from clip2scene.data.poses import inverse
from clip2scene.geometry.registration import choose_sweeps, register, transform


def _random_pose(rng: np.random.Generator, distance_m: float) -> np.ndarray:
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    pose = np.eye(4)
    pose[:3, :3] = rotation * np.sign(np.linalg.det(rotation))
    pose[:3, 3] = rng.uniform(-distance_m, distance_m, 3)
    return pose


@pytest.mark.parametrize("seed", range(10))
def test_registering_there_and_back_is_the_identity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = _random_pose(rng, 1e4), _random_pose(rng, 1e4)
    points = rng.uniform(-100, 100, (200, 3))
    there = register(points, a, b)
    np.testing.assert_allclose(register(there, b, a), points, rtol=0, atol=1e-9)
    np.testing.assert_allclose(transform(b, there), transform(a, points), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        np.linalg.norm(there[1:] - there[:-1], axis=1), np.linalg.norm(np.diff(points, axis=0), axis=1)
    )
    np.testing.assert_allclose(inverse(a) @ a, np.eye(4), rtol=0, atol=1e-11)


def test_float32_clouds_keep_their_precision_far_from_the_world_origin() -> None:
    rng = np.random.default_rng(0)
    earlier, later = _random_pose(rng, 1e4), np.eye(4)
    later[:] = earlier
    later[:3, 3] += [3.0, -1.0, 0.1]
    points = rng.uniform(-50, 50, (1000, 3)).astype(np.float32)
    registered = register(points, earlier, later)
    assert registered.dtype == np.float32
    exact = points.astype(np.float64) + inverse(later)[:3, :3] @ (earlier[:3, 3] - later[:3, 3])
    np.testing.assert_allclose(registered, exact, rtol=0, atol=1e-5)


def test_transform_leaves_its_input_alone_and_takes_no_points() -> None:
    points = np.ones((2, 3), np.float32)
    transform(2 * np.eye(4), points)
    np.testing.assert_array_equal(points, 1)
    assert transform(np.eye(4), np.zeros((0, 3), np.float32)).shape == (0, 3)


def _frame(*ages_ms: int) -> Frame:
    sweeps = tuple(Sweep(f"{age}", np.eye(4), 10_000_000 - age * 1000) for age in sorted(ages_ms))
    return Frame("frame", "scene", 10_000_000, "cloud", np.eye(4), sweeps, (), None)


@pytest.mark.parametrize(
    ("ages_ms", "num_sweeps", "window_s", "expected_ms"),
    [
        (range(50, 501, 50), 3, 0.5, [250, 500]),
        (range(50, 501, 50), 5, 0.4, [100, 200, 300, 400]),
        (range(50, 501, 50), 1, 0.5, []),
        (range(50, 501, 50), 2, 0.5, [500]),
        ([51, 101, 149, 201, 252, 298, 350, 401, 449, 503], 3, 0.5, [252, 503]),  # a real LiDAR is never quite on time
        ([50, 100], 3, 0.5, [50, 100]),  # just after a scene's start
        ([50], 3, 0.5, [50]),
        ([], 3, 0.5, []),  # a scene's first frame
        ([500, 1000], 3, 0.5, [500]),  # keyframes only: what lies before the window is not taken
        (range(50, 501, 50), 11, 0.5, list(range(50, 501, 50))),
        (range(50, 501, 50), 6, 0.1, [50, 100]),  # never one twice
    ],
)
def test_chosen_sweeps(ages_ms: list[int], num_sweeps: int, window_s: float, expected_ms: list[int]) -> None:
    assert [int(sweep.path) for sweep in choose_sweeps(_frame(*ages_ms), num_sweeps, window_s)] == expected_ms


@settings(deadline=None, database=None)
@given(
    ages_ms=st.sets(st.integers(1, 1000), max_size=12),
    num_sweeps=st.integers(1, 10),
    window_s=st.floats(0.05, 2.0),
)
def test_chosen_sweeps_are_distinct_recent_and_as_many_as_there_are(
    ages_ms: set[int], num_sweeps: int, window_s: float
) -> None:
    frame = _frame(*ages_ms)
    chosen = choose_sweeps(frame, num_sweeps, window_s)
    times = [sweep.timestamp_us for sweep in chosen]
    assert times == sorted(set(times), reverse=True)
    in_window = [age for age in ages_ms if age * 1e-3 <= window_s + 0.025]
    assert len(chosen) == min(num_sweeps - 1, len(in_window))
    assert all(frame.timestamp_us - time <= (window_s + 0.025) * 1e6 for time in times)
