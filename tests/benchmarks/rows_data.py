"""Pairs against the devkit's projection; the feature store against raw files and against features per point."""

from __future__ import annotations

import functools
import os
import statistics
from pathlib import Path

import numpy as np
from bench import Bench, median_ms
from harness import Measured, at_least, at_most, paired, row, seconds
from threadpoolctl import threadpool_info

from clip2scene.data.clouds import read_cloud
from clip2scene.data.index import Frame, Index
from clip2scene.geometry.pairing import Pairs, pair
from clip2scene.geometry.registration import choose_sweeps, register
from clip2scene.storage import Storage
from clip2scene.teacher import store
from clip2scene.teacher.store import FeatureStore

K, WINDOW_S = 3, 0.5
GRID_HW, WIDTH = (14, 26), 512
"""ViT-B/16 on 224 x 416 pixels."""


def clouds_of_keyframe(index: Index, frame: Frame) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """File, (N, 3) float32 points and pose of the keyframe's cloud and its K - 1 sweeps."""
    chosen = [(frame.cloud_path, frame.world_from_lidar)]
    chosen += [(sweep.path, sweep.world_from_lidar) for sweep in choose_sweeps(frame, K, WINDOW_S)]
    return [(path, read_cloud(index.root.path_of(path))[:, :3], pose) for path, pose in chosen]


def pairs_of_keyframe(index: Index, frame: Frame) -> list[tuple[np.ndarray, Pairs]]:
    """Registered points and pairs of each of its clouds."""
    return [
        (register(points_N3, pose, frame.world_from_lidar), pair(points_N3, pose, frame.cameras))
        for _, points_N3, pose in clouds_of_keyframe(index, frame)
    ]


def _keyframe(index: Index) -> Frame:
    return max(index.frames, key=lambda frame: len(frame.sweeps))


@row(
    "pairing",
    "pairing, 6 cameras x 3 sweeps",
    baseline="nuscenes-devkit, map_pointcloud_to_image per camera and sweep",
    goal=at_least(20),
    compare="baseline / ours",
)
def pairing(bench: Bench) -> Measured:
    from nuscenes.nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud

    index = bench.dense_world
    frame, nusc = _keyframe(index), NuScenes(version=index.version, dataroot=str(index.root.path), verbose=False)
    clouds = clouds_of_keyframe(index, frame)
    token_of = {record["filename"]: record["token"] for record in nusc.sample_data}
    images = [nusc.get("sample", frame.frame_id)["data"][camera.name] for camera in frame.cameras]

    def ours() -> int:
        return sum(len(pair(points_N3, pose, frame.cameras)) for _, points_N3, pose in clouds)

    def devkit() -> int:
        mapped = (nusc.explorer.map_pointcloud_to_image(token_of[path], i) for path, _, _ in clouds for i in images)
        return sum(points.shape[1] for points, _, _ in mapped)

    count = ours()
    assert count == devkit(), (count, devkit())
    mine, baseline = paired(ours, devkit, runs=bench.pick(7, 15))
    points = sum(len(points_N3) for _, points_N3, _ in clouds)
    files = [str(index.root.path / path) for path, _, _ in clouds]
    reading = statistics.median(
        seconds(lambda: [LidarPointCloud.from_file(file) for file in files for _ in images]) for _ in range(5)
    )
    products = statistics.median(
        seconds(lambda: _products([points_N3 for _, points_N3, _ in clouds])) for _ in range(9)
    )
    (kernels,) = {of["architecture"] for of in threadpool_info() if "numpy" in of["filepath"]}
    # Every point is read once a camera and its two homogeneous coordinates and depth are written, in float64.
    floor = bench.moved(points * len(images) * 3 * 8 * 2)
    return Measured(
        f"{points} points x {len(images)} cameras, {count} pairs, one thread; ours with clouds in memory, "
        f"{points / statistics.median(mine):.3g} points/s",
        mine,
        baseline,
        limit=f"{floor}; {1e3 * products:.2g} ms of ours are two matrix products, for which numpy's OpenBLAS takes its "
        f"{kernels} kernels here; {1e3 * reading:.0f} ms of the devkit's time are its reading of each cloud per camera",
    )


def _products(clouds: list[np.ndarray]) -> None:
    """The products that pairing is made of: planes of six cameras' sides in float32, one camera a point in float64."""
    sides_S3, matrix_34 = np.ones((12, 3), np.float32), np.ones((3, 4))
    for points_N3 in clouds:
        sides_S3 @ np.ascontiguousarray(points_N3.T)
        matrix_34 @ np.ones((4, len(points_N3)))


@functools.cache
def _store(bench: Bench) -> tuple[FeatureStore, list[str]]:
    """A store of random features at ViT-B/16's grid."""
    path, rng = bench.folder / "vit-b-16", np.random.default_rng(0)
    cameras = [camera.name for camera in _keyframe(bench.dense_world).cameras]
    ids = [f"frame-{number}" for number in range(bench.pick(20, 60))]
    for frame_id in ids:
        features = {name: rng.standard_normal((*GRID_HW, WIDTH)).astype(np.float16) for name in cameras}
        store.write_frame(path, frame_id, features, {}, "random", Storage(path))
        with store.frame_file(path, frame_id).open("rb") as file:
            os.fsync(file.fileno())
    about = {"teacher": "random", "grid": list(GRID_HW), "dim": WIDTH, "broken": []}
    store.write_manifest(path, about | {"frames": len(ids), "images": len(ids) * len(cameras)}, Storage(path))
    return FeatureStore.open(path, Storage(path)), ids


def _forget(files: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _random_reads(bench: Bench, *, cold: bool) -> Measured:
    features, ids = _store(bench)
    order = [ids[i] for i in np.random.default_rng(1).permutation(len(ids))]
    files = [store.frame_file(features.path, frame_id) for frame_id in order]

    def ours() -> None:
        for frame_id in order:
            features.read(frame_id)

    def raw() -> None:
        for file in files:
            np.fromfile(file, dtype=np.uint8)

    mine, baseline = paired(ours, raw, runs=bench.pick(7, 11), before=lambda: _forget(files) if cold else None)
    size = files[0].stat().st_size
    mine, baseline = ([took / len(ids) for took in samples] for samples in (mine, baseline))
    return Measured(
        f"{len(ids)} frames in random order, {size / 1e6:.2f} MB each, "
        + ("dropped from the page cache before every run" if cold else "in the page cache"),
        mine,
        baseline,
        limit=f"{bench.moved(2 * size)}; the raw file takes {median_ms(baseline)} a frame",
    )


@row(
    "store-cold",
    "feature store, random frame read, cold",
    baseline="the same file's bytes, np.fromfile",
    goal=at_most(1.3),
    compare="ours / baseline",
)
def store_cold(bench: Bench) -> Measured:
    return _random_reads(bench, cold=True)


@row(
    "store-warm",
    "feature store, random frame read, warm",
    baseline="the same file's bytes, np.fromfile",
    goal=at_most(1.3),
    compare="ours / baseline",
)
def store_warm(bench: Bench) -> Measured:
    return _random_reads(bench, cold=False)


@row(
    "store-bytes",
    "feature store, bytes a frame",
    baseline="the same features per paired point of the keyframe's own cloud, float16",
    goal=at_most(0.1),
    compare="ours / baseline",
)
def store_bytes(bench: Bench) -> Measured:
    features, ids = _store(bench)
    size = store.frame_file(features.path, ids[0]).stat().st_size
    per_point = []
    for frame in bench.dense_world.frames:
        points_N3 = read_cloud(bench.dense_world.root.path_of(frame.cloud_path))[:, :3]
        per_point.append(float(len(pair(points_N3, frame.world_from_lidar, frame.cameras)) * WIDTH * 2))
    grid = len(_keyframe(bench.dense_world).cameras) * GRID_HW[0] * GRID_HW[1] * WIDTH * 2
    return Measured(
        f"{len(per_point)} keyframes of {len(points_N3)} points, 6 images, ViT-B/16 at 224 x 416",
        [float(size)] * len(per_point),
        per_point,
        unit="B",
        limit=f"{grid} B are the features themselves; K = 3 sweeps per point would be three times the baseline",
    )
