"""The entry point for all datasets: builds the index of any kind, and tells when it must be built again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from clip2scene.config import DatasetKind, digest_of
from clip2scene.data.contents import sample_contents
from clip2scene.data.index import Index
from clip2scene.errors import ConfigError

_BUILDERS = 4
"""Raised whenever a builder changes the index that it makes of the same files."""
_WATCHED = {"semantickitti": ("sequences/*/*",), "scannet": ("scans*/*/*", "scannet_frames_25k/*/*")}
"""Paths that change with a dataset: files by size and time, folders by the time of their listing. nuScenes' tables are
those of all scenes, so that another downloaded part of it changes its folders only."""
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
    linked_folders: Iterable[Path] = (),
) -> Index:
    """Build the index of a dataset folder, with a sample of its contents; a streetworld is read as nuScenes.

    Args:
        kind: ``nuscenes``, ``semantickitti``, ``scannet`` or ``streetworld``.
        root: the dataset's folder.
        version: nuScenes' folder of tables; ``scans_test`` for ScanNet's test scans; SemanticKITTI has none.
        max_sweeps: earlier sweeps to list per keyframe; ScanNet has none.
        images_per_scene: ScanNet: posed images to take per scene.
        linked_folders: folders outside of the root to which links in it may lead.

    Raises:
        ConfigError: nuScenes without a version.
        DataError: a part of the dataset is missing or damaged.
    """
    index = _index_of(kind, root, version, max_sweeps, images_per_scene, tuple(linked_folders))
    return replace(index, contents=sample_contents(index))


def _index_of(
    kind: DatasetKind,
    root: Path,
    version: str | None,
    max_sweeps: int,
    images_per_scene: int | None,
    linked: tuple[Path, ...],
) -> Index:
    if kind == "semantickitti":
        from clip2scene.data import semantickitti

        return semantickitti.build_index(root, max_sweeps=max_sweeps, linked_folders=linked)
    if kind == "scannet":
        from clip2scene.data import scannet

        folder = scannet.TEST_FOLDER if version == scannet.TEST_FOLDER else scannet.FOLDER
        return scannet.build_index(root, folder=folder, images_per_scene=images_per_scene, linked_folders=linked)
    if version is None:
        raise ConfigError(
            f"{kind}: give the name of its folder of tables below {root}, such as v1.0-mini, as --version (in a job: "
            "dataset.version)"
        )
    from clip2scene.data import nuscenes

    return nuscenes.build_index(root, version, max_sweeps=max_sweeps, linked_folders=linked)


def fingerprint(kind: DatasetKind, root: Path, version: str) -> str:
    """A cheap hash of tables and listings. File contents are checked separately, once the index exists."""
    patterns = _WATCHED.get(kind, (f"{version}/*.json", "samples/*"))
    paths = sorted(path for below in patterns for pattern in (below, f"dataset/{below}") for path in root.glob(pattern))
    stats = [(path, path.stat() if path.exists() else path.lstat()) for path in paths]  # a link may lead nowhere
    found = [(path.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns) for path, s in stats]
    return digest_of(_BUILDERS, str(root), version, found)
