"""Records a drive through one scene: writes its sensor files, and returns its rows of the tables."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from clip2scene.config import StreetworldSettings
from clip2scene.streetworld import tables
from clip2scene.streetworld.lidar import scan
from clip2scene.streetworld.render import Tracer, render_camera
from clip2scene.streetworld.sensors import LIDAR, Rig, disturb, make_rig
from clip2scene.streetworld.tables import VERSION, Row, token
from clip2scene.streetworld.world import Scene, make_scene

KEYFRAME_PERIOD_S = 0.5
_MAP_MARGIN_M, _MAP_PIXEL_M = 75.0, 0.1
_EPOCH_US = 1_532_402_927_000_000
_JPEG_QUALITY = 90


class Recorder:
    """One scene being recorded into a folder."""

    def __init__(self, folder: Path, settings: StreetworldSettings, seed: int, number: int, name: str) -> None:
        self.folder, self.settings, self.name = folder, settings, name
        self.key = (seed, number)
        self.rng = np.random.default_rng([seed, number, 2])
        self.scene: Scene = make_scene(seed, number, settings.keyframes_per_scene * KEYFRAME_PERIOD_S)
        self.rig: Rig = make_rig(self.rng, settings.image_width_px, settings.image_height_px)
        self.tracer = Tracer(self.scene)
        self.rows: dict[str, list[Row]] = defaultdict(list)
        self.start_us = _EPOCH_US + 3_600_000_000 * number + int(self.rng.integers(600_000_000))
        self.log = f"n{number % 900 + 100:03d}-streetworld-seed{seed}"
        drive_m = self.scene.ego_speed_m_s * settings.keyframes_per_scene * KEYFRAME_PERIOD_S
        self.origin_m = float(np.ceil(drive_m + _MAP_MARGIN_M))
        """Position of the scene's local origin on its map, in x and in y."""
        self.world_from_scene = np.eye(4)
        self.world_from_scene[:2, 3] = self.origin_m
        self.chains: dict[str, list[Row]] = defaultdict(list)
        self.annotations: dict[int, list[Row]] = defaultdict(list)

    def run(self) -> dict[str, list[Row]]:
        """Record everything; returns rows by table."""
        self._calibrate()
        self._drive()
        for chain in self.chains.values():
            tables.link(chain)
            self.rows["sample_data"] += chain
        self._finish_annotations()
        self._finish_scene()
        return dict(self.rows)

    def _calibrate(self) -> None:
        for channel, pose in self.rig.calibrated.items():
            intrinsics = self.rig.calibrated_intrinsics.get(channel)
            self.rows["calibrated_sensor"].append(
                {
                    "token": token("calibrated_sensor", self.key, channel),
                    "sensor_token": tables.sensor_token(channel),
                    "translation": tables.translation(pose),
                    "rotation": tables.quaternion(pose),
                    "camera_intrinsic": [] if intrinsics is None else intrinsics.tolist(),
                }
            )

    def _drive(self) -> None:
        """Record all keyframes, and the sweeps before and between them."""
        settings, samples = self.settings, self.rows["sample"]
        steps = settings.sweeps_between_keyframes + 1
        for step in range(settings.sweeps_before_first, 0, -1):
            self.record_sweep(-step * KEYFRAME_PERIOD_S / steps, token("sample", self.key, 0))
        for frame in range(settings.keyframes_per_scene):
            time_s = frame * KEYFRAME_PERIOD_S
            sample: Row = {
                "token": token("sample", self.key, frame),
                "timestamp": self._us(time_s),
                "prev": "",
                "next": "",
                "scene_token": token("scene", self.key),
            }
            samples.append(sample)
            self.record_keyframe(frame, time_s, sample["token"])
            if frame + 1 < settings.keyframes_per_scene:
                for step in range(1, steps):
                    nearest = frame + (2 * step > steps)
                    self.record_sweep(time_s + step * KEYFRAME_PERIOD_S / steps, token("sample", self.key, nearest))
        tables.link(samples)

    def _finish_scene(self) -> None:
        """Rows of the scene, its log and its map, which is drawn."""
        log_token, samples = token("log", self.key), self.rows["sample"]
        map_name = f"maps/{token('map', self.key)}.png"
        self._draw_map(self.folder / map_name)
        self.rows["scene"].append(
            {
                "token": token("scene", self.key),
                "log_token": log_token,
                "nbr_samples": len(samples),
                "first_sample_token": samples[0]["token"],
                "last_sample_token": samples[-1]["token"],
                "name": self.name,
                "description": f"synthetic street, {self.scene.street.left.kind} and {self.scene.street.right.kind}",
            }
        )
        self.rows["log"].append(
            {
                "token": log_token,
                "logfile": self.log,
                "vehicle": self.log[:4],
                "date_captured": "2018-07-24",
                "location": "streetworld",
            }
        )
        self.rows["map"].append(
            {
                "token": token("map", self.key),
                "log_tokens": [log_token],
                "category": "semantic_prior",
                "filename": map_name,
            }
        )

    def _us(self, time_s: float) -> int:
        return self.start_us + round(time_s * 1e6)

    def _data(
        self, channel: str, time_s: float, sample: str, *, key: bool, size: tuple[int, int], suffix: str
    ) -> tuple[str, Path]:
        """Add the rows of one measurement; returns its token and the file to write."""
        stamp = self._us(time_s)
        name = token("sample_data", self.key, channel, stamp)
        relative = f"{'samples' if key else 'sweeps'}/{channel}/{self.log}__{channel}__{stamp}{suffix}"
        true_pose = self.world_from_scene @ self.scene.world_from_ego(time_s)
        pose = disturb(self.rng, true_pose, 0.005, np.deg2rad(0.02))
        self.rows["ego_pose"].append(
            {
                "token": name,
                "timestamp": stamp,
                "translation": tables.translation(pose),
                "rotation": tables.quaternion(pose),
            }
        )
        self.chains[channel].append(
            {
                "token": name,
                "sample_token": sample,
                "ego_pose_token": name,
                "calibrated_sensor_token": token("calibrated_sensor", self.key, channel),
                "timestamp": stamp,
                "fileformat": "jpg" if suffix == ".jpg" else "pcd",
                "is_key_frame": key,
                "height": size[1],
                "width": size[0],
                "filename": relative,
                "prev": "",
                "next": "",
            }
        )
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return name, path

    def _scan(self, time_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pose = self.scene.world_from_ego(time_s) @ self.rig.ego_from_lidar
        return scan(self.tracer, pose, time_s, self.settings.lidar_beams, self.settings.lidar_azimuth_steps, self.rng)

    def record_sweep(self, time_s: float, sample: str) -> None:
        """Write one sweep of a sample."""
        _, path = self._data(LIDAR, time_s, sample, key=False, size=(0, 0), suffix=".pcd.bin")
        self._scan(time_s)[0].tofile(path)

    def record_keyframe(self, frame: int, time_s: float, sample: str) -> None:
        """Write one labelled scan and six images, and annotate what they show."""
        name, path = self._data(LIDAR, time_s, sample, key=True, size=(0, 0), suffix=".pcd.bin")
        points, labels, objects = self._scan(time_s)
        points.tofile(path)
        label_file = f"lidarseg/{VERSION}/{name}_lidarseg.bin"
        labels.tofile(self.folder / label_file)
        self.rows["lidarseg"].append({"token": name, "sample_data_token": name, "filename": label_file})
        pixels = np.zeros(len(self.scene.things), int)
        expected = np.zeros(len(self.scene.things))
        for camera in self.rig.cameras:
            when = time_s + camera.delay_s + self.rng.uniform(-0.001, 0.001)
            size = (camera.width, camera.height)
            _, path = self._data(camera.name, when, sample, key=True, size=size, suffix=".jpg")
            image, seen = render_camera(self.tracer, camera, when, self.rng)
            Image.fromarray(image).save(path, quality=_JPEG_QUALITY)
            found, counts = np.unique(seen[seen >= 0], return_counts=True)
            pixels[found] += counts
            eye = (self.scene.world_from_ego(when) @ camera.ego_from_camera)[:3, 3]
            for index in found:
                x, y, z, _ = self.scene.pose(self.scene.things[index], when)
                length, width, height = self.scene.things[index].mesh.size()
                away = max(float(np.linalg.norm([x - eye[0], y - eye[1], z + height / 2 - eye[2]])), 1.0)
                expected[index] = max(
                    expected[index], 0.6 * height * (length + width) / 2 * (camera.focal_px / away) ** 2
                )
        self._annotate(
            frame, time_s, sample, np.bincount(objects, minlength=len(pixels)), pixels / np.maximum(expected, 1)
        )

    def _annotate(self, frame: int, time_s: float, sample: str, points: np.ndarray, share: np.ndarray) -> None:
        """Boxes of the objects that LiDAR or cameras see."""
        for index, thing in enumerate(self.scene.things):
            if thing.is_stuff or not (points[index] or share[index] > 0.02):
                continue
            x, y, z, yaw = self.scene.pose(thing, time_s)
            length, width, height = thing.mesh.size()
            self.annotations[index].append(
                {
                    "token": token("annotation", self.key, index, frame),
                    "sample_token": sample,
                    "instance_token": token("instance", self.key, index),
                    "visibility_token": tables.visibility_of(float(share[index])),
                    "attribute_tokens": tables.attribute_of(thing.category, thing.placement.speed_m_s),
                    "translation": [x + self.origin_m, y + self.origin_m, z + height / 2],
                    "size": [width, length, height],
                    "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))],
                    "prev": "",
                    "next": "",
                    "num_lidar_pts": int(points[index]),
                    "num_radar_pts": 0,
                }
            )

    def _finish_annotations(self) -> None:
        for index, chain in sorted(self.annotations.items()):
            tables.link(chain)
            self.rows["sample_annotation"] += chain
            self.rows["instance"].append(
                {
                    "token": token("instance", self.key, index),
                    "category_token": tables.category_token(self.scene.things[index].category),
                    "nbr_annotations": len(chain),
                    "first_annotation_token": chain[0]["token"],
                    "last_annotation_token": chain[-1]["token"],
                }
            )

    def _draw_map(self, path: Path) -> None:
        """The devkit's map mask: white for road and sidewalk, 0.1 m per pixel, y upwards from the last row."""
        pixels = round(2 * self.origin_m / _MAP_PIXEL_M)
        axis = (np.arange(pixels, dtype=np.float32) + 0.5) * np.float32(_MAP_PIXEL_M) - np.float32(self.origin_m)
        x, y = np.meshgrid(axis, axis[::-1])
        street = self.scene.street
        s, d = street.locate(x, y)
        walk = np.where(d > 0, street.left.sidewalk_m, street.right.sidewalk_m)
        inside = (np.abs(d) < street.edge + walk) & (s > street.begin) & (s < street.end)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.where(inside, 255, 0).astype(np.uint8)).save(path)
