"""Image crops and the sentences that describe them: all that the small CLIP is trained on.

A caption names the things that cover a fair share of the crop, largest first, as alt text would ("a car and a road").
It comes from the renderer's list of visible objects; no pixel label reaches the training.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clip2scene.data.vocabulary import Vocabulary
from clip2scene.streetworld.render import Tracer, render_camera
from clip2scene.streetworld.sensors import make_rig
from clip2scene.streetworld.world import Scene, make_scene

CROP_PX = 48
"""Side of a crop as the model sees it."""
FAIR_SHARE = 0.12
"""Part of a crop that a thing must cover to be named."""
MAX_THINGS = 3
SKY = "sky"
_SIDES_PX = (24, 112)


@dataclass(frozen=True)
class Crop:
    """A square piece of an image with its caption's words."""

    image: np.ndarray
    """(CROP_PX, CROP_PX, 3) uint8 RGB."""
    phrase: str
    """What is visible, to put into a template: ``car and a road``."""
    content: frozenset[str]
    """The classes it names: two captions with the same content say the same."""


def crops_of_scene(
    seed: int,
    number: int,
    vocabulary: Vocabulary,
    crops_per_image: int,
    width: int,
    height: int,
    seen_before: Counter[str],
) -> list[Crop]:
    """Crops of the six images of one scene at a random time; the fewer crops ``seen_before`` counts that
    were cut around things of a class, the likelier is the next one."""
    rng = np.random.default_rng([seed, number, 3])
    scene = make_scene(seed, number, 2.0)
    tracer = Tracer(scene)
    rig = make_rig(rng, width, height)
    time_s = float(rng.uniform(0, 1.5))
    crops = []
    for camera in rig.cameras:
        image, seen = render_camera(tracer, camera, time_s + camera.delay_s, rng)
        crops += _crops_of_image(rng, scene, vocabulary, image, seen, crops_per_image, seen_before)
    return crops


def _crops_of_image(
    rng: np.random.Generator,
    scene: Scene,
    vocabulary: Vocabulary,
    image: np.ndarray,
    seen: np.ndarray,
    count: int,
    seen_before: Counter[str],
) -> list[Crop]:
    height, width = seen.shape
    visible = [index for index, area in Counter(seen[::2, ::2].ravel().tolist()).items() if area >= 12]
    classes = {index: _class_of(scene, vocabulary, index) for index in visible}
    crops = []
    for _ in range(count):
        rarity = np.array([1.0 / (20 + seen_before[classes[index]]) for index in visible])
        target = visible[int(rng.choice(len(visible), p=rarity / rarity.sum()))]
        rows, columns = np.nonzero(seen == target)
        pixel = int(rng.integers(len(rows)))
        extent = 1 + max(int(np.ptp(rows)), int(np.ptp(columns)))
        side = int(np.clip(min(extent, 90) * rng.uniform(0.45, 1.5), *_SIDES_PX))
        jitter = rng.integers(-side // 4, side // 4 + 1, 2)
        top = int(np.clip(rows[pixel] - side // 2 + jitter[0], 0, height - side))
        left = int(np.clip(columns[pixel] - side // 2 + jitter[1], 0, width - side))
        window = (slice(top, top + side), slice(left, left + side))
        nouns = _nouns(rng, scene, vocabulary, seen[window])
        if not nouns:
            continue
        piece = Image.fromarray(image[window]).resize((CROP_PX, CROP_PX), Image.Resampling.BICUBIC)
        content = frozenset(label for label, _ in nouns)
        seen_before[classes[target]] += 1
        crops.append(Crop(np.asarray(piece), " and a ".join(noun for _, noun in nouns), content))
    return crops


def _class_of(scene: Scene, vocabulary: Vocabulary, index: int) -> str:
    if index < 0:
        return SKY
    label = vocabulary.raw_to_label[scene.things[index].category]
    return vocabulary.classes[label - 1] if label else ""


def _nouns(rng: np.random.Generator, scene: Scene, vocabulary: Vocabulary, seen: np.ndarray) -> list[tuple[str, str]]:
    """Class and noun of the things to name, largest first."""
    areas: Counter[str] = Counter()
    largest: dict[str, tuple[int, int]] = {}
    for index, area in Counter(seen.ravel().tolist()).items():
        label = _class_of(scene, vocabulary, index)
        if label:
            areas[label] += area
            largest[label] = max(largest.get(label, (0, index)), (area, index))
    nouns = []
    for label, area in areas.most_common(MAX_THINGS):
        if area >= FAIR_SHARE * seen.size:
            index = largest[label][1]
            names = (SKY,) if label == SKY else vocabulary.prompts[vocabulary.classes.index(label)]
            own = scene.things[index].noun if index >= 0 else ""
            nouns.append((label, own if own in names else str(rng.choice(names))))
    return nouns
