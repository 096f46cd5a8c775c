"""The LiDAR's measurements: one scan at one instant.

Points are in the sensor's frame (x right, y forward, z up), metres.

Legend: P points.
"""

from __future__ import annotations

import numpy as np

from clip2scene.streetworld.render import Tracer

RANGE_M = 60.0
_ELEVATIONS = ((0.0, 0.3, 0.85, 1.0), (-30.0, -13.0, 3.0, 10.0))
"""Share of the beams, and the elevation (degrees) that they reach up to; they are denser around the horizon."""
_INTENSITY = {
    9: 34,
    12: 55,
    14: 20,
    16: 26,
    17: 24,
    18: 30,
    21: 18,
    22: 16,
    23: 28,
    24: 9,
    25: 14,
    26: 17,
    27: 22,
    28: 20,
    30: 13,
}
"""Mean reflected intensity (0 to 255) by raw category, before noise; people default to 15."""


def scan(
    tracer: Tracer,
    world_from_lidar: np.ndarray,
    time_s: float,
    beams: int,
    azimuth_steps: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One scan: points (P, 5) float32 x, y, z, intensity, ring; raw labels (P,) uint8; objects (P,) int32."""
    elevation = np.deg2rad(np.interp(np.linspace(0, 1, beams), *_ELEVATIONS))
    azimuth = 2 * np.pi * (np.arange(azimuth_steps) + rng.uniform()) / azimuth_steps
    ring, angle = (grid.ravel() for grid in np.meshgrid(np.arange(beams), azimuth, indexing="ij"))
    flat = np.cos(elevation)[ring]
    local = np.stack([flat * np.sin(angle), flat * np.cos(angle), np.sin(elevation)[ring]], axis=1)
    directions = np.ascontiguousarray(local @ world_from_lidar[:3, :3].T, np.float32)
    centre = world_from_lidar[:3, 3]
    origins = np.ascontiguousarray(np.broadcast_to(centre.astype(np.float32), directions.shape))
    near = tracer.moving_near(time_s, centre, RANGE_M)
    hits = tracer.cast(time_s, origins, directions, [index for index, _, _ in near], _towards(near, centre, directions))
    length = np.linalg.norm(hits.normal, axis=1) + 1e-9
    facing = np.abs((hits.normal * directions).sum(axis=1)) / length
    dropped = rng.random(len(facing)) < 0.02 + 0.3 * (facing < 0.04)
    kept = (hits.distance > 1.0) & (hits.distance < RANGE_M) & ~dropped
    thing = tracer.objects[hits.triangle[kept]]
    category = np.array([thing.category for thing in tracer.scene.things], np.uint8)[thing]
    distance = hits.distance[kept] + rng.normal(0, 0.02, int(kept.sum()))
    mean = np.array([_INTENSITY.get(index, 15) for index in range(32)], float)[category]
    shine = 0.75 + 0.5 * ((tracer.seeds[thing] % 97) / 97)
    intensity = mean * shine * (0.45 + 0.55 * facing[kept]) * np.exp(rng.normal(0, 0.45, len(distance)))
    points = np.column_stack([local[kept] * distance[:, None], np.floor(intensity.clip(0, 255)), ring[kept]])
    return points.astype(np.float32), category, thing


def _towards(near: list[tuple[int, np.ndarray, float]], centre: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Rays that pass through the bounding sphere of at least one object."""
    mask = np.zeros(len(directions), bool)
    for _, position, radius in near:
        offset = (position - centre).astype(np.float32)
        distance = float(np.linalg.norm(offset))
        mask |= directions @ offset > np.sqrt(max(distance**2 - radius**2, 0.0)) if distance > radius else True
    return np.flatnonzero(mask)
