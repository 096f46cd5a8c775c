"""Label spaces: ordered classes, the names they are prompted with, and the raw label ids that map to them.

``nuscenes``, ``semantickitti`` and ``scannet`` have labels; ``cityscapes`` and ``all`` are for prompts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clip2scene.config import ClassNames, digest_of
from clip2scene.data import class_names
from clip2scene.errors import ConfigError, DataError

IGNORE = 0
"""Label of points that count nowhere; class ``c`` of a vocabulary has label ``c + 1``."""

UNKNOWN = -1
"""In ``Vocabulary.raw_to_label``: no such raw id in the data set."""


@dataclass(frozen=True)
class Vocabulary:
    """An ordered label space. Class ``c`` (0-based) is label ``c + 1``; label 0 is ignored."""

    name: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    """Per class, the names that fill the prompt templates."""
    raw_to_label: tuple[int, ...]
    """Label of every raw id, from 0; ``UNKNOWN`` where there is no such id. Empty: for prompts only."""
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
            ConfigError: the vocabulary has no labels.
        """
        if not self.raw_to_label:
            labelled = [name for name, words in VOCABULARIES.items() if words.raw_to_label]
            raise ConfigError(
                f"{source}: the vocabulary {self.name!r} is for prompts only; no label file uses its classes; "
                f"allowed where labels are read: {', '.join(labelled)}"
            )
        size = len(self.raw_to_label)
        # One slot more, for every id beyond the table.
        table = np.array([*self.raw_to_label, UNKNOWN], dtype=np.int16)
        labels_N = table[np.where((raw_N >= 0) & (raw_N < size), raw_N, size)]
        if (labels_N == UNKNOWN).any():
            unknown = np.unique(raw_N[labels_N == UNKNOWN]).tolist()
            raise DataError(
                f"{source}: label ids {unknown} are unknown to the vocabulary {self.name!r} (allowed: {self._known()})"
            )
        return labels_N.astype(np.uint8)

    def _known(self) -> str:
        """The raw ids that there are, in ranges: ``0 to 1, 10, 13``."""
        known = [raw for raw, label in enumerate(self.raw_to_label) if label != UNKNOWN]
        starts = [raw for raw in known if raw - 1 not in known]
        ends = [raw for raw in known if raw + 1 not in known]
        return ", ".join(f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def _vocabulary(name: str, classes: class_names.Classes, ignored: tuple[int, ...]) -> Vocabulary:
    labels = dict.fromkeys(ignored, IGNORE)
    for label, (_, raw_ids, _) in enumerate(classes.values(), start=1):
        labels |= dict.fromkeys(raw_ids, label)
    raw_to_label = tuple(labels.get(raw, UNKNOWN) for raw in range(max(labels, default=-1) + 1))
    return Vocabulary(
        name=name,
        classes=tuple(classes),
        prompts=tuple(names for names, _, _ in classes.values()),
        raw_to_label=raw_to_label,
        colours=tuple(colour for _, _, colour in classes.values()),
    )


def _official(words: Vocabulary) -> Vocabulary:
    """The same classes, prompted with the benchmark's own names ("driveable surface")."""
    return replace(words, prompts=tuple((title.replace("_", " "),) for title in words.classes))


def _all(vocabularies: Sequence[Vocabulary]) -> Vocabulary:
    """The classes of all, each thing once, so that no name belongs to two classes.

    A class that shares a name with one class before it is that class and gives it its names; one that shares names with
    several (nuScenes' "manmade": building, wall, pole) is covered by them and adds none.
    """
    prompts: dict[str, tuple[str, ...]] = {}
    colours: dict[str, tuple[int, int, int]] = {}
    for words in vocabularies:
        for title, names, colour in zip(words.classes, words.prompts, words.colours, strict=True):
            same = [known for known, taken in prompts.items() if set(names) & set(taken)]
            if not same:
                prompts[title], colours[title] = names, colour
            elif len(same) == 1:
                prompts[same[0]] = tuple(dict.fromkeys((*prompts[same[0]], *names)))
    return Vocabulary("all", tuple(prompts), tuple(prompts.values()), (), tuple(colours.values()))


def _by_name(vocabularies: Sequence[Vocabulary]) -> dict[str, Vocabulary]:
    """Those of the data sets, and ``all`` of the streets' (the paper's Table 3)."""
    known = {words.name: words for words in vocabularies}
    # Cityscapes first: its classes are single things, which the others' umbrella classes are checked against.
    streets = _all([known[name] for name in ("cityscapes", "nuscenes", "semantickitti")])
    return known | {streets.name: streets}


_DATASETS = (
    _vocabulary("nuscenes", class_names.NUSCENES, class_names.NUSCENES_IGNORED),
    _vocabulary("semantickitti", class_names.SEMANTICKITTI, class_names.SEMANTICKITTI_IGNORED),
    _vocabulary("scannet", class_names.SCANNET, class_names.SCANNET_IGNORED),
    _vocabulary("cityscapes", class_names.CITYSCAPES, ()),
)
VOCABULARIES: dict[str, Vocabulary] = _by_name(_DATASETS)
_OFFICIAL = _by_name([_official(words) for words in _DATASETS])


def vocabulary(name: str, names: ClassNames = "common") -> Vocabulary:
    """The vocabulary of that name, with one kind of names to prompt with.

    Raises:
        ConfigError: no such vocabulary.
    """
    if name not in VOCABULARIES:
        raise ConfigError(f"prompts.vocabulary={name!r}: unknown; allowed: {', '.join(VOCABULARIES)}")
    return (VOCABULARIES if names == "common" else _OFFICIAL)[name]


def vocabulary_of(dataset: str, names: ClassNames = "common") -> Vocabulary:
    """The data set's own classes, which its labels and scores are in.

    Args:
        dataset: ``Index.dataset`` or the ``dataset.kind`` of a job; a streetworld has the labels of nuScenes.
        names: to prompt with.

    Raises:
        ConfigError: no such data set.
    """
    kinds = {"streetworld": "nuscenes"} | {name: name for name, words in VOCABULARIES.items() if words.raw_to_label}
    if dataset not in kinds:
        raise ConfigError(f"dataset.kind={dataset!r}: unknown; allowed: {', '.join(kinds)}")
    return vocabulary(kinds[dataset], names)
