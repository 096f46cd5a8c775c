"""Triangle meshes from primitives, each triangle with its own colour and procedural texture.

Local frames are right-handed, x forward, y left, z up, metres.

Legend: V vertices, T triangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

Colour = Sequence[float]
_BOX_CORNERS = np.array([[x, y, z] for z in (0, 1) for y in (-0.5, 0.5) for x in (-0.5, 0.5)], np.float32)
_BOX_FACES = np.array(
    [
        [4, 5, 7],
        [4, 7, 6],
        [0, 2, 1],
        [1, 2, 3],
        [0, 1, 5],
        [0, 5, 4],
        [2, 6, 7],
        [2, 7, 3],
        [0, 4, 6],
        [0, 6, 2],
        [1, 3, 7],
        [1, 7, 5],
    ]
)


class Texture(IntEnum):
    """How :mod:`clip2scene.streetworld.textures` paints a triangle."""

    PLAIN = 0
    ROAD = 1
    PAVING = 2
    GRASS = 3
    LEAVES = 4
    BARK = 5
    FACADE = 6
    BRICK = 7
    CONCRETE = 8
    STRIPES = 9
    BANDS = 10
    CORRUGATED = 11
    PANELS = 12
    GLASS = 13
    RUBBER = 14
    LIVERY = 15
    GRAVEL = 16
    ISLAND = 17
    CLOTH = 18
    MACHINE = 19
    CARGO = 20
    SPOKES = 21


@dataclass(frozen=True)
class Mesh:
    """A triangle soup with a material per triangle."""

    vertices: np.ndarray
    """(V, 3) float32, metres."""
    triangles: np.ndarray
    """(T, 3) int32."""
    colours: np.ndarray
    """(T, 3) float32 RGB reflectance, 0 to 1."""
    textures: np.ndarray
    """(T,) uint8, see :class:`Texture`."""

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0, yaw: float = 0.0, pitch: float = 0.0) -> Mesh:
        """Rotated (first ``pitch`` about y, then ``yaw`` about z, radians), then shifted (metres)."""
        vertices = self.vertices
        if pitch:
            cos, sin = np.cos(pitch), np.sin(pitch)
            vertices = vertices @ np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
        if yaw:
            cos, sin = np.cos(yaw), np.sin(yaw)
            vertices = vertices @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)
        vertices = (vertices + np.array([x, y, z])).astype(np.float32)
        return Mesh(vertices, self.triangles, self.colours, self.textures)

    def scaled(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> Mesh:
        """Scaled about the origin."""
        return Mesh(self.vertices * np.array([x, y, z], np.float32), self.triangles, self.colours, self.textures)

    def size(self) -> tuple[float, float, float]:
        """Length (x), width (y) and height (z, from the ground) of a box around the mesh, centred on its axis."""
        extent = np.abs(self.vertices).max(axis=0)
        return 2 * float(extent[0]), 2 * float(extent[1]), float(self.vertices[:, 2].max())


def merge(meshes: Sequence[Mesh]) -> Mesh:
    """One mesh of all triangles, in order."""
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.triangles + offset for mesh, offset in zip(meshes, offsets, strict=True)]).astype(
            np.int32
        ),
        np.concatenate([mesh.colours for mesh in meshes]),
        np.concatenate([mesh.textures for mesh in meshes]),
    )


def paint(vertices: np.ndarray, triangles: np.ndarray, colour: Colour, texture: Texture) -> Mesh:
    """A mesh of one material."""
    count = len(triangles)
    return Mesh(
        np.asarray(vertices, np.float32),
        np.asarray(triangles, np.int32),
        np.tile(np.asarray(colour, np.float32), (count, 1)),
        np.full(count, texture, np.uint8),
    )


def quads(rows: int, columns: int) -> np.ndarray:
    """Triangles (2 (rows-1)(columns-1), 3) over a row-major grid of vertices."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).reshape(-1, 1)
    first = corner + np.array([[0, 1, columns + 1]])
    second = corner + np.array([[0, columns + 1, columns]])
    return np.stack([first, second], axis=1).reshape(-1, 3)


def box(length: float, width: float, height: float, colour: Colour, texture: Texture = Texture.PLAIN) -> Mesh:
    """A box standing on z = 0, centred in x and y."""
    return paint(_BOX_CORNERS * np.array([length, width, height], np.float32), _BOX_FACES, colour, texture)


def prism(
    profile: Sequence[tuple[float, float]],
    width: float,
    colour: Colour,
    texture: Texture = Texture.PLAIN,
    *,
    taper: float = 1.0,
) -> Mesh:
    """A convex profile of (x, z) corners extruded along y; ``taper`` narrows the corners above its middle height."""
    points = np.asarray(profile, np.float32)
    count = len(points)
    half = np.where(points[:, 1] > points[:, 1].mean(), 0.5 * width * taper, 0.5 * width)
    vertices = np.concatenate([np.stack([points[:, 0], sign * half, points[:, 1]], 1) for sign in (-1, 1)])
    ring = np.arange(count)
    following = (ring + 1) % count
    around = np.concatenate(
        [np.stack([ring, following, following + count], 1), np.stack([ring, following + count, ring + count], 1)]
    )
    fan = np.stack([np.zeros(count - 2, int), ring[1:-1], ring[2:]], 1)
    return paint(vertices, np.concatenate([around, fan, fan + count]), colour, texture)


def cylinder(
    radius: float,
    height: float,
    colour: Colour,
    texture: Texture = Texture.PLAIN,
    *,
    top: float | None = None,
    segments: int = 8,
) -> Mesh:
    """An upright cylinder (a cone with ``top=0``) standing on z = 0, closed at both ends."""
    angles = 2 * np.pi * np.arange(segments) / segments
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(segments)], 1)
    upper = ring * (radius if top is None else max(top, 1e-3)) + [0, 0, height]
    vertices = np.concatenate([ring * radius, upper, [[0, 0, 0], [0, 0, height]]])
    here = np.arange(segments)
    after = (here + 1) % segments
    faces = [
        np.stack([here, after, after + segments], 1),
        np.stack([here, after + segments, here + segments], 1),
        np.stack([here * 0 + 2 * segments, after, here], 1),
        np.stack([here * 0 + 2 * segments + 1, here + segments, after + segments], 1),
    ]
    return paint(vertices, np.concatenate(faces), colour, texture)


def wheel(radius: float, width: float, colour: Colour = (0.05, 0.05, 0.05), texture: Texture = Texture.RUBBER) -> Mesh:
    """A wheel that rolls along x, its axle at z = ``radius``."""
    upright = cylinder(radius, width, colour, texture, segments=10)
    x, y, z = upright.vertices.T
    return Mesh(np.stack([x, z - width / 2, y + radius], 1), upright.triangles, upright.colours, upright.textures)


@lru_cache
def _sphere(subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    ratio = (1 + 5**0.5) / 2
    corners = [(-1, ratio, 0), (1, ratio, 0), (-1, -ratio, 0), (1, -ratio, 0)]
    vertices = [np.roll(corner, shift) for shift in range(3) for corner in corners]
    points = np.array(vertices, float)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    near = distance < 1.1
    faces = np.array(
        [
            (a, b, c)
            for a in range(12)
            for b in range(a + 1, 12)
            for c in range(b + 1, 12)
            if near[a, b] and near[b, c] and near[a, c]
        ]
    )
    for _ in range(subdivisions):
        edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
        unique, inverse = np.unique(edges, axis=0, return_inverse=True)
        middle = points[unique].mean(axis=1)
        middle /= np.linalg.norm(middle, axis=1, keepdims=True)
        m = inverse.reshape(-1, 3) + len(points)
        a, b, c = faces.T
        points = np.concatenate([points, middle])
        faces = np.concatenate(
            [np.stack(f, 1) for f in ((a, m[:, 0], m[:, 2]), (b, m[:, 1], m[:, 0]), (c, m[:, 2], m[:, 1]), m.T)]
        )
    return points.astype(np.float32), faces.astype(np.int32)


def blob(
    radii: tuple[float, float, float],
    colour: Colour,
    texture: Texture = Texture.PLAIN,
    *,
    rng: np.random.Generator | None = None,
    roughness: float = 0.0,
    subdivisions: int = 1,
) -> Mesh:
    """An ellipsoid centred on the origin; ``roughness`` is the relative deviation of its vertices."""
    points, faces = _sphere(subdivisions)
    if rng is not None and roughness:
        points = points * (1 + roughness * rng.standard_normal((len(points), 1)).astype(np.float32))
    return paint(points * np.asarray(radii, np.float32), faces, colour, texture)
