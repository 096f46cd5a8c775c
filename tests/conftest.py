"""Fixtures that several parts share: a tiny street world, the real pieces of data, one embedded Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# Ray's workers run at nice 15, so that of two tests on one core those of Ray would hardly come on.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["RAY_AUTH_MODE"] = "disabled"

REPOSITORY = Path(__file__).resolve().parents[1]


SLOW_FIRST = (
    "test_cli.py",
    "test_sweep.py",
    "test_real_data.py",
    "test_mistakes.py",
    "test_tables.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no worker of ``make test`` is left with one of them at the end."""
    items.sort(key=lambda item: SLOW_FIRST.index(item.path.name) if item.path.name in SLOW_FIRST else len(SLOW_FIRST))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the small pieces of real data; skips where there is none."""
    folder = Path(os.environ.get("CLIP2SCENE_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "nuscenes_keyframe").is_dir():
        pytest.skip(f"no real data at {folder} (set CLIP2SCENE_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def streetworld_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tiny street world in nuScenes' format: (root, version)."""
    from clip2scene.config import StreetworldSettings
    from clip2scene.streetworld.generate import generate

    root = tmp_path_factory.mktemp("streetworld") / "world"
    settings = StreetworldSettings(
        train_scenes=2, val_scenes=2, keyframes_per_scene=2, sweeps_between_keyframes=3, lidar_azimuth_steps=240
    )
    generate(root, settings, seed=7)
    return root, "v1.0-trainval"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Embedded Ray with two CPUs, for every test that needs one."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
