"""Where things stand and drive: every scene has every class, in a random order and density."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from clip2scene.streetworld import props, vehicles
from clip2scene.streetworld.meshes import Mesh
from clip2scene.streetworld.street import LANE_M, PARKING_M, Side, Street

_ADULT, _CHILD, _WORKER = "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker"
_REQUIRED = (
    "bus",
    "truck",
    "trailer",
    "construction",
    "work",
    "motorcycles",
    "bicycles",
    "barriers",
    "cones",
    "people",
)


class Placement(NamedTuple):
    """Street coordinates at time 0, height of the origin, yaw relative to the street, and speed along it."""

    s: float
    d: float
    z: float
    yaw: float
    speed_m_s: float


Item = tuple[str, Mesh, Placement]
"""Raw category (after a colon, the noun for captions if the class has several kinds), shape, place."""


def furnish(rng: np.random.Generator, street: Street, drive_m: float) -> Iterator[Item]:
    """Everything that stands still, and the people on the sidewalks."""
    yield from _parked(rng, street, drive_m)
    for sign, side in ((1, street.left), (-1, street.right)):
        yield from _sidewalk(rng, street, sign, side, drive_m)
        yield from _behind(rng, street, sign, side)
    yield from _on_islands(rng, street, drive_m)


def _parked(rng: np.random.Generator, street: Street, drive_m: float) -> Iterator[Item]:
    """Both parking lanes: the required groups, once per 60 m of drive, in random order between parked cars."""
    low, high = -24.0, drive_m + 24.0
    required = [name for _ in range(1 + int(drive_m // 60)) for name in rng.permutation(_REQUIRED)]
    if drive_m < 30:
        required.append(str(rng.choice(["trailer", "construction", "truck"])))
    for sign, names in ((-1, required[::2]), (1, required[1::2])):
        groups = [list(_group(rng, name)) for name in names]
        free = (high - low) - sum(length for _, length in map(_measure, groups)) - 1.5 * len(groups)
        while free > 22 and rng.random() < 0.85:
            groups.append([_single(rng, "vehicle.car")])
            free -= 6.2
        rng.shuffle(groups)  # type: ignore[arg-type]
        s = low
        d = sign * (street.edge - PARKING_M / 2)
        for group in groups:
            begin, length = _measure(group)
            s += rng.uniform(0.6, 1.4) + max(free, 0) / len(groups)
            while street.in_crossing(s, s + length, 0.5):
                s += 1.0
            for category, mesh, where in group:
                heading = 0.0 if sign < 0 else np.pi
                across = where.d if sign < 0 else -where.d
                yield category, mesh, Placement(s - begin + where.s, d + across, 0.0, heading + where.yaw, 0.0)
            s += length


def _measure(group: list[Item]) -> tuple[float, float]:
    """Begin of a group along s, relative to its origin, and its length."""
    spans = [(where.s - mesh.size()[0] / 2, where.s + mesh.size()[0] / 2) for _, mesh, where in group]
    begin = min(low for low, _ in spans)
    return begin, max(high for _, high in spans) - begin


def _single(rng: np.random.Generator, category: str) -> Item:
    return category, vehicles.VEHICLES[category](rng), Placement(0, rng.normal(0, 0.12), 0, rng.normal(0, 0.02), 0)


def _group(rng: np.random.Generator, name: str) -> Iterator[Item]:
    """Things that stand together, for the right-hand parking lane (d towards the road is positive)."""
    style = int(rng.integers(3))
    if name in ("bus", "truck", "trailer", "construction"):
        category = {"bus": "vehicle.bus.rigid", "construction": "vehicle.construction"}.get(name, f"vehicle.{name}")
        yield _single(rng, category)
        if name == "construction":
            yield from _cones(rng, 4.2, 3, 0.9)
    elif name == "work":
        for number in range(int(rng.integers(3, 5))):
            yield (
                "movable_object.barrier",
                props.barrier(rng, style),
                Placement(2.05 * number, 1.25, 0, np.pi / 2 + rng.normal(0, 0.03), 0),
            )
        yield "movable_object.barrier", props.barrier(rng, style), Placement(-1.5, 0.1, 0, rng.normal(0, 0.1), 0)
        yield from _cones(rng, -4.5, 3, 0.8)
        for _ in range(2):
            yield (
                _WORKER,
                props.pedestrian(rng, worker=True),
                Placement(rng.uniform(0, 6), rng.uniform(-0.9, 0.5), 0, rng.uniform(0, 6), 0),
            )
    elif name == "barriers":
        for number in range(int(rng.integers(3, 6))):
            yield (
                "movable_object.barrier",
                props.barrier(rng, style),
                Placement(2.05 * number, 0.9, 0, np.pi / 2 + rng.normal(0, 0.04), 0),
            )
    elif name == "cones":
        yield from _cones(rng, 0, int(rng.integers(4, 7)), 1.1)
    elif name == "people":
        for number in range(int(rng.integers(2, 5))):
            yield (
                _ADULT,
                props.pedestrian(rng, stride=0.12),
                Placement(0.9 * number, rng.uniform(-0.8, 0.8), 0, rng.uniform(0, 6), 0),
            )
    elif name == "motorcycles":
        for number in range(int(rng.integers(3, 5))):
            yield (
                "vehicle.motorcycle",
                vehicles.motorcycle(rng),
                Placement(1.25 * number, 0, 0, 1.1 + rng.normal(0, 0.08), 0),
            )
    elif name == "bicycles":
        for number in range(int(rng.integers(3, 6))):
            yield (
                "vehicle.bicycle",
                vehicles.bicycle(rng),
                Placement(0.95 * number, 0.1, 0, 1.2 + rng.normal(0, 0.1), 0),
            )


def _cones(rng: np.random.Generator, s: float, count: int, d: float) -> Iterator[Item]:
    for number in range(count):
        yield (
            "movable_object.trafficcone",
            props.cone(rng),
            Placement(s + 1.25 * number, d + rng.normal(0, 0.15), 0, rng.uniform(0, 6), 0),
        )


def _sidewalk(rng: np.random.Generator, street: Street, sign: int, side: Side, drive_m: float) -> Iterator[Item]:
    """Poles and trees at the kerb, walking and standing people, leaning bicycles, a shelter."""
    z, low, high = street.sidewalk_height, street.begin + 8, street.end - 8
    kerb = street.edge + 0.55
    far = street.edge + side.sidewalk_m
    s = low + rng.uniform(0, 8)
    while s < high:
        if not street.in_crossing(s, s, 1.0):
            choice = rng.random()
            if choice < 0.45 or (choice > 0.8 and side.sidewalk_m < 3):
                kind = str(rng.choice(["lamp", "sign", "light"], p=[0.45, 0.35, 0.2]))
                yield (
                    "static.manmade:pole",
                    props.pole(rng, kind),
                    Placement(s, sign * kerb, z, 0.0 if sign < 0 else np.pi, 0),
                )
            elif choice < 0.8:
                yield "static.vegetation", props.tree(rng), Placement(s, sign * kerb, z, 0, 0)
            else:
                yield (
                    "static.manmade:wall",
                    props.shelter(rng),
                    Placement(s, sign * (far - 0.9), z, 0.0 if sign < 0 else np.pi, 0),
                )
        s += rng.uniform(6, 14)
    for _ in range(int(rng.integers(8, 14)) + int(drive_m // 10)):
        child = rng.random() < 0.15
        walks = rng.random() < 0.75
        heading = int(rng.choice([-1, 1]))
        s, d = rng.uniform(-20, drive_m + 20), rng.uniform(kerb + 0.4, far - 0.4)
        if street.in_crossing(s - 2, s + 2, 0.0):
            continue
        stride = rng.uniform(0.25, 0.5) if walks else 0.12
        speed = heading * rng.uniform(0.9, 1.7) if walks else 0.0
        yaw = (0.0 if heading > 0 else np.pi) if walks else rng.uniform(0, 6)
        mesh = props.pedestrian(rng, child=child, stride=stride)
        yield _CHILD if child else _ADULT, mesh, Placement(s, sign * d, z, yaw, speed)
    s = rng.uniform(-16, drive_m + 12)
    if not street.in_crossing(s, s + 4):
        for number in range(int(rng.integers(2, 5))):
            yield (
                "vehicle.bicycle",
                vehicles.bicycle(rng),
                Placement(s + 1.0 * number, sign * (far - 0.9), z, 1.3 + rng.normal(0, 0.1), 0),
            )


def _behind(rng: np.random.Generator, street: Street, sign: int, side: Side) -> Iterator[Item]:
    """Beyond the sidewalk: grass with plants, walls, and a row of buildings."""
    near = street.edge + side.sidewalk_m
    back = near + side.grass_m
    cuts = [street.begin, *(edge for crossing in street.crossings for edge in crossing), street.end]
    for low, high in zip(cuts[::2], cuts[1::2], strict=True):
        s = low + 1.0
        while s < high - 5:
            length = min(rng.uniform(9, 20), high - s - 1)
            if length > 5 and (side.kind != "park" or rng.random() < 0.5):
                depth = rng.uniform(8, 11)
                where = Placement(s + length / 2, sign * (back + depth / 2), 0.0, 0.0, 0.0)
                yield (
                    "static.manmade:building",
                    props.building(rng, length * (1 - 0.5 * depth * abs(street.curvature_1_m)), depth),
                    where,
                )
            s += length + (rng.uniform(0.5, 5) if side.kind != "town" else 0.4)
        if side.grass_m < 3.5:
            continue
        s = low + 2.0
        while s < high - 3:
            d = rng.uniform(near + 1.6, back - 1.2)
            z = float(street.grass_height(np.array([s]), np.array([sign * d]))[0])
            choice = rng.random()
            if choice < 0.5:
                yield "static.vegetation", props.tree(rng), Placement(s, sign * d, z, 0, 0)
            elif choice < 0.72:
                yield "static.vegetation", props.bush(rng), Placement(s, sign * d, z, rng.uniform(0, 6), 0)
            elif s + 8 < high:
                hedge = rng.random() < 0.55
                mesh = props.hedge(rng, 6.0) if hedge else props.wall(rng, 7.0)
                kind = "static.vegetation" if hedge else "static.manmade:wall"
                yield kind, mesh, Placement(s + 3.5, sign * (back - 1.0 if not hedge else near + 1.4), 0.2, 0, 0)
                s += 4
            s += rng.uniform(2.5, 6) if side.kind == "suburb" else rng.uniform(1.5, 4)


def _on_islands(rng: np.random.Generator, street: Street, drive_m: float) -> Iterator[Item]:
    if street.island_kind == "rails":
        return
    for low, high in street.islands:
        for s in np.arange(low + 2, high - 2, rng.uniform(7, 12)):
            if rng.random() < 0.3:
                yield (
                    "static.manmade:pole",
                    props.pole(rng, "sign"),
                    Placement(float(s), 0.0, 0.3, float(rng.choice([0, np.pi])), 0),
                )
            elif rng.random() < 0.3 and -20 < s < drive_m + 20:
                yield _ADULT, props.pedestrian(rng, stride=0.1), Placement(float(s), 0.0, 0.33, rng.uniform(0, 6), 0)


def traffic(
    rng: np.random.Generator, street: Street, drive_m: float, ego_speed: float, duration_s: float
) -> Iterator[Item]:
    """Moving vehicles: one speed per lane, so that none collide; around the ego its own lane stays free."""
    kinds = ["vehicle.car", "vehicle.truck", "vehicle.bus.rigid", "vehicle.motorcycle", "vehicle.bicycle"]
    weights = [0.42, 0.12, 0.08, 0.19, 0.19]
    for direction in (1, -1):
        for number in range(street.lanes):
            own = direction == 1 and number == 0
            speed = ego_speed if own else float(rng.uniform(4, 10))
            travel = speed * duration_s
            s = (12.0 if own else -28 - (travel if direction == 1 else 0)) + rng.uniform(0, 8)
            last = 45.0 if own else drive_m + 28 + (0 if direction == 1 else travel)
            while s < last:
                category = str(rng.choice(kinds, p=weights))
                two_wheels = category in ("vehicle.motorcycle", "vehicle.bicycle")
                build = {"vehicle.motorcycle": vehicles.motorcycle, "vehicle.bicycle": vehicles.bicycle}
                mesh = build[category](rng, rider=True) if two_wheels else vehicles.VEHICLES[category](rng)
                half = mesh.size()[0] / 2
                d = (
                    street.lane(number, direction)
                    + rng.normal(0, 0.15)
                    - direction * (0.28 * LANE_M if two_wheels else 0)
                )
                yield category, mesh, Placement(s + half, d, 0, 0.0 if direction == 1 else np.pi, direction * speed)
                s += 2 * half + (rng.uniform(8, 30) if number == 0 else rng.uniform(15, 40))
