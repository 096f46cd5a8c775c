"""A keyframe in numbers, which check that an index, its files and the projection agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clip2scene.data.clouds import read_cloud, read_depths, read_labels
from clip2scene.data.index import Frame, Index
from clip2scene.data.vocabulary import IGNORE, Vocabulary
from clip2scene.geometry.pairing import pair


def inspect_frame(index: Index, frame: Frame, vocabulary: Vocabulary) -> dict[str, Any]:
    """Count a keyframe's points, pairs, sweeps and labels.

    Args:
        index: tells where the dataset lies.
        frame: one of its keyframes.
        vocabulary: names of the labels.

    Returns:
        ``{"frame_id", "points", "pairs": {camera: n}, "seen_by_any", "seen_by_two_or_more", "sweeps",
        "labels": {name: n}}``, ready for JSON. ``sweeps`` counts the available earlier sweeps; ``labels`` has the
        classes that occur and ``ignore``, and is empty without a label file.

    Raises:
        DataError: the cloud, a depth map or the label file is missing or damaged.
    """
    points_N3 = read_cloud(index.root.path_of(frame.cloud_path))[:, :3]
    pairs = pair(points_N3, frame.world_from_lidar, frame.cameras, read_depths(index.root, frame))
    per_camera = np.bincount(pairs.camera_P, minlength=len(frame.cameras))
    views_N = np.bincount(pairs.point_P, minlength=len(points_N3))
    return {
        "frame_id": frame.frame_id,
        "points": len(points_N3),
        "pairs": {camera.name: int(count) for camera, count in zip(frame.cameras, per_camera, strict=True)},
        "seen_by_any": int((views_N >= 1).sum()),
        "seen_by_two_or_more": int((views_N >= 2).sum()),
        "sweeps": len(frame.sweeps),
        "labels": _count_labels(index, frame, vocabulary, len(points_N3)),
    }


def format_table(frames: Sequence[dict[str, Any]]) -> str:
    """Lay out :func:`inspect_frame`'s counts for a terminal, one block per keyframe.

    Example:
        >>> print(format_table([{"frame_id": "a1", "points": 9, "pairs": {"CAM_FRONT": 4}, "seen_by_any": 4,
        ...                      "seen_by_two_or_more": 0, "sweeps": 2, "labels": {"car": 3, "ignore": 6}}]))
        frame a1
          points                    9
          earlier sweeps            2
          pairs   CAM_FRONT         4
          seen by any               4
          seen by two or more       0
          labels  car               3
                  ignore            6
    """
    return "\n\n".join(_format_frame(frame) for frame in frames)


def _format_frame(frame: dict[str, Any]) -> str:
    rows = [
        ("points", frame["points"]),
        ("earlier sweeps", frame["sweeps"]),
        *_group("pairs", frame["pairs"]),
        ("seen by any", frame["seen_by_any"]),
        ("seen by two or more", frame["seen_by_two_or_more"]),
        *_group("labels", frame["labels"]),
    ]
    names = max(len(name) for name, _ in rows)
    numbers = max(len(f"{value:,}") for _, value in rows)
    width = max(names + 2 + numbers, 27)
    lines = [f"  {name}{value:>{width - len(name)},}" for name, value in rows]
    return "\n".join([f"frame {frame['frame_id']}", *lines])


def _group(title: str, counts: dict[str, int]) -> list[tuple[str, int]]:
    titles = [title] + [""] * (len(counts) - 1)
    return [(f"{head:<8}{name}", count) for head, (name, count) in zip(titles, counts.items(), strict=False)]


def _count_labels(index: Index, frame: Frame, vocabulary: Vocabulary, num_points: int) -> dict[str, int]:
    if frame.label_path is None:
        return {}
    labels_N = read_labels(index.root.path_of(frame.label_path), num_points, vocabulary)
    counts = np.bincount(labels_N, minlength=len(vocabulary.classes) + 1)
    named = {name: int(counts[label]) for label, name in enumerate(vocabulary.classes, start=1) if counts[label]}
    return named | ({"ignore": int(counts[IGNORE])} if counts[IGNORE] else {})
