"""The entry point for all datasets: builds the index of any kind, and tells when it must be built again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from clip2scene.config import DatasetKind, digest_of
from clip2scene.data.contents import sample_contents
from clip2scene.data.index import Index
from clip2scene.errors import ConfigError

_BUILDERS = 4
"""Raised whenever a builder changes the index that it makes of the same files."""
_WATCHED = {"semantickitti": "sequences/*/*", "scannet": "scans*/*/*"}
"""Paths that change with a dataset that has no tables: files by size and time, folders by the time of their listing."""
_TEST_FOLDERS = {"nuscenes": "v1.0-test", "scannet": "scans_test"}
"""Of the official test splits, which are not in the other splits' tables, or among their scans."""


def version_of_test(kind: str, root: Path, version: str) -> str:
    """The version (see :func:`build_index`) with the official test split: one of its own if it is there, or the same.

    Args:
        kind: of the dataset.
        root: the dataset's folder.
        version: of the other splits; nuScenes' v1.0-mini and a user's own have their test scenes in themselves.
    """
    test = _TEST_FOLDERS.get(kind, "")
    beside = kind == "scannet" or version == "v1.0-trainval"
    return test if test and beside and (root / test).is_dir() else version


def ego_half_edge_m(kind: DatasetKind) -> float:
    """Half the edge of the square around the LiDAR in which the car itself is hit; 0 where it is not.

    1 m in nuScenes (nuscenes-devkit, ``LidarPointCloud.from_file_multisweep``).
    """
    return 1.0 if kind in ("nuscenes", "streetworld") else 0.0


def build_index(
    kind: DatasetKind,
    root: Path,
    *,
    version: str | None = None,
    max_sweeps: int = 10,
    images_per_scene: int | None = None,
) -> Index:
    """Build the index of a dataset folder, with a sample of its contents; a streetworld is read as nuScenes.

    Args:
        kind: ``nuscenes``, ``semantickitti``, ``scannet`` or ``streetworld``.
        root: the dataset's folder.
        version: nuScenes' folder of tables; ``scans_test`` for ScanNet's test scans; SemanticKITTI has none.
        max_sweeps: earlier sweeps to list per keyframe; ScanNet has none.
        images_per_scene: ScanNet: posed images to take per scene.

    Raises:
        ConfigError: nuScenes without a version.
        DataError: a part of the dataset is missing or damaged.
    """
    index = _index_of(kind, root, version, max_sweeps, images_per_scene)
    return replace(index, contents=sample_contents(index))


def _index_of(
    kind: DatasetKind, root: Path, version: str | None, max_sweeps: int, images_per_scene: int | None
) -> Index:
    if kind == "semantickitti":
        from clip2scene.data import semantickitti

        return semantickitti.build_index(root, max_sweeps=max_sweeps)
    if kind == "scannet":
        from clip2scene.data import scannet

        folder = scannet.TEST_FOLDER if version == scannet.TEST_FOLDER else scannet.FOLDER
        return scannet.build_index(root, folder=folder, images_per_scene=images_per_scene)
    if version is None:
        raise ConfigError(
            f"{kind}: give the name of its folder of tables below {root}, such as v1.0-mini, as --version (in a job: "
            "dataset.version)"
        )
    from clip2scene.data import nuscenes

    return nuscenes.build_index(root, version, max_sweeps=max_sweeps)


def fingerprint(kind: DatasetKind, root: Path, version: str) -> str:
    """A cheap hash of tables and listings. File contents are checked separately, once the index exists."""
    pattern = _WATCHED.get(kind, f"{version}/*.json")
    stats = [(path, path.stat()) for path in sorted((*root.glob(pattern), *root.glob(f"dataset/{pattern}")))]
    found = [(path.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
    return digest_of(_BUILDERS, str(root), version, found)
