"""One scene of the street world: which things exist, and where each is at what time.

A scene is a pure function of (seed, number, duration): layout, appearance, motion and the ego vehicle's drive.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from clip2scene.streetworld.layout import Placement, furnish, traffic
from clip2scene.streetworld.meshes import Mesh
from clip2scene.streetworld.street import Street, ground, make_street

CATEGORIES = (
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle", "vehicle.bus.bendy",
    "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance",
    "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck",
    "flat.driveable_surface", "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade", "static.other",
    "static.vegetation", "vehicle.ego",
)  # fmt: skip
"""The 32 raw lidarseg categories; position = index."""


@dataclass(frozen=True)
class Conditions:
    """Light, weather and camera response of one scene."""

    sun: np.ndarray
    """(3,) unit vector towards the sun."""
    sun_colour: np.ndarray
    ambient: np.ndarray
    sky_low: np.ndarray
    sky_high: np.ndarray
    fog_m: float
    exposure: float
    balance: np.ndarray
    """(3,) white balance."""
    noise: float
    """Standard deviation of the pixel noise, for values from 0 to 1."""


@dataclass(frozen=True)
class Thing:
    """One object: its category, its shape, and where it is at time t."""

    category: int
    mesh: Mesh
    placement: Placement
    seed: int
    """Varies procedural textures between instances."""
    noun: str = ""
    """What a caption calls it, if its class has several kinds of things."""

    @property
    def moves(self) -> bool:
        """Whether it changes place during the scene."""
        return self.placement.speed_m_s != 0

    @property
    def is_stuff(self) -> bool:
        """Ground, buildings and plants: labelled, but without annotation boxes."""
        return CATEGORIES[self.category].startswith(("flat.", "static."))


@dataclass(frozen=True)
class Scene:
    """Everything about one scene; time in seconds from its first keyframe, world coordinates local to the scene."""

    street: Street
    conditions: Conditions
    things: tuple[Thing, ...]
    ego_speed_m_s: float
    ego_d: float
    """Metres to the left of the street's centre line; negative, as traffic keeps to the right."""
    wobble: np.ndarray = field(repr=False)
    """(6,) amplitudes and phases of the ego's sway."""

    def pose(self, thing: Thing, time_s: float) -> tuple[float, float, float, float]:
        """World x, y, z and yaw of an object."""
        where = thing.placement
        x, y, heading = self.street.place(where.s + where.speed_m_s * time_s, where.d)
        return float(x), float(y), where.z, float(heading) + where.yaw

    def world_from_ego(self, time_s: float) -> np.ndarray:
        """True pose (4, 4) of the ego vehicle: on the road, swaying slightly."""
        sway, roll, pitch, *phase = self.wobble
        s = self.ego_speed_m_s * time_s
        x, y, heading = self.street.place(s, self.ego_d + sway * np.sin(0.7 * time_s + phase[0]))
        drift = sway * 0.7 * np.cos(0.7 * time_s + phase[0]) / max(self.ego_speed_m_s, 1.0)
        rotation = (
            _about_z(float(heading) + float(drift))
            @ _about_y(pitch * np.sin(2.1 * time_s + phase[1]))
            @ _about_x(roll * np.sin(1.7 * time_s + phase[2]))
        )
        pose = np.eye(4)
        pose[:3, :3] = rotation
        pose[:3, 3] = float(x), float(y), 0.0
        return pose


def make_scene(seed: int, number: int, duration_s: float) -> Scene:
    """Scene ``number`` of a world; all scenes are drawn from the same distribution."""
    rng = np.random.default_rng([seed, number, 1])
    speed = float(rng.uniform(4.0, 9.0))
    street = make_street(rng, speed * duration_s)
    flat_nouns = {"flat.other": "rail track" if street.island_kind == "rails" else "traffic island"}
    origin = Placement(0, 0, 0, 0, 0)
    things = [
        Thing(CATEGORIES.index(category), mesh, origin, int(rng.integers(1 << 16)), flat_nouns.get(category, ""))
        for category, mesh in ground(street).items()
    ]
    drive = speed * duration_s
    for kind, mesh, placement in [*furnish(rng, street, drive), *traffic(rng, street, drive, speed, duration_s)]:
        category, _, noun = kind.partition(":")
        things.append(Thing(CATEGORIES.index(category), mesh, placement, int(rng.integers(1 << 16)), noun))
    wobble = np.concatenate([rng.uniform(0.3, 1, 3) * [0.15, 0.006, 0.006], rng.uniform(0, 6, 3)])
    return Scene(street, _conditions(rng), tuple(things), speed, street.lane(0, 1), wobble)


def _conditions(rng: np.random.Generator) -> Conditions:
    azimuth = rng.uniform(0, 2 * np.pi)
    kind = rng.choice(["sunny", "overcast", "evening"], p=[0.5, 0.35, 0.15])
    elevation = np.deg2rad({"sunny": rng.uniform(25, 60), "overcast": 60, "evening": rng.uniform(10, 20)}[kind])
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    look = {
        "sunny": ((0.85, 0.8, 0.7), (0.42, 0.45, 0.52), (0.75, 0.82, 0.9), (0.35, 0.55, 0.85)),
        "overcast": ((0.18, 0.18, 0.18), (0.75, 0.76, 0.78), (0.8, 0.82, 0.84), (0.7, 0.73, 0.77)),
        "evening": ((0.75, 0.5, 0.3), (0.34, 0.33, 0.4), (0.85, 0.6, 0.45), (0.35, 0.4, 0.6)),
    }[kind]
    sun_colour, ambient, low, high = (np.array(values, np.float32) for values in look)
    return Conditions(
        sun=sun.astype(np.float32),
        sun_colour=sun_colour,
        ambient=ambient,
        sky_low=low,
        sky_high=high,
        fog_m=float(rng.uniform(120, 500)),
        exposure=float(rng.uniform(0.85, 1.25)),
        balance=(1 + rng.normal(0, 0.04, 3)).astype(np.float32),
        noise=float(rng.uniform(0.008, 0.028)),
    )


def _about_x(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])


def _about_y(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])


def _about_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
