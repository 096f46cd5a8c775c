"""Keyframes as tensors: K registered sweeps with their point-pixel pairs, and batches of them.

Pairs are made from unaugmented coordinates, and features are read from the cached grids at the pairs' pixels, so the
cloud can be rotated, flipped or scaled freely. The paper's flips and crops of the *image* would move a pixel and its
feature alike on a cached grid, so they change nothing here and are left out.

Legend: N points of all clouds, I values per point, P pairs, M images, K sweeps, D feature width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch

from clip2scene.config import AugmentSettings, DistillSettings
from clip2scene.data.clouds import read_cloud, read_depths, read_labels
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Frame, Sweep, sampled
from clip2scene.data.vocabulary import Vocabulary
from clip2scene.errors import ConfigError, DataError
from clip2scene.geometry.pairing import Pairs, pair
from clip2scene.geometry.registration import HALF_SWEEP_US, choose_sweeps, register, without_ego_returns
from clip2scene.teacher.store import FeatureStore
from clip2scene.teacher.superpixels import SuperpixelStore, segments_at

_RANDOM_POOL = 10
"""``random`` sweeps are drawn from this many before the keyframe, as in the released code."""


@dataclass(frozen=True)
class Sample:
    """One keyframe, or several joined: every cloud in the coordinates of its own keyframe's LiDAR."""

    points_NI: torch.Tensor
    """x, y, z in metres and what :func:`~clip2scene.data.clouds.read_cloud` gives beside them, float32."""
    cloud_N: torch.Tensor
    """Input cloud of each point, int64 from 0: one per sweep, the keyframe's own first, or a single merged one."""
    labels_N: torch.Tensor
    """uint8 labels, 0 = ignore; empty where labels were not asked for."""
    features_MhwD: torch.Tensor
    """Dense teacher features of the images, float16; empty (0, 0, 0, 0) without a store."""
    pair_point_P: torch.Tensor
    """Row of ``points_NI``, int64."""
    pair_image_P: torch.Tensor
    """Row of ``features_MhwD``, int64."""
    pair_position_P2: torch.Tensor
    """Pixel as fractions of the image's width and height, float32."""
    pair_frame_P: torch.Tensor
    """Keyframe of the batch, int64."""
    pair_xyz_P3: torch.Tensor
    """Unaugmented coordinates of the paired points, metres."""
    pair_segment_P: torch.Tensor
    """Superpixel of the pair's pixel, int64 from 0 over all images of the batch, -1 where its image has none;
    empty without superpixels."""

    def to(self, device: torch.device) -> Sample:
        """The same on another device."""
        if device.type == "cpu":
            return self
        return Sample(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pinned(self) -> Sample:
        """In pinned memory, so that :meth:`to` is asynchronous."""
        return Sample(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


@dataclass(frozen=True)
class SampleSource:
    """How keyframes are read; picklable, so that every worker reads its own."""

    root: DataRoot
    store: FeatureStore | None = None
    """Without a store there are no pairs."""
    num_sweeps: int = 1
    sweep_window_s: float = 0.5
    sweep_choice: Literal["spread", "random"] = "spread"
    merge_sweeps: bool = False
    superpixels: SuperpixelStore | None = None
    ego_half_edge_m: float = 0.0
    """Half edge of the square around an earlier sweep's sensor whose points are the car's own, and left out."""
    label_vocabulary: Vocabulary | None = None
    """Set only if labels may be read: without it, annotation-free training cannot open a label file."""

    def read(self, frame: Frame, rng: np.random.Generator | None = None) -> Sample:
        """Read one keyframe; ``rng`` draws its sweeps where ``sweep_choice`` is random.

        Raises:
            DataError: a file is missing or damaged, or labels are asked of a frame without any.
        """
        clouds, starts, pairs = [], [0], []
        depths = None if self.store is None else read_depths(self.root, frame)
        for number, (path, world_from_lidar) in enumerate(self._sweeps(frame, rng)):
            cloud_NI = read_cloud(self.root.path_of(path))
            if number:  # the keyframe's are scored, and never in view
                cloud_NI = without_ego_returns(cloud_NI, self.ego_half_edge_m)
            if self.store is not None:
                pairs.append(pair(cloud_NI[:, :3], world_from_lidar, frame.cameras, depths))
            points_N3 = register(cloud_NI[:, :3], world_from_lidar, frame.world_from_lidar)
            clouds.append(np.column_stack((points_N3, cloud_NI[:, 3:])).astype(np.float32))
            starts.append(starts[-1] + len(cloud_NI))
        points_NI = torch.from_numpy(np.concatenate(clouds))
        sweep_N = torch.repeat_interleave(torch.arange(len(clouds)), torch.tensor(np.diff(starts)))
        cloud_N = torch.zeros_like(sweep_N) if self.merge_sweeps else sweep_N
        features_MhwD, image_of_camera = self._features(frame)
        pairs_P = self._pairs(frame, pairs, starts, image_of_camera)
        return Sample(
            points_NI=points_NI,
            cloud_N=cloud_N,
            labels_N=self._labels(frame, starts[1]),
            features_MhwD=features_MhwD,
            pair_point_P=pairs_P[0],
            pair_image_P=pairs_P[1],
            pair_position_P2=pairs_P[2],
            pair_frame_P=torch.zeros_like(pairs_P[0]),
            pair_xyz_P3=points_NI[pairs_P[0], :3],
            pair_segment_P=self._segments(frame, image_of_camera, pairs_P[1], pairs_P[2]),
        )

    def _sweeps(self, frame: Frame, rng: np.random.Generator | None) -> list[tuple[str, np.ndarray]]:
        """Cloud file and pose of the keyframe and of its chosen sweeps."""
        chosen: tuple[Sweep, ...]
        if self.sweep_choice == "random":
            assert rng is not None, "random sweeps need a generator"
            pool = frame.sweeps[:_RANDOM_POOL]
            rows = rng.permutation(len(pool))[: self.num_sweeps - 1]
            chosen = tuple(pool[row] for row in sorted(rows))
        else:
            chosen = choose_sweeps(frame, self.num_sweeps, self.sweep_window_s)
        return [(frame.cloud_path, frame.world_from_lidar)] + [(s.path, s.world_from_lidar) for s in chosen]

    def _features(self, frame: Frame) -> tuple[torch.Tensor, np.ndarray]:
        """The frame's feature maps, and the row of each camera among them (-1: its image has none)."""
        image_of_camera = np.full(len(frame.cameras), -1, dtype=np.int64)
        if self.store is None:
            return torch.zeros((0, 0, 0, 0), dtype=torch.float16), image_of_camera
        stored = self.store.read(frame.frame_id)
        grids: list[np.ndarray] = []
        for position, camera in enumerate(frame.cameras):
            if camera.name in stored:
                image_of_camera[position] = len(grids)
                grids.append(stored[camera.name])
        if not grids:  # all images are quarantined, or the scene has no posed ones
            grids_MhwD = np.zeros((0, *self.store.grid, self.store.dim), np.float16)
            return torch.from_numpy(grids_MhwD), image_of_camera
        return torch.from_numpy(np.stack(grids)), image_of_camera

    def _pairs(
        self, frame: Frame, pairs: list[Pairs], starts: list[int], image_of_camera: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs of all clouds with the images that have features: point, image, relative position."""
        if not pairs:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none, torch.zeros((0, 2))
        point_P = np.concatenate([p.point_P + start for p, start in zip(pairs, starts, strict=False)])
        camera_P = np.concatenate([p.camera_P for p in pairs])
        # (0, 2) for a scene or a sequence without images.
        size_M2 = np.array([(camera.width, camera.height) for camera in frame.cameras]).reshape(-1, 2)
        position_P2 = np.concatenate([p.pixel_P2 for p in pairs]) / size_M2[camera_P]
        known_P = image_of_camera[camera_P] >= 0
        return (
            torch.from_numpy(point_P[known_P]),
            torch.from_numpy(image_of_camera[camera_P[known_P]]),
            torch.from_numpy(position_P2[known_P].astype(np.float32)),
        )

    def _segments(
        self, frame: Frame, image_of_camera: np.ndarray, image_P: torch.Tensor, position_P2: torch.Tensor
    ) -> torch.Tensor:
        """Superpixel of each pair, numbered consecutively over all images of the frame."""
        if self.superpixels is None:
            return torch.zeros(0, dtype=torch.int64)
        stored = self.superpixels.read(frame.frame_id)
        names = [camera.name for camera, image in zip(frame.cameras, image_of_camera, strict=True) if image >= 0]
        shape = (self.superpixels.height, self.superpixels.width)
        maps_MHW = torch.full((len(names), *shape), -1)
        for row, name in enumerate(names):
            if name in stored:
                maps_MHW[row] = torch.from_numpy(stored[name].astype(np.int64))
        sizes_M = maps_MHW.flatten(1).amax(1) + 1
        segment_P = segments_at(maps_MHW, image_P, position_P2)
        return _shifted(segment_P, (sizes_M.cumsum(0) - sizes_M)[image_P])

    def _labels(self, frame: Frame, num_points: int) -> torch.Tensor:
        if self.label_vocabulary is None:
            return torch.zeros(0, dtype=torch.uint8)
        if frame.label_path is None:
            raise DataError(f"frame {frame.frame_id}: has no label file, and labels are needed here")
        labels_N = read_labels(self.root.path_of(frame.label_path), num_points, self.label_vocabulary)
        return torch.from_numpy(labels_N)


def num_clouds(frame: Frame, settings: DistillSettings) -> int:
    """Number of clouds of a keyframe, its own and its sweeps': K, or fewer at the start of a scene."""
    if settings.sweep_choice == "random":
        return min(settings.num_sweeps, 1 + len(frame.sweeps[:_RANDOM_POOL]))
    return 1 + len(choose_sweeps(frame, settings.num_sweeps, settings.sweep_window_s))


def check_window(frames: tuple[Frame, ...], settings: DistillSettings, max_sweeps: int) -> None:
    """Refuse a window that reaches further back than the index does, as nearer sweeps would silently be taken instead.

    Args:
        frames: keyframes to train on.
        settings: with K and the window.
        max_sweeps: earlier sweeps that the index lists at most; 0 (only keyframes were downloaded) is allowed.

    Raises:
        ConfigError: the window is longer than the sweeps of most of 64 keyframes that have all of them.
    """
    if settings.num_sweeps == 1 or settings.sweep_choice == "random" or not max_sweeps:
        return
    full = [frame for frame in sampled(frames) if len(frame.sweeps) == max_sweeps]
    if not full:
        return
    reached_s = float(np.median([(frame.timestamp_us - frame.sweeps[-1].timestamp_us) / 1e6 for frame in full]))
    if reached_s < settings.sweep_window_s - HALF_SWEEP_US / 1e6:
        needed = math.ceil(settings.sweep_window_s * max_sweeps / reached_s)
        raise ConfigError(
            f"distill.sweep_window_s={settings.sweep_window_s:g}: the {max_sweeps} indexed sweeps before a keyframe "
            f"reach only {reached_s:.2g} s back; dataset.max_sweeps={needed} is needed, or a shorter window"
        )


Reader = Callable[[int, np.random.Generator | None], Sample]
"""Reads the keyframe at a position; the generator draws its sweeps where they are random."""


def cached_reader(source: SampleSource, frames: tuple[Frame, ...], cached: int) -> Reader:
    """A thread-safe reader that keeps the last ``cached`` keyframes; with random sweeps it keeps none."""
    if source.sweep_choice == "random":
        return lambda position, rng: source.read(frames[position], rng)
    read_cached = functools.lru_cache(cached)(lambda position: source.read(frames[position]))
    return lambda position, rng: read_cached(position)


def prefetched(batches: Iterator[Sample], prepare: Callable[[Sample], Sample]) -> Iterator[Sample]:
    """The same batches, each read and prepared in a thread while the one before is in use."""

    def read_next() -> Sample | None:
        batch = next(batches, None)
        return None if batch is None else prepare(batch)

    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read_next)
        while (batch := coming.result()) is not None:
            coming = reader.submit(read_next)
            yield batch


def join(samples: list[Sample]) -> Sample:
    """One batch of several keyframes."""
    points = clouds = images = segments = 0
    moved = []
    for frame, sample in enumerate(samples):
        moved.append(
            replace(
                sample,
                cloud_N=sample.cloud_N + clouds,
                pair_point_P=sample.pair_point_P + points,
                pair_image_P=sample.pair_image_P + images,
                pair_frame_P=torch.full_like(sample.pair_frame_P, frame),
                pair_segment_P=_shifted(sample.pair_segment_P, segments),
            )
        )
        points += len(sample.points_NI)
        clouds += int(sample.cloud_N[-1]) + 1
        images += len(sample.features_MhwD)
        segments += int(sample.pair_segment_P.max()) + 1 if len(sample.pair_segment_P) else 0
    return Sample(**{f.name: torch.cat([getattr(sample, f.name) for sample in moved]) for f in fields(Sample)})


def _shifted(segment_P: torch.Tensor, by: torch.Tensor | int) -> torch.Tensor:
    """Segments with a number added; -1, a pixel of an image without superpixels, stays."""
    return torch.where(segment_P < 0, segment_P, segment_P + by)


def augment(sample: Sample, settings: AugmentSettings, rng: np.random.Generator) -> Sample:
    """Rotate about z, flip and scale all clouds of a keyframe together; pairs and their coordinates do not change."""
    moved_N3 = sample.points_NI[:, :3] @ random_transform(settings, rng).T
    return replace(sample, points_NI=torch.cat((moved_N3, sample.points_NI[:, 3:]), dim=1))


def random_transform(settings: AugmentSettings, rng: np.random.Generator) -> torch.Tensor:
    """A (3, 3) float32 rotation about z with flips and one scale, as the settings allow."""
    matrix_33 = np.eye(3)
    if settings.rotate:
        angle = rng.uniform(0, 2 * np.pi)
        matrix_33[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    if settings.flip:
        matrix_33[:, :2] *= rng.choice([-1.0, 1.0], size=2)
    matrix_33 *= rng.uniform(1 - settings.scale, 1 + settings.scale)
    return torch.from_numpy(matrix_33.astype(np.float32))
