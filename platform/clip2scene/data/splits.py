"""The scenes of each split: official ones, and ``parametrizing`` and ``verifying``, which divide the training scenes.

nuScenes: the official lists come from nuscenes-devkit, which is imported on the first call (on the driver, never on
workers), and the two others are SLidR's. SemanticKITTI has its official sequences; ScanNet's official lists are read
from the user's copy. For these two the paper defines no ``parametrizing`` and ``verifying``; here every seventh
training scene in the order of names (the seventh, the fourteenth, ...) is in ``verifying``, and the rest in
``parametrizing``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import get_args

from clip2scene.config import Split
from clip2scene.data.index import Frame, Index
from clip2scene.errors import ConfigError, DataError, one_line

_VERIFYING_EVERY = 7

_SEMANTICKITTI = {
    "train": frozenset({"00", "01", "02", "03", "04", "05", "06", "07", "09", "10"}),
    "val": frozenset({"08"}),
    "test": frozenset(str(number) for number in range(11, 22)),
}

SEMANTICKITTI_SCANS = dict(
    zip(
        (f"{number:02d}" for number in range(22)),
        # 00 to 10, which have labels, and 11 to 21.
        (
            *(4541, 1101, 4661, 801, 271, 2761, 1101, 1101, 4071, 1591, 1201),
            *(921, 1061, 3281, 631, 1901, 1731, 491, 1801, 4981, 831, 2721),
        ),
        strict=True,
    )
)
"""Scans of the sequences (Behley et al., ICCV 2019: 23,201 and 20,351)."""

_SCANNET_FOLDERS = (".", "splits", "Tasks/Benchmark")
"""Folders below the root that may hold ScanNet's lists; the last is their path in ScanNet's repository."""

_VERIFYING = """
0008 0009 0019 0029 0032 0042 0045 0049 0052 0054 0056 0066 0067 0073 0131 0152 0166 0168 0183 0190
0194 0208 0210 0211 0241 0243 0248 0259 0260 0261 0287 0292 0297 0305 0306 0350 0352 0358 0361 0365
0368 0377 0388 0391 0395 0413 0427 0428 0438 0444 0452 0453 0459 0463 0464 0475 0513 0533 0544 0575
0587 0589 0642 0652 0658 0669 0678 0687 0701 0703 0706 0710 0715 0726 0735 0740 0758 0786 0790 0804
0806 0847 0856 0868 0882 0897 0899 0976 0996 1012 1015 1016 1018 1020 1024 1044 1058 1094 1098 1107
"""
"""The 100 official training scenes that SLidR (CVPR 2022) and its successors hold out to choose settings; the 600
others are for pre-training. Source: github.com/valeoai/SLidR, pretrain/dataloader_nuscenes.py, ``CUSTOM_SPLIT``."""


@cache
def nuscenes_scenes(name: Split) -> frozenset[str]:
    """Scene names of a split of nuScenes (and of a streetworld, which uses scene names of nuScenes).

    Args:
        name: ``train`` (700), ``val`` (150), ``test`` (150), ``mini_train`` (8), ``mini_val`` (2); ``verifying``: 100
            of the training scenes; ``parametrizing``: the 600 others.

    Raises:
        ConfigError: no such split.
    """
    if name not in get_args(Split):
        raise ConfigError(f"split {name!r}: unknown; allowed: {', '.join(get_args(Split))}")
    verifying = frozenset(f"scene-{number}" for number in _VERIFYING.split())
    if name == "verifying":
        return verifying
    from nuscenes.utils.splits import create_splits_scenes

    official = create_splits_scenes()
    if name == "parametrizing":
        return frozenset(official["train"]) - verifying
    return frozenset(official[name])


def scenes_of_split(dataset: str, root: Path, name: Split) -> frozenset[str]:
    """Scene names of a split of a data set, whether they are on disk or not.

    Args:
        dataset: ``nuscenes``, ``semantickitti`` or ``scannet``.
        root: folder with ScanNet's official lists.
        name: nuScenes: see :func:`nuscenes_scenes`. SemanticKITTI: ``train`` (10 sequences), ``val`` (08), ``test`` (11
            to 21). ScanNet: ``train`` (1,201), ``val`` (312), ``test`` (100). Both: ``parametrizing``, ``verifying``.

    Raises:
        ConfigError: no such split.
        DataError: one of ScanNet's lists is missing or damaged.
    """
    if dataset == "nuscenes":
        return nuscenes_scenes(name)
    allowed = [split for split in get_args(Split) if not split.startswith("mini")]
    if name not in allowed:
        raise ConfigError(f"split {name!r}: unknown for {dataset}; allowed: {', '.join(allowed)}")
    part = "train" if name in ("parametrizing", "verifying") else name
    scenes = _SEMANTICKITTI[part] if dataset == "semantickitti" else _scannet_scenes(root, part)
    # Scans of the same ScanNet room (sceneXXXX_00, sceneXXXX_01) stay in the same part.
    rooms = sorted({scene.partition("_")[0] for scene in scenes})[_VERIFYING_EVERY - 1 :: _VERIFYING_EVERY]
    verifying = frozenset(scene for scene in scenes if scene.partition("_")[0] in rooms)
    return {"verifying": verifying, "parametrizing": scenes - verifying}.get(name, scenes)


def _scannet_scenes(root: Path, part: str) -> frozenset[str]:
    file = f"scannetv2_{part}.txt"
    path = next((root / folder / file for folder in _SCANNET_FOLDERS if (root / folder / file).is_file()), None)
    if path is None:
        places = ", ".join(str(root / folder) for folder in _SCANNET_FOLDERS)
        raise DataError(f"{file}: ScanNet's official list is missing; it is looked for in {places}")
    try:
        names = path.read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of scenes ({one_line(error)})") from error
    strange = next((name for name in names if not re.fullmatch(r"scene\d{4}_\d{2}", name)), None)
    if strange is not None or not names:
        raise DataError(
            f"{path}: {strange or 'nothing'!r} is not a scene; allowed: names like scene0000_00, one per line"
        )
    return frozenset(names)


def split_frames(index: Index, name: Split) -> tuple[Frame, ...]:
    """Keyframes of a split of the index's data set, in the index's order.

    Raises:
        ConfigError: no such split.
        DataError: the index has no keyframe of it, or one of ScanNet's lists is missing or damaged.
    """
    frames = index.select(scenes_of_split(index.dataset, index.root.path, name))
    if not frames:
        scenes = sorted({frame.scene for frame in index.frames})
        listed = ", ".join(scenes[:5]) + (f" and {len(scenes) - 5} more" if len(scenes) > 5 else "")
        raise DataError(
            f"split {name!r} has no keyframe in the index of {index.root.path} (its scenes: {listed or 'none'})"
        )
    return frames


def missing_of_split(index: Index, name: Split) -> str | None:
    """How much of an official split is on disk, like ``3 of 4071 scans``; None where all of it is.

    Scores on a part of a split are not those of the split. Counted in scenes, and in SemanticKITTI in scans.

    Raises:
        ConfigError: no such split.
        DataError: one of ScanNet's lists is missing or damaged.
    """
    scenes = scenes_of_split(index.dataset, index.root.path, name)
    frames = index.select(scenes)
    found, expected, unit = len({frame.scene for frame in frames}), len(scenes), "scenes"
    if index.dataset == "semantickitti":
        found, expected, unit = len(frames), sum(SEMANTICKITTI_SCANS[scene] for scene in scenes), "scans"
    return f"{found} of {expected} {unit}" if found < expected else None
