"""The street itself: an arc of road with its cross-section, and the meshes of the ground.

Street coordinates are ``s`` (metres along the centre line) and ``d`` (metres to its left); traffic keeps right, so the
ego vehicle drives at d < 0.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from clip2scene.streetworld.meshes import Mesh, Texture, merge, paint, quads

LANE_M = 3.4
PARKING_M = 2.7
GROUND_BELOW_M = -0.3
EDGE_M = 80.0
"""The world ends this far to either side."""
Interval = tuple[float, float]
Colour = tuple[float, float, float]
_KERB = (0.62, 0.61, 0.58)


@dataclass(frozen=True)
class Side:
    """What lies beyond one edge of the road."""

    kind: str
    """``town`` (houses at the sidewalk), ``suburb`` (a strip of grass, then walls and houses) or ``park``."""
    sidewalk_m: float
    grass_m: float


@dataclass(frozen=True)
class Street:
    """Geometry of one scene's street; lengths in metres."""

    curvature_1_m: float
    begin: float
    end: float
    lanes: int
    island_half: float
    island_kind: str
    """``island`` (raised, with kerbs) or ``rails``."""
    islands: tuple[Interval, ...]
    crossings: tuple[Interval, ...]
    left: Side
    right: Side
    sidewalk_height: float
    paving: tuple[float, float, float]
    asphalt: tuple[float, float, float]
    grass: tuple[float, float, float]
    noise: np.ndarray = field(repr=False, compare=False)
    """(256, 256) float32 in 0..1, the unevenness of the grass."""

    @property
    def edge(self) -> float:
        """Distance of both road edges from the centre line."""
        return self.island_half + self.lanes * LANE_M + PARKING_M

    def lane(self, number: int, direction: int) -> float:
        """``d`` of a lane's centre: direction +1 is the ego's (right), -1 the oncoming one; lane 0 is the inner one."""
        return -direction * (self.island_half + (number + 0.5) * LANE_M)

    def place(self, s: np.ndarray | float, d: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World x, y and heading (radians) of street coordinates."""
        radius = 1 / self.curvature_1_m
        heading = np.asarray(s) * self.curvature_1_m
        return (radius - d) * np.sin(heading), radius - (radius - d) * np.cos(heading), heading

    def locate(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Street coordinates s, d of world x, y (the inverse of :meth:`place`)."""
        radius = 1 / self.curvature_1_m
        sign = np.float32(np.sign(radius))
        upward = sign * (np.float32(radius) - y)
        return np.arctan2(sign * x, upward) * np.float32(radius), np.float32(radius) - sign * np.hypot(x, upward)

    def in_crossing(self, low: float, high: float, margin: float = 1.0) -> bool:
        """Whether the stretch s = low..high touches a side street."""
        return any(low < stop + margin and high > start - margin for start, stop in self.crossings)

    def grass_height(self, s: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Height of the uneven ground: rough on the scale of a metre, rising away from the road."""
        away = np.clip(np.abs(d) - self.edge - 2.0, 0, 25)
        row, column = np.floor(s / 0.6).astype(int), np.floor(d / 0.6).astype(int)
        rough = self.noise[row % 256, column % 256] - 0.5
        broad = self.noise[(row // 6) % 256, (column // 6 + 91) % 256] - 0.5
        return 0.22 + 0.055 * away + 0.34 * rough + 0.25 * broad


def make_street(rng: np.random.Generator, drive_m: float) -> Street:
    """A random street along which the ego drives from s = 0 to ``drive_m``."""
    begin, end = -62.0, drive_m + 62.0
    sides = []
    for _ in range(2):
        kind = str(rng.choice(["town", "suburb", "park"], p=[0.35, 0.4, 0.25]))
        grass = {"town": rng.uniform(1.5, 3.4), "suburb": rng.uniform(4.0, 9.0), "park": rng.uniform(14, 24)}[kind]
        sides.append(Side(kind, float(rng.uniform(3.0, 5.5)), float(grass)))
    crossings = []
    s = rng.uniform(-30, 25)
    while s < end:
        if rng.random() < 0.75:
            crossings.append((float(s), float(s + rng.uniform(7, 10))))
        s += rng.uniform(50, 75)
    kind = "rails" if rng.random() < 0.35 else "island"
    half = 1.55 if kind == "rails" else rng.uniform(0.9, 1.5)
    islands = []
    stops = [begin] + [edge for crossing in crossings for edge in (crossing[0] - 2.5, crossing[1] + 2.5)] + [end]
    for low, high in zip(stops[::2], stops[1::2], strict=True):
        if kind == "rails":
            islands.append((low, high))
            continue
        s = low + rng.uniform(0, 8)
        while s < high - 6:
            stop = min(s + rng.uniform(14, 30), high)
            islands.append((float(s), float(stop)))
            s = stop + rng.uniform(6, 14)
    grey = rng.uniform(0.26, 0.38)
    paving = ((0.56, 0.53, 0.48), (0.58, 0.46, 0.4), (0.5, 0.5, 0.52), (0.62, 0.57, 0.44))[int(rng.integers(4))]
    return Street(
        curvature_1_m=float(rng.choice([-1, 1]) / np.exp(rng.uniform(np.log(130), np.log(900)))),
        begin=begin,
        end=end,
        lanes=1 if rng.random() < 0.7 else 2,
        island_half=float(half),
        island_kind=kind,
        islands=tuple(islands),
        crossings=tuple(crossings),
        left=sides[0],
        right=sides[1],
        sidewalk_height=float(rng.uniform(0.15, 0.2)),
        paving=tuple(np.clip(np.asarray(paving) * rng.uniform(0.85, 1.1), 0, 1).tolist()),
        asphalt=(grey, grey, grey * rng.uniform(0.98, 1.06)),
        grass=((0.25, 0.38, 0.12) if rng.random() < 0.75 else (0.42, 0.4, 0.18)),
        noise=rng.random((256, 256)).astype(np.float32),
    )


def ground(street: Street) -> dict[str, Mesh]:
    """The ground's meshes in world coordinates, by raw category (``flat.*``)."""
    parts: dict[str, list[Mesh]] = {
        name: [] for name in ("flat.driveable_surface", "flat.sidewalk", "flat.terrain", "flat.other")
    }

    def flat(category: str, colour: Colour, texture: Texture, span: Interval, between: Interval, z: float) -> None:
        patch = _patch(street, *span, np.array([min(between), max(between)]), np.array([z, z]), colour, texture)
        parts[category].append(patch)

    road, edge, height = street.asphalt, street.edge, street.sidewalk_height
    flat("flat.driveable_surface", road, Texture.ROAD, (street.begin, street.end), (-edge, edge), 0.0)
    for low, high in street.islands:
        parts["flat.other"] += _island(street, low, high)
    cuts = [street.begin, *(edge_s for crossing in street.crossings for edge_s in crossing), street.end]
    for number, (low, high) in enumerate(itertools.pairwise(cuts)):
        if high - low < 0.1:
            continue
        for sign, side in ((1, street.left), (-1, street.right)):
            if number % 2:
                flat("flat.driveable_surface", road, Texture.ROAD, (low, high), (sign * edge, sign * EDGE_M), 0.0)
                continue
            kerb, outer = edge + 0.2, edge + side.sidewalk_m
            flat("flat.sidewalk", _KERB, Texture.CONCRETE, (low, high), (sign * edge, sign * kerb), height)
            flat(
                "flat.sidewalk", street.paving, Texture.PAVING, (low, high), (sign * kerb, sign * outer), height - 0.01
            )
            fine = np.arange(outer, outer + side.grass_m + 4.0, 0.6)
            coarse = np.arange(fine[-1], EDGE_M + 6, 6.0)
            parts["flat.terrain"].append(_grass(street, low, high, np.sort(sign * fine), 0.6))
            parts["flat.terrain"].append(_grass(street, low, high, np.sort(sign * coarse), 6.0))
    return {category: merge(meshes) for category, meshes in parts.items() if meshes}


def _patch(
    street: Street,
    low: float,
    high: float,
    d: np.ndarray,
    z: np.ndarray,
    colour: Colour,
    texture: Texture,
) -> Mesh:
    """A profile z(d) swept from s = low to high, with skirts down into the ground on all sides."""
    s = np.linspace(low, high, max(2, int(np.ceil((high - low) / 3)) + 1))
    s = np.concatenate([s[:1], s, s[-1:]])
    d = np.concatenate([d[:1], d, d[-1:]])
    height = np.tile(np.concatenate([[GROUND_BELOW_M], z, [GROUND_BELOW_M]]), (len(s), 1))
    height[[0, -1]] = GROUND_BELOW_M
    return _surface(street, s, d, height, colour, texture)


def _grass(street: Street, low: float, high: float, d: np.ndarray, step: float) -> Mesh:
    s = np.append(np.arange(low, high - 0.3 * step, step), high)
    height = street.grass_height(s[:, None], d[None])
    rows, columns = np.concatenate([s[:1], s, s[-1:]]), np.concatenate([d[:1], d, d[-1:]])
    height = np.pad(height, 1, constant_values=GROUND_BELOW_M)
    return _surface(street, rows, columns, height, street.grass, Texture.GRASS)


def _surface(
    street: Street,
    s: np.ndarray,
    d: np.ndarray,
    height: np.ndarray,
    colour: Colour,
    texture: Texture,
) -> Mesh:
    x, y, _ = street.place(s[:, None], d[None])
    vertices = np.stack([x, y, height], axis=-1).reshape(-1, 3)
    return paint(vertices, quads(len(s), len(d)), colour, texture)


def _island(street: Street, low: float, high: float) -> list[Mesh]:
    half = street.island_half
    if street.island_kind == "rails":
        bed = _patch(
            street,
            low,
            high,
            np.array([-half, -half + 0.35, half - 0.35, half]),
            np.array([0.03, 0.24, 0.24, 0.03]),
            (0.4, 0.33, 0.28),
            Texture.GRAVEL,
        )
        rails = [
            _patch(
                street,
                low,
                high,
                np.array([d - 0.09, d + 0.09]),
                np.array([0.42, 0.42]),
                (0.3, 0.26, 0.24),
                Texture.PLAIN,
            )
            for d in (-0.75, 0.75)
        ]
        return [bed, *rails]
    d = np.array([-half, -half + 0.12, -half + 0.35, 0, half - 0.35, half - 0.12, half])
    z = np.array([0.02, 0.28, 0.31, 0.36, 0.31, 0.28, 0.02])
    return [_patch(street, low, high, d, z, (0.6, 0.3, 0.24), Texture.ISLAND)]
