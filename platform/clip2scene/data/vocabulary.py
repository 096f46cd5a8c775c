"""Classes, the names they are prompted with, and the raw label ids that map to them.

nuScenes: the official lidarseg mapping of 32 raw categories to 16 classes (0 = ignore), nuScenes-lidarseg challenge.
Names are readable ("traffic cone", never "traffic_cone") and a class may have several: their embeddings are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clip2scene.config import ConfigError, digest_of
from clip2scene.data.index import DataError

IGNORE = 0
"""Label of points that count nowhere; class ``c`` of a vocabulary has label ``c + 1``."""


@dataclass(frozen=True)
class Vocabulary:
    """An ordered label space. Class ``c`` (0-based) is label ``c + 1``; label 0 is ignored."""

    name: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    """Per class, the names that fill the prompt templates."""
    raw_to_label: tuple[int, ...]
    """Label of every raw id, from 0."""
    colours: tuple[tuple[int, int, int], ...]
    """RGB per class, as the dataset draws it."""

    @property
    def digest(self) -> str:
        """Hash of class names and prompts: every annotation-free score carries it."""
        return digest_of(self.name, self.classes, self.prompts)

    def labels(self, raw_N: np.ndarray, source: str) -> np.ndarray:
        """Map raw ids (N,) to labels (N,) uint8 in [0, C].

        Raises:
            DataError: an id outside the mapping; ``source`` names the file.
        """
        table = np.asarray(self.raw_to_label, dtype=np.uint8)
        if raw_N.size and int(raw_N.max()) >= len(table):
            unknown = sorted({int(value) for value in np.unique(raw_N) if value >= len(table)})
            raise DataError(
                f"{source}: label ids {unknown} are unknown to the vocabulary {self.name!r} "
                f"(allowed: 0 to {len(table) - 1})"
            )
        return table[raw_N]


# Class: names to prompt with, raw lidarseg ids (index of the category in lidarseg's category.json), colour.
_NUSCENES: dict[str, tuple[tuple[str, ...], tuple[int, ...], tuple[int, int, int]]] = {
    "barrier": (("barrier", "traffic barrier"), (9,), (112, 128, 144)),
    "bicycle": (("bicycle",), (14,), (220, 20, 60)),
    "bus": (("bus",), (15, 16), (255, 127, 80)),
    "car": (("car",), (17,), (255, 158, 0)),
    "construction_vehicle": (("construction vehicle", "excavator"), (18,), (233, 150, 70)),
    "motorcycle": (("motorcycle",), (21,), (255, 61, 99)),
    "pedestrian": (("pedestrian", "person"), (2, 3, 4, 6), (0, 0, 230)),
    "traffic_cone": (("traffic cone",), (12,), (47, 79, 79)),
    "trailer": (("trailer",), (22,), (255, 140, 0)),
    "truck": (("truck",), (23,), (255, 99, 71)),
    "driveable_surface": (("road", "street"), (24,), (0, 207, 191)),
    "other_flat": (("traffic island", "rail track"), (25,), (175, 0, 75)),
    "sidewalk": (("sidewalk",), (26,), (75, 0, 75)),
    "terrain": (("grass", "terrain"), (27,), (112, 180, 60)),
    "manmade": (("building", "wall", "pole"), (28,), (222, 184, 135)),
    "vegetation": (("tree", "vegetation"), (30,), (0, 175, 0)),
}


def _nuscenes() -> Vocabulary:
    raw_to_label = [IGNORE] * 32
    for label, (_, raw_ids, _) in enumerate(_NUSCENES.values(), start=1):
        for raw in raw_ids:
            raw_to_label[raw] = label
    return Vocabulary(
        name="nuscenes",
        classes=tuple(_NUSCENES),
        prompts=tuple(names for names, _, _ in _NUSCENES.values()),
        raw_to_label=tuple(raw_to_label),
        colours=tuple(colour for _, _, colour in _NUSCENES.values()),
    )


VOCABULARIES: dict[str, Vocabulary] = {"nuscenes": _nuscenes()}


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary of that name.

    Raises:
        ConfigError: no such vocabulary.
    """
    if name not in VOCABULARIES:
        raise ConfigError(f"prompts.vocabulary={name!r}: unknown; allowed: {', '.join(sorted(VOCABULARIES))}")
    return VOCABULARIES[name]
