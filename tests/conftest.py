"""Fixtures that several parts share: tiny data sets and models, the real pieces of data, Ray, MLflow, a small disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from commands import REPOSITORY
from tiny_world import TINY_WORLD

if TYPE_CHECKING:
    from clip2scene.data.index import Index
    from tiny_training import Tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# Ray's workers run at nice 15, so that of two tests on one core those of Ray would hardly come on.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["RAY_AUTH_MODE"] = "disabled"

SLOW_FIRST = (
    "test_sweep.py",
    "test_cli.py",
    "test_real_data.py",
    "test_tables.py",
    "test_fit.py",
    "test_mistakes.py",
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
    generate(root, StreetworldSettings.model_validate(TINY_WORLD), seed=7)
    return root, "v1.0-trainval"


@pytest.fixture(scope="session")
def street_index(streetworld_root: tuple[Path, str]) -> Index:
    from clip2scene.data.nuscenes import build_index

    return build_index(*streetworld_root)


@pytest.fixture(scope="session")
def tiny(streetworld_root: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The street world with a feature store of random features."""
    from tiny_training import make_tiny

    return make_tiny(*streetworld_root, tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny CLIP: ``tiny_clip("token" | "average" | "resnet", seed=0)``."""
    from tiny_clip import write_clip

    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = tmp_path_factory.mktemp(f"clip-{kind}-{seed}")
            write_clip(made[kind, seed], kind, seed)
        return made[kind, seed]

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 kB; skips where none can be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's MLflow server keeps its runs."""
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="session")
def uri(mlflow_folder: Path) -> Iterator[str]:
    """An MLflow server that keeps all runs of the session."""
    from clip2scene.tracking.server import embedded_server

    with embedded_server(mlflow_folder) as uri:
        yield uri


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Embedded Ray with two CPUs, for every test that needs one."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
