"""Vehicles, each built from primitives in its own frame: x forward, origin on the ground below its centre.

Shape is the reliable cue of a class; colour varies by instance, and some instances look unusual.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clip2scene.streetworld.meshes import Mesh, Texture, blob, box, cylinder, merge, prism, wheel

_PAINTS = (
    (0.82, 0.82, 0.82), (0.08, 0.08, 0.09), (0.45, 0.46, 0.48), (0.62, 0.63, 0.66), (0.08, 0.15, 0.45),
    (0.2, 0.35, 0.55),
)  # fmt: skip
_LIVERIES = ((0.75, 0.08, 0.08), (0.8, 0.12, 0.08), (0.1, 0.42, 0.2))
_BOXES = ((0.88, 0.88, 0.86), (0.82, 0.82, 0.84), (0.85, 0.82, 0.72))
_MACHINES = ((0.85, 0.6, 0.05), (0.88, 0.52, 0.05), (0.8, 0.68, 0.1), (0.85, 0.4, 0.06))
_DARK = (0.07, 0.07, 0.08)
_GLASS = (0.12, 0.15, 0.18)


def vary(
    rng: np.random.Generator, colour: tuple[float, float, float], amount: float = 0.06
) -> tuple[float, float, float]:
    """A colour near ``colour``."""
    r, g, b = np.clip(
        np.asarray(colour) * rng.uniform(1 - 2 * amount, 1 + 2 * amount) + rng.normal(0, amount / 2, 3), 0.02, 0.95
    )
    return float(r), float(g), float(b)


def pick(rng: np.random.Generator, colours: tuple[tuple[float, float, float], ...]) -> tuple[float, float, float]:
    """One of the colours, varied."""
    return vary(rng, colours[int(rng.integers(len(colours)))])


def odd(
    rng: np.random.Generator, colour: tuple[float, float, float], share: float = 0.12
) -> tuple[float, float, float]:
    """``colour``, or for a ``share`` of the instances any colour at all."""
    if rng.random() >= share:
        return colour
    r, g, b = rng.uniform(0.05, 0.85, 3)
    return float(r), float(g), float(b)


def _wheels(positions: list[float], width: float, radius: float, thickness: float = 0.24) -> list[Mesh]:
    return [
        wheel(radius, thickness).moved(x=x, y=side * (width / 2 - thickness / 2)) for x in positions for side in (-1, 1)
    ]


def car(rng: np.random.Generator) -> Mesh:
    """A saloon, hatchback or sport utility vehicle, 3.9 to 5 m."""
    length, width, height = rng.uniform(3.9, 5.0), rng.uniform(1.75, 1.95), rng.uniform(1.45, 1.8)
    paint = pick(rng, _PAINTS)
    waist, front, rear = 0.56 * height, 0.5 * length, -0.5 * length
    hood, boot = front - rng.uniform(0.95, 1.25), rear + rng.uniform(0.1, 0.8)
    body = prism(
        [(rear, 0.3), (front, 0.3), (front, 0.62), (hood, waist), (boot, waist), (rear, waist - 0.08)],
        width,
        paint,
        Texture.PANELS,
    )
    cabin = prism(
        [(boot + 0.05, waist), (hood, waist), (hood - 0.75, height), (boot + 0.4, height)],
        width * 0.96, _GLASS, Texture.GLASS, taper=0.85,
    )  # fmt: skip
    roof = box(max(hood - boot - 1.2, 0.8), width * 0.8, 0.04, paint).moved(x=(hood + boot - 0.35) / 2, z=height - 0.02)
    lights = [
        box(0.06, 0.32, 0.13, colour).moved(x=end * (length / 2), y=side * width * 0.34, z=0.6)
        for end, colour in ((1, (0.9, 0.9, 0.85)), (-1, (0.6, 0.04, 0.04)))
        for side in (-1, 1)
    ]
    return merge([body, cabin, roof, *lights, *_wheels([-0.31 * length, 0.31 * length], width + 0.04, 0.33)])


def bus(rng: np.random.Generator) -> Mesh:
    """A city bus, 10 to 12.5 m long and 3.1 m high, with a band of windows."""
    length, width, height = rng.uniform(10, 12.5), 2.55, rng.uniform(2.95, 3.3)
    paint = odd(rng, pick(rng, _LIVERIES), 0.08)
    shell = box(length, width, height - 0.35, paint, Texture.LIVERY).moved(z=0.35)
    screen = box(0.06, width * 0.9, 1.4, _GLASS, Texture.GLASS).moved(x=length / 2, z=1.1)
    sign = box(0.08, width * 0.6, 0.3, (0.85, 0.6, 0.1)).moved(x=length / 2, z=height - 0.42)
    unit = box(2.4, 1.6, 0.3, (0.6, 0.6, 0.6)).moved(x=-0.2 * length, z=height)
    return merge([shell, screen, sign, unit, *_wheels([-0.28 * length, 0.33 * length], width + 0.04, 0.48, 0.3)])


def truck(rng: np.random.Generator) -> Mesh:
    """A lorry: a cab, a gap, and a tall closed box or an open tipper."""
    cargo, width, cab_height = rng.uniform(4.8, 6.2), 2.45, rng.uniform(2.4, 2.8)
    length = cargo + 2.5
    front = length / 2
    cab_paint = odd(rng, pick(rng, _BOXES))
    cab = prism(
        [(front - 2.1, 0.5), (front, 0.5), (front, 1.4), (front - 0.3, cab_height), (front - 2.1, cab_height)],
        width,
        cab_paint,
    )
    screen = prism(
        [(front - 0.02, 1.45), (front + 0.03, 1.45), (front - 0.25, cab_height - 0.15)],
        width * 0.88,
        _GLASS,
        Texture.GLASS,
    )
    window = box(0.8, width + 0.04, 0.7, _GLASS, Texture.GLASS).moved(x=front - 0.95, z=1.4)
    bed = box(length - 0.3, width * 0.5, 0.25, _DARK).moved(z=0.7)
    centre = -length / 2 + cargo / 2
    if rng.random() < 0.75:
        load = box(cargo, 2.5, rng.uniform(2.4, 2.7), odd(rng, pick(rng, _BOXES)), Texture.PANELS).moved(
            x=centre, z=0.95
        )
    else:
        half = cargo / 2
        load = prism(
            [(-half + 0.4, 0.9), (half, 0.9), (half, 2.4), (-half, 2.4)],
            2.5,
            odd(rng, pick(rng, _BOXES)),
            Texture.PANELS,
        ).moved(x=centre)
    axles = [front - 1.1, -length / 2 + 1.1, -length / 2 + 2.2]
    return merge([cab, screen, window, bed, load, *_wheels(axles, width + 0.04, 0.5, 0.3)])


def trailer(rng: np.random.Generator) -> Mesh:
    """A parked flat-bed semi-trailer: a long low deck with timber or crates, and wheels at the rear."""
    length, width = rng.uniform(8.5, 11.0), 2.5
    steel = odd(rng, pick(rng, ((0.45, 0.14, 0.08), (0.4, 0.18, 0.1), (0.35, 0.12, 0.1))), 0.06)
    deck = box(length, width, 0.32, steel, Texture.CORRUGATED).moved(z=0.95)
    head = box(0.12, width, 0.9, steel, Texture.CORRUGATED).moved(x=length / 2 - 0.06, z=1.27)
    legs = [box(0.15, 0.15, 0.95, _DARK).moved(x=length * 0.27, y=side * 0.8) for side in (-1, 1)]
    parts = [
        deck,
        head,
        *legs,
        *_wheels([-0.42 * length, -0.42 * length + 1.15, -0.42 * length + 2.3], width, 0.46, 0.34),
    ]
    timber = odd(rng, pick(rng, ((0.6, 0.42, 0.22), (0.55, 0.36, 0.18), (0.5, 0.32, 0.14))), 0.06)
    if rng.random() < 0.6:
        rod = cylinder(0.24, length * 0.82, timber, Texture.CARGO, segments=7).moved(pitch=np.pi / 2)
        for layer, count in enumerate((4, 3)):
            for number in range(count):
                y = (number - (count - 1) / 2) * 0.5
                parts.append(rod.moved(x=-0.41 * length, y=y, z=1.51 + 0.42 * layer))
    else:
        for number in range(4):
            size = rng.uniform(0.6, 1.0)
            crate = box(length * 0.2, width * 0.8, size, timber, Texture.CARGO)
            parts.append(crate.moved(x=length * (-0.38 + 0.24 * number), z=1.27))
    return merge(parts)


def construction_vehicle(rng: np.random.Generator) -> Mesh:
    """An excavator on tracks or a wheel loader, with its bucket in front."""
    paint = odd(rng, pick(rng, _MACHINES), 0.08)
    if rng.random() < 0.6:
        tracks = [
            prism(
                [(-1.5, 0.0), (1.5, 0.0), (1.9, 0.4), (1.5, 0.85), (-1.5, 0.85), (-1.9, 0.4)],
                0.55,
                _DARK,
                Texture.RUBBER,
            ).moved(y=side * 1.0)
            for side in (-1, 1)
        ]
        house = box(2.9, 2.4, 1.15, paint, Texture.MACHINE).moved(x=-0.5, z=0.95)
        cab = box(1.3, 1.0, 1.1, _GLASS, Texture.GLASS).moved(x=0.2, y=0.6, z=2.05)
        roof = box(1.35, 1.05, 0.08, paint).moved(x=0.2, y=0.6, z=3.15)
        boom = box(3.3, 0.42, 0.5, paint, Texture.MACHINE).moved(x=1.65).moved(x=0.6, y=-0.3, z=1.7, pitch=-0.7)
        stick = box(2.6, 0.36, 0.4, paint, Texture.MACHINE).moved(x=1.3).moved(x=2.95, y=-0.3, z=3.85, pitch=1.15)
        bucket = prism(
            [(-0.5, 0.2), (0.3, 0.2), (0.6, 0.8), (0.2, 1.5), (-0.3, 1.3)], 1.2, paint, Texture.MACHINE
        ).moved(x=4.0, y=-0.3)
        return merge([*tracks, house, cab, roof, boom, stick, bucket]).moved(x=-1.0)
    body = box(3.6, 1.7, 1.1, paint, Texture.MACHINE).moved(x=-0.6, z=0.8)
    cab = box(1.3, 1.4, 1.25, _GLASS, Texture.GLASS).moved(x=-0.1, z=1.9)
    roof = box(1.5, 1.55, 0.12, paint).moved(x=-0.1, z=3.15)
    arms = [
        box(2.4, 0.25, 0.35, paint, Texture.MACHINE).moved(x=1.2).moved(x=0.9, y=s * 0.65, z=1.5, pitch=0.3)
        for s in (-1, 1)
    ]
    bucket = prism([(2.6, 0.15), (3.7, 0.1), (3.5, 0.7), (2.9, 1.25), (2.6, 0.9)], 2.6, paint, Texture.MACHINE)
    return merge([body, cab, roof, *arms, bucket, *_wheels([-1.5, 1.2], 2.5, 0.75, 0.5)]).moved(x=-0.5)


def _rider(seat: float, clothes: tuple[float, float, float], helmet: tuple[float, float, float]) -> list[Mesh]:
    torso = blob((0.2, 0.23, 0.36), clothes, Texture.CLOTH).moved(x=-0.02, z=seat + 0.34, pitch=0.35)
    head = blob((0.14, 0.13, 0.15), helmet).moved(x=0.16, z=seat + 0.83)
    arms = [
        cylinder(0.06, 0.6, clothes, Texture.CLOTH, segments=5).moved(x=0.0, y=s * 0.24, z=seat + 0.55, pitch=1.9)
        for s in (-1, 1)
    ]
    legs = [
        cylinder(0.08, seat * 0.75, (0.1, 0.1, 0.14), segments=5).moved(x=0.12, y=s * 0.16, z=seat * 0.35)
        for s in (-1, 1)
    ]
    return [torso, head, *arms, *legs]


def bicycle(rng: np.random.Generator, *, rider: bool = False) -> Mesh:
    """A bicycle, with or without a rider (who is part of it, as in nuScenes)."""
    paint = pick(rng, ((0.1, 0.5, 0.6), (0.1, 0.45, 0.6), (0.65, 0.1, 0.35), (0.15, 0.55, 0.5)))
    wheels = [wheel(0.36, 0.05, (0.5, 0.5, 0.5), Texture.SPOKES).moved(x=x) for x in (-0.55, 0.55)]
    frame = [
        box(0.75, 0.09, 0.1, paint).moved(x=0.05, z=0.85),
        box(0.8, 0.09, 0.1, paint).moved(x=0.1, z=0.6, pitch=-0.55),
        box(0.12, 0.09, 0.6, paint).moved(x=-0.25, z=0.35, pitch=-0.2),
        box(0.12, 0.09, 0.7, paint).moved(x=0.5, z=0.35, pitch=-0.15),
        box(0.1, 0.62, 0.06, _DARK).moved(x=0.42, z=1.05),
        box(0.3, 0.16, 0.08, _DARK).moved(x=-0.3, z=0.95),
        box(0.45, 0.12, 0.1, _DARK).moved(x=0.0, z=0.3),
    ]
    rack = (
        [box(0.4, 0.35, 0.28, pick(rng, ((0.5, 0.4, 0.25), (0.1, 0.45, 0.55)))).moved(x=-0.6, z=0.78)]
        if rng.random() < 0.5
        else []
    )
    person = (
        _rider(0.9, pick(rng, ((0.1, 0.6, 0.6), (0.7, 0.85, 0.1), (0.1, 0.5, 0.65))), (0.85, 0.85, 0.85))
        if rider
        else []
    )
    return merge([*wheels, *frame, *rack, *person])


def motorcycle(rng: np.random.Generator, *, rider: bool = False) -> Mesh:
    """A motorcycle: fat wheels and a solid body, with or without a rider."""
    paint = pick(rng, ((0.55, 0.05, 0.3), (0.4, 0.05, 0.45), (0.6, 0.04, 0.2), (0.35, 0.1, 0.5)))
    wheels = [wheel(0.34, 0.18).moved(x=x) for x in (-0.72, 0.75)]
    parts = [
        blob((0.5, 0.2, 0.24), paint, Texture.MACHINE).moved(x=0.2, z=0.82),
        box(0.9, 0.28, 0.38, (0.25, 0.25, 0.27), Texture.CORRUGATED).moved(x=0.0, z=0.3),
        box(0.85, 0.3, 0.16, _DARK).moved(x=-0.45, z=0.82),
        box(0.5, 0.26, 0.2, paint, Texture.MACHINE).moved(x=-0.8, z=0.72),
        box(0.12, 0.12, 0.75, (0.6, 0.6, 0.62)).moved(x=0.72, z=0.35, pitch=-0.4),
        box(0.08, 0.72, 0.07, _DARK).moved(x=0.5, z=1.08),
        box(0.1, 0.4, 0.42, paint, Texture.MACHINE).moved(x=0.66, z=0.82, pitch=-0.4),
        cylinder(0.08, 0.7, (0.7, 0.7, 0.7), segments=5).moved(x=-0.95, y=0.2, z=0.4, pitch=np.pi / 2),
    ]
    person = _rider(0.92, (0.06, 0.06, 0.07), paint) if rider else []
    return merge([*wheels, *parts, *person])


VEHICLES: dict[str, Callable[[np.random.Generator], Mesh]] = {
    "vehicle.car": car,
    "vehicle.bus.rigid": bus,
    "vehicle.truck": truck,
    "vehicle.trailer": trailer,
    "vehicle.construction": construction_vehicle,
    "vehicle.bicycle": bicycle,
    "vehicle.motorcycle": motorcycle,
}
"""Builder by raw category."""
