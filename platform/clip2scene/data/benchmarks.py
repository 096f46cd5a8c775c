"""The files in which the benchmarks want predictions: one per keyframe, with one class id per point.

Sources: ``eval/lidarseg/README.md`` and ``validate_submission.py`` of nuscenes-devkit; semantic-kitti-api's README and
``learning_map_inv`` of its semantic-kitti.yaml; the documentation of ScanNet's benchmark (3D semantic label).

Legend: N points, C classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from clip2scene.data import class_names
from clip2scene.data.index import Frame
from clip2scene.errors import DataError, one_line

_FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,200}")


@dataclass(frozen=True)
class LabelFormat:
    """How the classes of a cloud's points are written."""

    id_C: tuple[int, ...]
    """The benchmark's id of each class."""
    dtype: str | None
    """Of an id in a binary file; None for text, one id per line."""

    def encode(self, classes_N: np.ndarray) -> bytes:
        """The contents of a file, of classes (N,) from 0."""
        ids_N = np.array(self.id_C)[classes_N]
        if self.dtype is None:
            return "".join(f"{id_}\n" for id_ in ids_N).encode()
        return ids_N.astype(self.dtype).tobytes()

    def count(self, contents: bytes, source: str) -> np.ndarray:
        """Points per class (C,) int64 of a file's contents.

        Raises:
            DataError: they are not what :meth:`encode` makes; ``source`` names the file.
        """
        try:
            ids_N = (
                np.array(contents.split(), dtype=np.int64)
                if self.dtype is None
                else np.frombuffer(contents, dtype=self.dtype)
            )
        except ValueError as error:
            raise DataError(f"{source}: not a file of predictions ({one_line(error)}); remove it") from error
        counts_C = (ids_N[:, None] == np.array(self.id_C)).sum(axis=0)
        if not len(ids_N) or counts_C.sum() != len(ids_N):
            raise DataError(f"{source}: not a file of predictions (one class id per point); remove it")
        return counts_C


def _raw_ids(classes: class_names.Classes) -> tuple[int, ...]:
    return tuple(raw_ids[0] for _, raw_ids, _ in classes.values())


LABEL_FORMATS = {
    # The challenge's 16 classes, not the 32 raw categories.
    "nuscenes": LabelFormat(tuple(range(1, 1 + len(class_names.NUSCENES))), "u1"),
    "semantickitti": LabelFormat(_raw_ids(class_names.SEMANTICKITTI), "<u4"),
    "scannet": LabelFormat(_raw_ids(class_names.SCANNET), None),
}
"""By ``Index.dataset``."""


def prediction_file(dataset: str, split: str, frame: Frame) -> str:
    """POSIX path of a keyframe's predictions, below the folder that is submitted.

    Args:
        dataset: ``Index.dataset``.
        split: name of the evaluation split, a folder in nuScenes' format.
        frame: the keyframe.

    Raises:
        DataError: the token of a nuScenes cloud is missing or no file name.
    """
    if dataset == "semantickitti":
        return f"sequences/{frame.scene}/predictions/{PurePosixPath(frame.cloud_path).stem}.label"
    if dataset == "scannet":
        return f"{frame.scene}.txt"
    token = frame.cloud_token
    if token is None or not _FILE_NAME.fullmatch(token):
        raise DataError(
            f"frame {frame.frame_id}: its cloud has the token {token!r}, which names the file of its predictions; "
            "allowed: letters, digits, - and _"
        )
    return f"lidarseg/{split}/{token}_lidarseg.bin"


def submission_files(dataset: str, split: str) -> dict[str, Any]:
    """What a benchmark wants beside the labels: contents, to be written as JSON, by path.

    nuScenes' ``meta`` tells the inputs of the network: the LiDAR alone. ``use_external`` is true because CLIP has
    learned from other data, and not from the image-level labels that the challenge allows as pre-training.
    """
    if dataset != "nuscenes":
        return {}
    uses = {"camera": False, "lidar": True, "radar": False, "map": False, "external": True}
    return {f"{split}/submission.json": {"meta": {f"use_{name}": used for name, used in uses.items()}}}
