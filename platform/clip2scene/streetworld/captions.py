"""Image crops and the sentences that describe them: all that the small CLIP is trained on.

A caption names the things that cover a fair share of a crop, largest first, as alt text would ("a car and a road"). It
comes from the renderer's list of visible objects; training gets no pixel labels. Crops come with the larger piece of
the image that they were cut from (a tile), because the teacher will see whole images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from clip2scene.data.vocabulary import Vocabulary
from clip2scene.streetworld.render import Tracer, render_camera
from clip2scene.streetworld.sensors import make_rig
from clip2scene.streetworld.world import Scene, make_scene

PATCH_PX = 16
TILE_PX = 160
CROPS_PER_TILE = 8
FAIR_SHARE = 0.22
"""Share of a crop that a thing must cover to be named."""
MAX_THINGS = 2
SKY = "sky"
_CROP_PATCHES = (1, 5)
"""Smallest and largest side of a crop; a side of 3 has the model's own input size."""
_IMAGE_SIZE_PX = (400, 224)


@dataclass(frozen=True)
class Crop:
    """A square of a tile, on the tile's grid of patches, with its caption's words."""

    row: int
    column: int
    side: int
    """Position and size in patches."""
    phrase: str
    """What is visible, to put into a template: ``car and a road``."""
    content: frozenset[str]
    """The classes that it names: two captions with the same content are equivalent."""


@dataclass(frozen=True)
class Tile:
    """A piece of an image, and crops of it."""

    image: np.ndarray
    """(TILE_PX, TILE_PX, 3) uint8 RGB."""
    crops: tuple[Crop, ...]

    def pixels(self, crop: Crop) -> np.ndarray:
        """Pixels of a crop, (side, side, 3) uint8."""
        top, left, side = (PATCH_PX * value for value in (crop.row, crop.column, crop.side))
        return self.image[top : top + side, left : left + side]


def tiles_of_scene(
    seed: int, number: int, vocabulary: Vocabulary, tiles_per_image: int, cut_before: Counter[str]
) -> list[Tile]:
    """Tiles of the six images of one scene at a random time.

    The fewer crops ``cut_before`` counts of a class, the likelier is the next one, so that rare things appear as often
    as common ones; it is updated.
    """
    rng = np.random.default_rng([seed, number, 3])
    scene = make_scene(seed, number, 2.0)
    tracer = Tracer(scene)
    rig = make_rig(rng, *_IMAGE_SIZE_PX)
    time_s = float(rng.uniform(0, 1.5))
    names = _names_of(scene, vocabulary)
    tiles = []
    for camera in rig.cameras:
        image, seen = render_camera(tracer, camera, time_s + camera.delay_s, rng)
        for _ in range(tiles_per_image):
            row, column = _target(rng, names, seen, cut_before)[0]
            top = int(np.clip(row - rng.integers(TILE_PX), 0, seen.shape[0] - TILE_PX))
            left = int(np.clip(column - rng.integers(TILE_PX), 0, seen.shape[1] - TILE_PX))
            part = (slice(top, top + TILE_PX), slice(left, left + TILE_PX))
            crops = [_crop(rng, names, seen[part], cut_before) for _ in range(CROPS_PER_TILE)]
            tiles.append(Tile(image[part].copy(), tuple(crop for crop in crops if crop.content)))
    return tiles


def _names_of(scene: Scene, vocabulary: Vocabulary) -> list[tuple[str, tuple[str, ...]]]:
    """Class and possible nouns of every object, with the sky's last, at index -1."""
    names = []
    for thing in scene.things:
        position = vocabulary.raw_to_label[thing.category] - 1
        prompts = vocabulary.prompts[position] if position >= 0 else ()
        nouns = (thing.noun,) if thing.noun in prompts else prompts
        names.append((vocabulary.classes[position] if position >= 0 else "", nouns))
    return [*names, (SKY, (SKY,))]


def _target(
    rng: np.random.Generator, names: list[tuple[str, tuple[str, ...]]], seen: np.ndarray, cut_before: Counter[str]
) -> tuple[tuple[int, int], int]:
    """A pixel (row, column) of a random visible object, preferably of a rare class, and its extent in pixels."""
    coarse = seen[1::4, 1::4]
    visible, inverse, counts = np.unique(coarse, return_inverse=True, return_counts=True)
    weight = (counts > 2) / np.array([5.0 + cut_before[names[index][0]] for index in visible])
    chosen = int(rng.choice(len(visible), p=weight / weight.sum()))
    rows, columns = np.nonzero(inverse.reshape(coarse.shape) == chosen)
    pixel = int(rng.integers(len(rows)))
    cut_before[names[visible[chosen]][0]] += 1
    extent = 4 * (1 + max(int(np.ptp(rows)), int(np.ptp(columns))))
    return (4 * int(rows[pixel]), 4 * int(columns[pixel])), extent


def _crop(
    rng: np.random.Generator, names: list[tuple[str, tuple[str, ...]]], seen: np.ndarray, cut_before: Counter[str]
) -> Crop:
    (row, column), extent = _target(rng, names, seen, cut_before)
    side = int(np.clip(round(extent / PATCH_PX * rng.uniform(0.2, 0.8)), *_CROP_PATCHES))
    most = TILE_PX // PATCH_PX - side
    top, left = (int(np.clip(x // PATCH_PX - rng.integers(side), 0, most)) for x in (row, column))
    window = seen[PATCH_PX * top : PATCH_PX * (top + side), PATCH_PX * left : PATCH_PX * (left + side)]
    areas: Counter[str] = Counter()
    largest: dict[str, tuple[int, int]] = {}
    for index, area in zip(*(part.tolist() for part in np.unique(window, return_counts=True)), strict=True):
        label = names[index][0]
        areas[label] += area
        largest[label] = max(largest.get(label, (0, index)), (area, index))
    named = [label for label, area in areas.most_common(MAX_THINGS) if label and area >= FAIR_SHARE * window.size]
    nouns = [str(rng.choice(names[largest[label][1]][1])) for label in named]
    return Crop(top, left, side, " and a ".join(nouns), frozenset(named))
