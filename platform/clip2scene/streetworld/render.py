"""Ray casting with Embree, and the cameras' images.

Legend: N rays or points, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from clip2scene.streetworld.meshes import Mesh, merge
from clip2scene.streetworld.sensors import CameraModel
from clip2scene.streetworld.textures import PAINTERS, Surface, clouds
from clip2scene.streetworld.world import Scene

FAR_M = 1e4


@dataclass(frozen=True)
class Hits:
    """First surface along each ray."""

    distance: np.ndarray
    """(N,) float32, in lengths of the ray's direction; FAR_M if nothing was hit."""
    triangle: np.ndarray
    """(N,) int32, row of the tracer's triangles; -1 (the sky) if nothing was hit."""
    normal: np.ndarray
    """(N, 3) float32, not normalised, on either side."""


class Tracer:
    """A scene's triangles: resting ones in one Embree tree, moving ones in a small tree per instant."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._resting = [i for i, thing in enumerate(scene.things) if not thing.moves]
        self._moving = [i for i, thing in enumerate(scene.things) if thing.moves]
        order = self._resting + self._moving
        everything = merge([scene.things[i].mesh for i in order])
        counts = [len(scene.things[i].mesh.triangles) for i in order]
        self.colours, self.textures = everything.colours, everything.textures
        self.objects = np.repeat(np.array(order, np.int32), counts)
        ends = np.cumsum(counts)
        self._range = {i: np.arange(end - count, end) for i, end, count in zip(order, ends, counts, strict=True)}
        places = np.array([thing.placement for thing in scene.things])
        self._s, self._d, self._z, self._yaw, self._speed = places.T
        self._static = _tree(self._placed(self._resting, 0.0))
        self.seeds = np.array([thing.seed for thing in scene.things], np.int32)
        self._reach = {i: float(np.linalg.norm(scene.things[i].mesh.vertices, axis=1).max()) for i in self._moving}

    def _placed(self, indices: Sequence[int], time_s: float) -> list[Mesh]:
        x, y, z, yaw = self._poses(time_s)
        return [self.scene.things[i].mesh.moved(x=x[i], y=y[i], z=z[i], yaw=yaw[i]) for i in indices]

    def _poses(self, time_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        x, y, heading = self.scene.street.place(self._s + self._speed * time_s, self._d)
        return x, y, self._z, heading + self._yaw

    def poses(self, time_s: float) -> np.ndarray:
        """Pose of every object: (5, things) float32 x, y, z, cos(yaw), sin(yaw)."""
        x, y, z, yaw = self._poses(time_s)
        return np.stack([x, y, z, np.cos(yaw), np.sin(yaw)]).astype(np.float32)

    def moving_near(self, time_s: float, centre: np.ndarray, range_m: float) -> list[tuple[int, np.ndarray, float]]:
        """Moving objects within range: index, position (3,) and radius of the bounding sphere around it."""
        x, y, z, _ = self._poses(time_s)
        distance = np.hypot(x - centre[0], y - centre[1])
        return [
            (i, np.array([x[i], y[i], z[i]]), self._reach[i])
            for i in self._moving
            if distance[i] < range_m + self._reach[i]
        ]

    def cast(
        self,
        time_s: float,
        origins: np.ndarray,
        directions: np.ndarray,
        moving: Sequence[int],
        rays: np.ndarray | None = None,
    ) -> Hits:
        """First hits of rays (N, 3) on all resting things, and on the ``moving`` ones, which only ``rays`` can hit."""
        found = self._static.run(origins, directions, output=True)
        triangle, distance = found["primID"], found["tfar"]
        distance[triangle < 0] = FAR_M
        normal = found["Ng"]
        rays = np.arange(len(origins)) if rays is None else rays
        if len(moving) and len(rays):
            tree = _tree(self._placed(moving, time_s))
            lookup = np.concatenate([self._range[i] for i in moving]).astype(np.int32)
            extra = tree.run(origins[rays], directions[rays], output=True)
            nearer = (extra["primID"] >= 0) & (extra["tfar"] < distance[rays])
            chosen = rays[nearer]
            distance[chosen] = extra["tfar"][nearer]
            triangle[chosen] = lookup[extra["primID"][nearer]]
            normal[chosen] = extra["Ng"][nearer]
        return Hits(distance, triangle, normal)

    def lit(self, origins: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Whether resting things leave points (N, 3) in the sun: (N,) bool."""
        directions = np.ascontiguousarray(np.broadcast_to(direction, origins.shape), np.float32)
        return self._static.run(origins, directions, query="OCCLUDED") != 0


def _tree(meshes: list[Mesh]) -> EmbreeScene:
    tree = EmbreeScene()
    whole = merge(meshes)
    TriangleMesh(tree, whole.vertices, whole.triangles)
    return tree


def render_camera(
    tracer: Tracer, camera: CameraModel, time_s: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An image at ``time_s``: RGB (H, W, 3) uint8, and the object seen in each pixel (H, W) int32, -1 for the sky.

    Objects are indices into ``scene.things``; ``rng`` draws the sensor's noise.
    """
    scene = tracer.scene
    pose = scene.world_from_ego(time_s) @ camera.ego_from_camera
    directions = _directions(camera, pose)
    origins = np.ascontiguousarray(np.broadcast_to(pose[:3, 3].astype(np.float32), directions.shape))
    moving, rays = _in_view(tracer, camera, pose, time_s)
    hits = tracer.cast(time_s, origins, directions, moving, rays)
    solid = np.flatnonzero(hits.triangle >= 0)
    image = np.empty_like(directions)
    empty = np.flatnonzero(hits.triangle < 0)
    image[empty] = _sky(scene, directions[empty])
    seen = np.full(len(directions), -1, np.int32)
    seen[solid] = tracer.objects[hits.triangle[solid]]
    image[solid] = _shade(tracer, time_s, origins[0], directions[solid], hits, solid, camera.width)
    image *= scene.conditions.balance * np.float32(scene.conditions.exposure * rng.uniform(0.93, 1.07))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(scene.conditions.noise)
    shape = (camera.height, camera.width)
    return (np.sqrt(image.clip(0, 1)) * 255).astype(np.uint8).reshape(*shape, 3), seen.reshape(shape)


def _directions(camera: CameraModel, pose: np.ndarray) -> np.ndarray:
    """Rays through the pixels' centres (H W, 3) float32, of unit depth, in world axes."""
    u = (np.arange(camera.width, dtype=np.float32) + 0.5 - camera.width / 2) / camera.focal_px
    v = (np.arange(camera.height, dtype=np.float32) + 0.5 - camera.height / 2) / camera.focal_px
    rotation = pose[:3, :3].astype(np.float32)
    rays = u[None, :, None] * rotation[:, 0] + v[:, None, None] * rotation[:, 1] + rotation[:, 2]
    return np.ascontiguousarray(rays.reshape(-1, 3), np.float32)


def _in_view(tracer: Tracer, camera: CameraModel, pose: np.ndarray, time_s: float) -> tuple[list[int], np.ndarray]:
    """Moving objects that can be in the image, and the pixels that can show them."""
    mask = np.zeros((camera.height, camera.width), bool)
    moving = []
    centre = np.array([camera.width / 2, camera.height / 2])
    for index, position, radius in tracer.moving_near(time_s, pose[:3, 3], 90.0):
        x, y, z = pose[:3, :3].T @ (position - pose[:3, 3])
        if z < -radius:
            continue
        low, high = np.zeros(2), np.array([camera.width, camera.height])
        if z > radius + 0.2:
            corners = np.array([[x + i * radius, y + j * radius] for i in (-1, 1) for j in (-1, 1)])
            pixels = np.concatenate([centre + camera.focal_px * corners / depth for depth in (z - radius, z + radius)])
            low = np.clip(np.floor(pixels.min(axis=0)), 0, high)
            high = np.clip(np.ceil(pixels.max(axis=0)), 0, high)
        if (high > low).all():
            moving.append(index)
            mask[int(low[1]) : int(high[1]), int(low[0]) : int(high[0])] = True
    return moving, np.flatnonzero(mask)


def _sky(scene: Scene, directions: np.ndarray) -> np.ndarray:
    light = scene.conditions
    x, y, z = directions.T
    up = np.clip(z / np.sqrt(x * x + y * y + z * z), 0.02, 1)
    weight = np.sqrt(up)[:, None]
    haze = clouds(x / (up + 0.15), y / (up + 0.15), 0.02)[:, None]
    colour = light.sky_low * (1 - weight) + light.sky_high * weight
    return (colour + (0.92 - colour) * np.clip(0.25 * haze, 0, 0.6)).astype(np.float32)


def _shade(
    tracer: Tracer, time_s: float, eye: np.ndarray, directions: np.ndarray, hits: Hits, solid: np.ndarray, width: int
) -> np.ndarray:
    """Colour (N, 3) of the points hit at the pixels ``solid``: texture, sun with shadows, sky light, haze."""
    light = tracer.scene.conditions
    triangle, depth = hits.triangle[solid], hits.distance[solid]
    normal = hits.normal[solid]
    normal /= np.maximum(np.sqrt((normal * normal).sum(axis=1, keepdims=True)), np.float32(1e-9))
    normal *= -np.sign((normal * directions).sum(axis=1, keepdims=True))
    points = eye + directions * depth[:, None]
    colour = _paint(tracer, time_s, points, normal, triangle, depth)
    facing = np.maximum(normal @ light.sun, 0)
    if light.sun_colour.max() > 0.3:
        facing *= _unshadowed(tracer, points, normal, facing, solid, width)
    brightness = light.ambient * (0.72 + 0.28 * normal[:, 2:])
    brightness += light.sun_colour * facing[:, None]
    colour *= brightness
    haze = 1 - np.exp(-depth / np.float32(light.fog_m))
    return colour + (light.sky_low - colour) * haze[:, None]


def _unshadowed(
    tracer: Tracer, points: np.ndarray, normal: np.ndarray, facing: np.ndarray, solid: np.ndarray, width: int
) -> np.ndarray:
    """Whether the sun reaches each point, (N,) bool, from one ray per two by two pixels."""
    row, column = np.divmod(solid, width)
    asked = np.flatnonzero((facing > 0) & (row % 2 == 0) & (column % 2 == 0))
    coarse = np.ones((row[-1] // 2 + 1, width // 2 + 1), bool) if len(row) else np.ones((1, 1), bool)
    coarse[row[asked] // 2, column[asked] // 2] = tracer.lit(
        points[asked] + np.float32(0.02) * normal[asked], tracer.scene.conditions.sun
    )
    return coarse[row // 2, column // 2]


def _paint(
    tracer: Tracer, time_s: float, points: np.ndarray, normal: np.ndarray, triangle: np.ndarray, depth: np.ndarray
) -> np.ndarray:
    texture = tracer.textures[triangle]
    order = np.argsort(texture, kind="stable")
    triangle, points, normal, depth = triangle[order], points[order], normal[order], depth[order]
    thing = tracer.objects[triangle]
    x, y, z, cos, sin = tracer.poses(time_s)[:, thing]
    dx, dy = points[:, 0] - x, points[:, 1] - y
    local = np.stack([cos * dx + sin * dy, cos * dy - sin * dx, points[:, 2] - z])
    turned = np.stack([cos * normal[:, 0] + sin * normal[:, 1], cos * normal[:, 1] - sin * normal[:, 0], normal[:, 2]])
    colour = tracer.colours[triangle]
    seed = tracer.seeds[thing]
    ends = np.searchsorted(texture[order], np.arange(max(PAINTERS) + 2))
    for kind, painter in PAINTERS.items():
        low, high = ends[kind], ends[kind + 1]
        if high > low:
            part = slice(low, high)
            surface = Surface(
                colour[part], local[:, part], turned[:, part], seed[part], depth[part], tracer.scene.street
            )
            colour[part] = painter(surface)
    result = np.empty_like(colour)
    result[order] = colour
    return result
