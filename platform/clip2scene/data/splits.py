"""Which scenes a split has: nuScenes' official splits, and the two that SLidR made of the training scenes.

The official lists come from nuscenes-devkit, imported on the first call only: the driver asks, workers never do.
"""

from __future__ import annotations

from functools import cache

from clip2scene.config import ConfigError
from clip2scene.data.index import DataError, Frame, Index

OFFICIAL = ("train", "val", "test", "mini_train", "mini_val")
DERIVED = ("parametrizing", "verifying")

_VERIFYING = """
0008 0009 0019 0029 0032 0042 0045 0049 0052 0054 0056 0066 0067 0073 0131 0152 0166 0168 0183 0190
0194 0208 0210 0211 0241 0243 0248 0259 0260 0261 0287 0292 0297 0305 0306 0350 0352 0358 0361 0365
0368 0377 0388 0391 0395 0413 0427 0428 0438 0444 0452 0453 0459 0463 0464 0475 0513 0533 0544 0575
0587 0589 0642 0652 0658 0669 0678 0687 0701 0703 0706 0710 0715 0726 0735 0740 0758 0786 0790 0804
0806 0847 0856 0868 0882 0897 0899 0976 0996 1012 1015 1016 1018 1020 1024 1044 1058 1094 1098 1107
"""
"""The 100 official training scenes that SLidR (CVPR 2022) holds out to choose its settings, and everybody after it; the
600 others are pre-trained on. Source: github.com/valeoai/SLidR, pretrain/dataloader_nuscenes.py, ``CUSTOM_SPLIT``."""


@cache
def split_scenes(name: str) -> frozenset[str]:
    """Names of the scenes of a split.

    Args:
        name: ``train`` (700), ``val`` (150), ``test`` (150), ``mini_train`` (8), ``mini_val`` (2); ``verifying``: 100
            of the training scenes; ``parametrizing``: the 600 others.

    Raises:
        ConfigError: no such split.
    """
    if name not in OFFICIAL + DERIVED:
        raise ConfigError(f"split {name!r}: unknown; allowed: {', '.join(OFFICIAL + DERIVED)}")
    verifying = frozenset(f"scene-{number}" for number in _VERIFYING.split())
    if name == "verifying":
        return verifying
    from nuscenes.utils.splits import create_splits_scenes

    official = create_splits_scenes()
    if name == "parametrizing":
        return frozenset(official["train"]) - verifying
    return frozenset(official[name])


def split_frames(index: Index, name: str) -> tuple[Frame, ...]:
    """Keyframes of a split, in the index's order.

    Raises:
        ConfigError: no such split.
        DataError: the index has no keyframe of it.
    """
    frames = index.select(split_scenes(name))
    if not frames:
        scenes = sorted({frame.scene for frame in index.frames})
        listed = ", ".join(scenes[:5]) + (f" and {len(scenes) - 5} more" if len(scenes) > 5 else "")
        raise DataError(f"split {name!r} has no keyframe in the index of {index.root} (its scenes: {listed or 'none'})")
    return frames
