"""People, street furniture, plants and buildings, each in its own frame: origin on the ground below its centre."""

from __future__ import annotations

import numpy as np

from clip2scene.streetworld.meshes import Mesh, Texture, blob, box, cylinder, merge, prism
from clip2scene.streetworld.vehicles import odd, pick, vary

_CLOTHES = (
    (0.15, 0.2, 0.65),
    (0.2, 0.35, 0.75),
    (0.45, 0.15, 0.6),
    (0.3, 0.12, 0.45),
    (0.7, 0.55, 0.1),
    (0.15, 0.15, 0.15),
)
_TROUSERS = ((0.1, 0.12, 0.25), (0.08, 0.08, 0.09), (0.4, 0.33, 0.22), (0.25, 0.27, 0.3))
_SKIN = ((0.75, 0.55, 0.42), (0.5, 0.33, 0.22), (0.3, 0.19, 0.13))
_WALLS = (
    (0.5, 0.25, 0.18), (0.62, 0.52, 0.4), (0.6, 0.58, 0.55), (0.42, 0.4, 0.38), (0.7, 0.62, 0.45), (0.52, 0.36, 0.3),
    (0.45, 0.48, 0.52),
)  # fmt: skip
_LEAVES = ((0.14, 0.3, 0.08), (0.2, 0.36, 0.1), (0.1, 0.24, 0.1), (0.26, 0.36, 0.1))
_AUTUMN = (0.5, 0.3, 0.08)
_STEEL = (0.42, 0.44, 0.46)


def pedestrian(
    rng: np.random.Generator, *, child: bool = False, worker: bool = False, stride: float | None = None
) -> Mesh:
    """A standing or walking person, 1.6 to 1.9 m; ``stride`` in radians opens the legs."""
    skin = pick(rng, _SKIN)
    clothes = (0.9, 0.45, 0.05) if worker else pick(rng, _CLOTHES)
    trousers = pick(rng, _TROUSERS)
    angle = rng.uniform(0.1, 0.4) if stride is None else stride
    legs = [
        cylinder(0.085, 0.9, trousers, Texture.CLOTH, segments=6).moved(
            x=-s * np.sin(angle) * 0.85, y=s * 0.11, pitch=s * angle
        )
        for s in (-1, 1)
    ]
    torso = cylinder(0.19, 0.62, clothes, Texture.CLOTH, top=0.24, segments=8).moved(z=0.83).scaled(x=0.8)
    shoulders = blob((0.17, 0.25, 0.12), clothes, Texture.CLOTH).moved(z=1.44)
    arms = [
        cylinder(0.06, 0.62, clothes, Texture.CLOTH, segments=5).moved(x=s * 0.1, y=s * 0.29, z=0.86, pitch=-s * 0.3)
        for s in (-1, 1)
    ]
    head = blob((0.12, 0.11, 0.14), skin).moved(z=1.66)
    hair = blob(
        (0.125, 0.12, 0.1), (0.85, 0.8, 0.1) if worker else pick(rng, ((0.08, 0.06, 0.05), (0.3, 0.2, 0.1)))
    ).moved(z=1.73)
    bag = [box(0.16, 0.3, 0.42, pick(rng, _CLOTHES)).moved(x=-0.24, z=1.02)] if rng.random() < 0.3 else []
    size = rng.uniform(0.62, 0.78) if child else rng.uniform(0.92, 1.05)
    return merge([*legs, torso, shoulders, *arms, head, hair, *bag]).scaled(size * 1.1, size * 1.1, size)


def barrier(rng: np.random.Generator, style: int) -> Mesh:
    """A low wall across the way, 2 m wide (along y) and 1 m high: concrete blocks or striped plastic, by ``style``."""
    colour = ((0.75, 0.74, 0.7), (0.85, 0.1, 0.1), (0.8, 0.08, 0.12))[style % 3]
    profile = [(-0.3, 0.0), (0.3, 0.0), (0.28, 0.15), (0.12, 0.4), (0.1, 1.0), (-0.1, 1.0), (-0.12, 0.4), (-0.28, 0.15)]
    lower, upper = profile[:3] + profile[-1:], profile[2:]
    texture = Texture.STRIPES
    return merge([prism(lower, 1.96, vary(rng, colour), texture), prism(upper, 1.96, vary(rng, colour), texture)])


def cone(rng: np.random.Generator) -> Mesh:
    """A traffic cone, 0.7 to 0.85 m."""
    height = rng.uniform(0.72, 0.88)
    orange = odd(rng, vary(rng, (0.92, 0.3, 0.04)), 0.05)
    return merge(
        [
            box(0.5, 0.5, 0.06, (0.1, 0.1, 0.1)),
            cylinder(0.23, height - 0.06, orange, Texture.BANDS, top=0.04).moved(z=0.06),
        ]
    )


def tree(rng: np.random.Generator) -> Mesh:
    """A trunk with an irregular crown of two to four blobs."""
    trunk, radius = rng.uniform(1.8, 2.8), rng.uniform(1.2, 2.1)
    green = _AUTUMN if rng.random() < 0.08 else pick(rng, _LEAVES)
    parts = [
        cylinder(
            rng.uniform(0.13, 0.24), trunk + 1.3, vary(rng, (0.25, 0.17, 0.1)), Texture.BARK, top=0.1, segments=7
        ).moved(z=-0.5)
    ]
    for number in range(int(rng.integers(2, 5))):
        size = radius * rng.uniform(0.7, 1.0)
        shift = rng.normal(0, 0.45 * radius, 2) * (number > 0)
        crown = blob(
            (size, size, size * rng.uniform(0.7, 1.1)),
            vary(rng, green),
            Texture.LEAVES,
            rng=rng,
            roughness=0.16,
            subdivisions=2,
        )
        parts.append(
            crown.moved(x=shift[0], y=shift[1], z=trunk + 0.75 * radius + rng.uniform(-0.2, 0.8) * (number > 0))
        )
    return merge(parts)


def bush(rng: np.random.Generator) -> Mesh:
    """An irregular bush, 0.8 to 1.7 m high."""
    green = pick(rng, _LEAVES)
    size = rng.uniform(0.6, 1.0)
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        one = blob((size, size, size * 0.85), vary(rng, green), Texture.LEAVES, rng=rng, roughness=0.18, subdivisions=2)
        parts.append(one.moved(x=rng.normal(0, 0.5), y=rng.normal(0, 0.4), z=size * 0.6))
    return merge(parts)


def hedge(rng: np.random.Generator, length: float) -> Mesh:
    """A row of touching blobs along x."""
    green = pick(rng, _LEAVES)
    height = rng.uniform(0.55, 0.9)
    parts = []
    for x in np.arange(-length / 2 + 0.5, length / 2, 0.85):
        one = blob((0.75, 0.6, height), vary(rng, green, 0.04), Texture.LEAVES, rng=rng, roughness=0.14, subdivisions=2)
        parts.append(one.moved(x=float(x), y=rng.normal(0, 0.08), z=height * 0.75))
    return merge(parts)


def building(rng: np.random.Generator, length: float, depth: float) -> Mesh:
    """A block along x with windows, a plinth and a ledge; low ones get a gabled roof."""
    wall = pick(rng, _WALLS)
    height = rng.uniform(5.5, 8.0) if rng.random() < 0.4 else rng.uniform(9, 20)
    parts = [box(length, depth, height + 0.5, wall, Texture.FACADE).moved(z=-0.5)]
    parts.append(box(length + 0.12, depth + 0.12, 1.1, vary(rng, (0.42, 0.4, 0.38)), Texture.CONCRETE).moved(z=-0.5))
    if height < 8.1:
        roof = [(-depth / 2 - 0.4, height), (depth / 2 + 0.4, height), (0, height + rng.uniform(1.5, 3))]
        parts.append(prism(roof, length + 0.5, vary(rng, (0.4, 0.18, 0.12)), Texture.BRICK).moved(yaw=np.pi / 2))
    else:
        parts.append(box(length + 0.5, depth + 0.5, 0.5, vary(rng, wall), Texture.CONCRETE).moved(z=height))
    for side in (-1, 1):
        for number in range(int(length // 7)):
            x = -length / 2 + 3.5 + 7 * number + rng.uniform(-1, 1)
            door = box(1.3, 0.14, 2.3, pick(rng, ((0.3, 0.12, 0.08), (0.12, 0.2, 0.18), (0.25, 0.25, 0.28)))).moved(
                x=x, y=side * depth / 2
            )
            parts.append(door)
    return merge(parts)


def wall(rng: np.random.Generator, length: float) -> Mesh:
    """A free-standing wall along x, 1.9 to 2.8 m high."""
    height = rng.uniform(1.9, 2.8)
    texture = Texture.BRICK if rng.random() < 0.6 else Texture.CONCRETE
    parts = [box(length, 0.3, height + 0.4, pick(rng, _WALLS), texture).moved(z=-0.4)]
    parts += [
        box(0.45, 0.45, height + 0.15, pick(rng, _WALLS), texture).moved(x=float(x))
        for x in np.arange(-length / 2, length / 2 + 0.1, 4.0)
    ]
    return merge(parts)


def pole(rng: np.random.Generator, kind: str) -> Mesh:
    """A street lamp, a traffic sign or a traffic light (``kind``), facing -x."""
    steel = vary(rng, _STEEL)
    if kind == "lamp":
        mast = cylinder(0.14, 7.0, steel, top=0.09, segments=7)
        return merge(
            [
                mast,
                box(0.14, 1.6, 0.12, steel).moved(y=0.8, z=6.9),
                box(0.3, 0.7, 0.14, (0.8, 0.8, 0.75)).moved(y=1.6, z=6.85),
            ]
        )
    if kind == "light":
        lamps = [
            blob((0.06, 0.09, 0.09), colour).moved(x=-0.16, z=z)
            for z, colour in ((3.3, (0.8, 0.05, 0.05)), (2.75, (0.05, 0.6, 0.2)))
        ]
        return merge(
            [cylinder(0.12, 3.7, steel, segments=7), box(0.28, 0.42, 1.1, (0.08, 0.09, 0.08)).moved(z=2.5), *lamps]
        )
    plate = pick(rng, ((0.1, 0.2, 0.65), (0.8, 0.8, 0.8), (0.7, 0.08, 0.08)))
    return merge([cylinder(0.09, 2.9, steel, segments=6), box(0.08, 0.75, 0.75, plate).moved(x=-0.1, z=2.1)])


def shelter(rng: np.random.Generator) -> Mesh:
    """A bus shelter, 4 m along x, open towards +y."""
    steel = vary(rng, _STEEL)
    posts = [cylinder(0.07, 2.4, steel, segments=6).moved(x=x, y=y) for x in (-2, 2) for y in (-0.7, 0.6)]
    back = box(4.0, 0.08, 1.9, vary(rng, (0.4, 0.46, 0.48)), Texture.CONCRETE).moved(y=-0.7, z=0.3)
    advert = box(0.14, 1.3, 1.9, pick(rng, _CLOTHES), Texture.PANELS).moved(x=-2, z=0.3)
    return merge(
        [
            *posts,
            back,
            advert,
            box(4.3, 1.6, 0.16, steel).moved(z=2.35),
            box(3.0, 0.4, 0.1, (0.4, 0.28, 0.16)).moved(y=-0.4, z=0.5),
        ]
    )
