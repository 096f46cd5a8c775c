"""Procedural textures: reflectance of surface points from their texture and their position on the object.

Coordinates are metres in the object's frame; patterns finer than a pixel fade out with distance.

Legend: N points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clip2scene.streetworld.meshes import Texture
from clip2scene.streetworld.street import LANE_M, Street


def _tile(octaves: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(5)
    total = np.zeros((512, 512), np.float32)
    for size in octaves:
        lattice = rng.standard_normal((size, size)).astype(np.float32)
        position = np.arange(512) * size / 512
        low = position.astype(int)
        weight = (position - low).astype(np.float32)
        weight = weight * weight * (3 - 2 * weight)
        rows = lattice[low % size] * (1 - weight)[:, None] + lattice[(low + 1) % size] * weight[:, None]
        total += rows[:, low % size] * (1 - weight) + rows[:, (low + 1) % size] * weight
    return np.clip(total / total.std(), -2.5, 2.5)


_CLOUDS = _tile((16, 32, 64, 128))
_GRAIN = np.random.default_rng(6).standard_normal((512, 512)).astype(np.float32).clip(-2.5, 2.5)


def clouds(u: np.ndarray, v: np.ndarray, texel_m: float) -> np.ndarray:
    """Smooth noise of unit deviation (N,); features of 4 to 32 texels."""
    return _CLOUDS[np.floor(u / texel_m).astype(np.int32) & 511, np.floor(v / texel_m).astype(np.int32) & 511]


def grain(u: np.ndarray, v: np.ndarray, texel_m: float) -> np.ndarray:
    """White noise of unit deviation (N,), one value per texel."""
    return _GRAIN[np.floor(u / texel_m).astype(np.int32) & 511, np.floor(v / texel_m).astype(np.int32) & 511]


@dataclass
class Surface:
    """Points of one texture."""

    colour: np.ndarray
    """(N, 3) float32 base reflectance."""
    local: np.ndarray
    """(3, N) float32, the object's frame."""
    normal: np.ndarray
    """(3, N) float32, the object's frame."""
    seed: np.ndarray
    """(N,) int32 per instance."""
    depth_m: np.ndarray
    """(N,) float32."""
    street: Street

    def across(self) -> np.ndarray:
        """Horizontal coordinate along the face."""
        return np.where(np.abs(self.normal[0]) > np.abs(self.normal[1]), self.local[1], self.local[0])

    def fade(self, reach_m: float) -> np.ndarray:
        """Contrast of a fine pattern: 1 nearby, and falling beyond ``reach_m``."""
        return 1 / (1 + (self.depth_m / reach_m) ** 2)


def _fract(x: np.ndarray) -> np.ndarray:
    return x - np.floor(x)


def _shade(surface: Surface, factor: np.ndarray) -> np.ndarray:
    return surface.colour * factor[:, None]


def _mix(colour: np.ndarray, other: tuple[float, float, float] | np.ndarray, weight: np.ndarray) -> np.ndarray:
    return colour + (np.asarray(other, np.float32) - colour) * weight[:, None].astype(np.float32)


def _plain(p: Surface) -> np.ndarray:
    x, y, z = p.local
    return _shade(p, 1 + 0.05 * clouds(x + y + p.seed, z, 0.05))


def _road(p: Surface) -> np.ndarray:
    street = p.street
    s, d = street.locate(p.local[0], p.local[1])
    factor = 1 + 0.1 * grain(s, d, 0.06) * p.fade(12) + 0.09 * clouds(s * 0.4, d, 0.12)
    repair = clouds(s + 31, d * 0.7 + 7, 0.5) > 1.7
    colour = _shade(p, np.where(repair, 0.72, 1.0) * factor)
    across = np.abs(d)
    lane = across - street.island_half
    width = 0.08 + 0.002 * p.depth_m
    inside = across < street.edge
    dashes = (np.abs(lane - LANE_M) < width) & (_fract(s / 6) < 0.5) & (street.lanes > 1)
    solid = np.abs(lane - street.lanes * LANE_M) < width * 0.8
    centre = (across < width) | (np.abs(lane + 0.15) < width * 0.8)
    zebra = np.zeros(len(s), bool)
    side = np.zeros(len(s), bool)
    for low, high in street.crossings:
        side |= (s > low) & (s < high)
        zebra |= ((s > low - 3.4) & (s < low - 0.6)) & (_fract(d / 1.0) < 0.5)
    marks = (dashes | solid | centre) & inside & ~side
    worn = 0.75 + 0.2 * clouds(s, d, 0.04)
    colour = _mix(colour, (0.82, 0.82, 0.8), np.where((marks & ~zebra) | (zebra & inside), worn.clip(0, 1), 0))
    oil = (np.abs(_fract(lane / LANE_M) - 0.5) < 0.12) & inside
    return colour * np.where(oil, 0.9, 1.0)[:, None].astype(np.float32)


def _paving(p: Surface) -> np.ndarray:
    s, d = p.street.locate(p.local[0], p.local[1])
    joint = (_fract(s / 0.6) < 0.07) | (_fract(d / 0.6) < 0.07)
    slab = grain(s, d, 0.6)
    return _shade(p, (1 + 0.09 * slab + 0.05 * grain(s, d, 0.05)) * (1 - 0.38 * joint * p.fade(14)))


def _grass(p: Surface) -> np.ndarray:
    x, y, _ = p.local
    dry = (clouds(x, y, 0.25) * 0.5 + 0.3 * clouds(x + 50, y, 0.06)).clip(-0.4, 1)
    colour = _mix(p.colour, (0.45, 0.36, 0.2), 0.4 * (dry + 0.4))
    return colour * (1 + 0.28 * grain(x, y, 0.07) * p.fade(14) + 0.12 * clouds(x, y, 0.05))[:, None]


def _leaves(p: Surface) -> np.ndarray:
    x, y, z = p.local
    u, v = x + 0.6 * z, y + 0.8 * z
    factor = 1 + 0.42 * clouds(u + p.seed, v, 0.035) * p.fade(30) + 0.25 * grain(u, v, 0.05) * p.fade(15)
    return _shade(p, factor.clip(0.25, 2.2))


def _bark(p: Surface) -> np.ndarray:
    x, y, z = p.local
    return _shade(p, 1 + 0.3 * clouds((x + y) * 4, z * 0.4, 0.05))


def _facade(p: Surface) -> np.ndarray:
    u, z = p.across(), p.local[2]
    pitch = 1.9 + 0.25 * (p.seed % 6)
    storey = 2.8 + 0.2 * (p.seed % 4)
    column, row = u / pitch + 0.5, (z - 0.9) / storey
    fu, fz = _fract(column), _fract(row)
    wide = 0.22 + 0.05 * (p.seed % 3)
    opening = (np.abs(fu - 0.5) < wide) & (fz > 0.15) & (fz < 0.72) & (z > 0.9)
    frame = (np.abs(fu - 0.5) < wide + 0.05) & (fz > 0.1) & (fz < 0.77) & (z > 0.9) & ~opening
    lit = grain(column + p.seed * 7, row, 1.0)
    brick = (_fract(z / 0.16) < 0.14) | (_fract(u / 0.34 + 0.5 * np.floor(z / 0.16)) < 0.08)
    use = (p.seed % 2).astype(bool)
    colour = _shade(p, (1 + 0.07 * clouds(u, z, 0.1)) * np.where(use & brick, 1 - 0.3 * p.fade(16), 1))
    glass = np.stack([0.16 + 0.05 * lit, 0.2 + 0.05 * lit, 0.25 + 0.06 * lit], 1).clip(0.04, 0.9)
    glass = np.where((lit > 1.4)[:, None], np.array([0.75, 0.66, 0.45], np.float32), glass)
    colour = np.where(frame[:, None], np.array([0.7, 0.69, 0.66], np.float32), colour)
    return np.where(opening[:, None], glass, colour).astype(np.float32)


def _brick(p: Surface) -> np.ndarray:
    u, z = p.across(), p.local[2]
    row = np.floor(z / 0.2)
    joint = (_fract(z / 0.2) < 0.15) | (_fract(u / 0.42 + 0.5 * row) < 0.08)
    return _shade(p, (1 + 0.13 * grain(u + 0.21 * row, z, 0.21)) * (1 - 0.3 * joint * p.fade(18)))


def _concrete(p: Surface) -> np.ndarray:
    u, z = p.across(), p.local[2]
    return _shade(
        p, (1 + 0.1 * clouds(u + p.seed, z + p.local[1] * 0.2, 0.06)) * np.where(_fract(u / 2.4) < 0.015, 0.75, 1)
    )


def _stripes(p: Surface) -> np.ndarray:
    y, z = p.local[1], p.local[2]
    grey = p.colour.min(axis=1) > 0.5
    stripe = (_fract((y + z) / 0.6) < 0.5) & (z > 0.42) & (z < 0.96)
    white = np.where(grey[:, None], np.array([0.8, 0.1, 0.08], np.float32), np.array([0.86, 0.85, 0.82], np.float32))
    return _mix(p.colour * (1 + 0.06 * clouds(y, z, 0.04))[:, None], white, stripe * 0.95)


def _bands(p: Surface) -> np.ndarray:
    z = p.local[2]
    white = ((z > 0.28) & (z < 0.42)) | ((z > 0.54) & (z < 0.64))
    return _mix(p.colour, (0.9, 0.9, 0.88), white * 0.95)


def _corrugated(p: Surface) -> np.ndarray:
    u, z = p.across(), p.local[2]
    wave = np.sin(u * (2 * np.pi / 0.35))
    return _shade(p, (1 + 0.3 * wave * p.fade(22)) * (1 + 0.12 * clouds(u + p.seed, z, 0.05)))


def _panels(p: Surface) -> np.ndarray:
    x, z = p.across(), p.local[2]
    large = p.local[2] > 0.95
    seam = _fract(x / np.where(large, 0.6, 1.2) + 0.3) < np.where(large, 0.09, 0.025)
    logo = (
        large
        & (np.abs(z - 2.2 - 0.25 * np.sin(p.seed * 1.0)) < 0.38)
        & (_fract(x / 6 + p.seed * 0.37) < 0.6)
        & (np.abs(p.normal[1]) > 0.7)
    )
    hue = np.stack([_fract(p.seed * 0.137), _fract(p.seed * 0.271), _fract(p.seed * 0.389)], 1) * 0.7 + 0.05
    dirt = 1 - 0.25 * np.exp(-((z / 0.5) ** 2))
    return _mix(_shade(p, dirt * np.where(seam, 0.7, 1) * (1 + 0.03 * clouds(x, z, 0.05))), hue, logo * 0.85)


def _glass(p: Surface) -> np.ndarray:
    x, y, z = p.local
    return _shade(p, 1 + 0.5 * (np.sin(3 * x + 5 * z + p.seed) > 0.75) + 0.1 * clouds(x + y, z, 0.05))


def _rubber(p: Surface) -> np.ndarray:
    x, y, z = p.local
    return _shade(p, 1 + 0.3 * clouds(x + y, z, 0.03))


def _livery(p: Surface) -> np.ndarray:
    x, z = p.across(), p.local[2]
    window = (z > 1.35) & (z < 2.5) & (_fract(x / 1.6) > 0.1) & (np.abs(p.normal[2]) < 0.5)
    stripe = (z > 0.75) & (z < 0.95)
    hue = np.stack([_fract(p.seed * 0.173), _fract(p.seed * 0.231), _fract(p.seed * 0.317)], 1) * 0.8 + 0.1
    colour = _mix(p.colour * (1 + 0.03 * clouds(x, z, 0.05))[:, None], hue, stripe * 0.8)
    colour = _mix(colour, (0.85, 0.85, 0.8), ((_fract(z / 0.32) < 0.28) & (np.abs(p.normal[2]) < 0.5)) * 0.75)
    return _mix(colour, (0.1, 0.13, 0.16), window * 0.95)


def _gravel(p: Surface) -> np.ndarray:
    s, d = p.street.locate(p.local[0], p.local[1])
    sleeper = (_fract(s / 0.7) < 0.36) & (np.abs(d) < 1.25)
    colour = _shade(p, (1 + 0.3 * grain(s, d, 0.07) * p.fade(16) + 0.08 * clouds(s, d, 0.1)).clip(0.3, 2))
    return _mix(colour, (0.68, 0.64, 0.56), sleeper * 0.85)


def _island(p: Surface) -> np.ndarray:
    s, d = p.street.locate(p.local[0], p.local[1])
    kerb = np.abs(d) > p.street.island_half - 0.36
    block = _fract(s / 1.0) < 0.5
    tile = (_fract((s + d) / 0.45) < 0.12) | (_fract((s - d) / 0.45) < 0.12)
    top = _shade(p, (1 + 0.08 * clouds(s, d, 0.08)) * (1 - 0.35 * tile * p.fade(14)))
    edge = np.where(block[:, None], np.array([0.85, 0.72, 0.1], np.float32), np.array([0.12, 0.12, 0.12], np.float32))
    return np.where(kerb[:, None], edge, top)


def _cloth(p: Surface) -> np.ndarray:
    _, y, z = p.local
    vest = (p.colour[:, 0] > 0.8) & (_fract(z / 0.28) < 0.3)
    return _mix(_shade(p, 1 + 0.15 * clouds(y + p.seed, z, 0.02)), (0.85, 0.85, 0.6), vest * 0.9)


def _machine(p: Surface) -> np.ndarray:
    u, z = p.across(), p.local[2]
    hatch = (_fract((u + z) / 0.7) < 0.4) & (z > 1.0) & (z < 1.3)
    return _mix(_shade(p, 1 + 0.12 * clouds(u + p.seed, z, 0.05)), (0.08, 0.08, 0.08), hatch * 0.9)


def _cargo(p: Surface) -> np.ndarray:
    x, y, z = p.local
    strap = _fract(x / 2.2) < 0.06
    return _shade(p, np.where(strap, 0.25, 1) * (1 + 0.2 * clouds(x * 0.3, (y + z) * 3, 0.05)))


def _spokes(p: Surface) -> np.ndarray:
    x, _, z = p.local
    radius = np.hypot(np.abs(x) - 0.55, z - 0.36)
    return _mix(p.colour, (0.04, 0.04, 0.04), (radius > 0.27) * 0.95)


PAINTERS: dict[int, Callable[[Surface], np.ndarray]] = {
    Texture.PLAIN: _plain,
    Texture.ROAD: _road,
    Texture.PAVING: _paving,
    Texture.GRASS: _grass,
    Texture.LEAVES: _leaves,
    Texture.BARK: _bark,
    Texture.FACADE: _facade,
    Texture.BRICK: _brick,
    Texture.CONCRETE: _concrete,
    Texture.STRIPES: _stripes,
    Texture.BANDS: _bands,
    Texture.CORRUGATED: _corrugated,
    Texture.PANELS: _panels,
    Texture.GLASS: _glass,
    Texture.RUBBER: _rubber,
    Texture.LIVERY: _livery,
    Texture.GRAVEL: _gravel,
    Texture.ISLAND: _island,
    Texture.CLOTH: _cloth,
    Texture.MACHINE: _machine,
    Texture.CARGO: _cargo,
    Texture.SPOKES: _spokes,
}
"""Reflectance (N, 3) of a :class:`Surface`, by texture."""
