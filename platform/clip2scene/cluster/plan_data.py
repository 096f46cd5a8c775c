"""How much a job reads, counted without making any of it.

The first of these that is there: the index in the storage; for a street world its settings, which determine the number
of keyframes; the data set's folder, indexed in memory; the published counts of the official splits. ``--frames`` scales
the counts to a data set that is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from clip2scene.artifacts import eval_version, make_index, missing_of_splits, versions, world_path
from clip2scene.config import DatasetSettings, Job, Split
from clip2scene.data.index import Frame, Index
from clip2scene.data.splits import SEMANTICKITTI_SCANS, nuscenes_scenes, scenes_of_split, split_frames
from clip2scene.errors import ConfigError, DataError
from clip2scene.remote import is_remote
from clip2scene.stages import Stages
from clip2scene.storage import folder_of
from clip2scene.streetworld.tables import scene_names
from clip2scene.training.finetune import choose_labelled

_NUSCENES = {
    "train": (28_130, 700),
    "val": (6_019, 150),
    "test": (6_008, 150),
    "mini_train": (323, 8),
    "mini_val": (81, 2),
}
"""Keyframes and scenes of the official splits (Caesar et al., CVPR 2020; v1.0-mini: its tables)."""
_NUSCENES_DERIVED = {"parametrizing": 600, "verifying": 100}
"""Scenes of ``train`` in the splits that divide it."""
_SCANNET = {"train": 1201, "val": 312, "test": 100}
"""Scans of the official lists, one frame each."""
_CAMERAS = {"streetworld": 6, "nuscenes": 6, "semantickitti": 1}
_POINTS = {"nuscenes": 34_688, "semantickitti": 104_452}
"""Points per sweep: 32 beams x 1,084 steps, as in a real keyframe; 4,549 million points in 43,552 scans."""
_RETURNS = 0.9
"""Share of a street world's rays that hit something, measured in the worlds of jobs/table3_ablation.yaml."""


@dataclass(frozen=True)
class Data:
    """What a job reads."""

    frames: int
    """Of the whole index."""
    train_frames: int
    eval_frames: int
    labelled_frames: int
    """Those of ``train_frames`` with the labels that fine-tuning reads."""
    images: int
    """Of both splits, or for predictions of the training split alone."""
    train_images: int
    points: int | None
    """Of one sweep; None if unknown."""
    source: str
    world_is_there: bool = False
    index_is_there: bool = False
    stages: Stages | None = None
    """The job's, if its index is in the storage, so that finished artifacts can be looked up."""


def count_data(job: Job, num_frames: int | None = None) -> Data:
    """Count what a job reads.

    Args:
        job: what would be run.
        num_frames: keyframes in the training split of a data set that is not there; other counts are scaled with it.

    Raises:
        ConfigError: an unknown split, or a data set of unknown size.
        DataError: the data set's folder is damaged.
    """
    if num_frames is not None:
        return _scaled(_counted(job), num_frames)
    stages = _stages(job)
    if stages is not None:
        return replace(
            _of_indexes(job, stages.indexes, f"the index in storage={job.storage}"),
            world_is_there=True,
            index_is_there=True,
            stages=stages,
        )
    dataset, root = job.dataset, world_path(job)
    if dataset.kind == "streetworld" or not root.is_dir():
        return replace(_counted(job), world_is_there=root.is_dir())
    made = {version: make_index(job, version) for version in versions(job)}
    return _of_indexes(job, made, f"dataset.root={dataset.root}, indexed for this plan and not kept")


def _stages(job: Job) -> Stages | None:
    """The job's stages if world and index are there already, so that reading them makes nothing."""
    if is_remote(job.storage) or not folder_of(job.storage).is_dir() or not world_path(job).is_dir():
        return None
    stages = Stages(job)
    return stages if all(stages.index_path(version).is_file() for version in versions(job)) else None


def _of_indexes(job: Job, indexes: Mapping[str, Index], source: str) -> Data:
    dataset, eval_index = job.dataset, indexes[eval_version(job)]
    train = split_frames(indexes[dataset.version], dataset.train_split) if job.reads_train_split else ()
    held_out = split_frames(eval_index, dataset.eval_split)
    parts = [f", split {name}: {part} are there" for name, part in missing_of_splits(job, indexes).items()]
    encoded = {frame.frame_id: frame for frame in (*train, *(() if job.stage == "predict" else held_out))}
    return Data(
        frames=sum(len(index.frames) for index in indexes.values()),
        train_frames=len(train),
        eval_frames=len(held_out),
        labelled_frames=len(choose_labelled(train, job.finetune)) if train else 0,
        images=_images(tuple(encoded.values())),
        train_images=_images(train),
        points=_points_of(job, eval_index, (*train, *held_out)[0]),
        source=source + "".join(parts),
    )


def _images(frames: tuple[Frame, ...]) -> int:
    return sum(len(frame.cameras) for frame in frames)


def _points_of(job: Job, index: Index, frame: Frame) -> int | None:
    from clip2scene.data.clouds import read_cloud

    try:
        return len(read_cloud(index.root.path_of(frame.cloud_path)))
    except DataError:
        return _points(job.dataset)  # the index is there, but its files are not


def _points(dataset: DatasetSettings) -> int | None:
    if dataset.kind == "streetworld":
        return round(_RETURNS * dataset.streetworld.lidar_beams * dataset.streetworld.lidar_azimuth_steps)
    return _POINTS.get(dataset.kind)


def _counted(job: Job) -> Data:
    """Counts from the settings of a street world, or published ones."""
    dataset = job.dataset
    cameras = _CAMERAS.get(dataset.kind, dataset.images_per_scene)
    if cameras is None:
        raise ConfigError(
            f"dataset.images_per_scene: not given, and {dataset.kind} at {dataset.root} is not there to count them; "
            "give it, or dataset.root"
        )
    source = f"official counts of {dataset.kind} (dataset.root={dataset.root} is not there)"
    total = 0  # of ScanNet, no more than its splits are counted
    if dataset.kind == "streetworld":
        world = dataset.streetworld
        total = (world.train_scenes + world.val_scenes) * world.keyframes_per_scene
        source = "the settings of the street world"
    elif dataset.kind == "nuscenes":
        names = ["mini_train", "mini_val"] if dataset.version == "v1.0-mini" else ["train", "val"]
        if job.stage == "predict" and dataset.eval_split == "test":
            names.append("test")
        total = sum(_NUSCENES[name][0] for name in names)
    elif dataset.kind == "semantickitti":
        total = sum(SEMANTICKITTI_SCANS.values())
    (train, scenes), (held_out, _) = (_split(job, name) for name in (dataset.train_split, dataset.eval_split))
    if not job.reads_train_split:
        train = 0
    different = train + held_out - _in_both(job, train, held_out)
    return Data(
        frames=max(total, different),
        train_frames=train,
        eval_frames=held_out,
        labelled_frames=_labelled(job, train, scenes),
        images=(train if job.stage == "predict" else different) * cameras,
        train_images=train * cameras,
        points=_points(dataset),
        source=source,
    )


def _split(job: Job, name: Split) -> tuple[int, int]:
    """Keyframes and scenes of a split."""
    kind = job.dataset.kind
    if kind == "streetworld":
        world = job.dataset.streetworld
        there = nuscenes_scenes(name).intersection(scene_names(world.train_scenes, world.val_scenes))
        if not there:
            raise ConfigError(f"split {name!r}: this street world will have no scene of it; make it larger")
        return len(there) * world.keyframes_per_scene, len(there)
    if kind == "semantickitti":
        scenes = scenes_of_split(kind, Path(), name)
        return sum(SEMANTICKITTI_SCANS[scene] for scene in scenes), len(scenes)
    if kind == "nuscenes" and name in _NUSCENES_DERIVED:
        frames, scenes_there = _NUSCENES["train"]
        scenes_wanted = _NUSCENES_DERIVED[name]
        return round(frames * scenes_wanted / scenes_there), scenes_wanted
    known = _NUSCENES if kind == "nuscenes" else {split: (count, count) for split, count in _SCANNET.items()}
    if name not in known:
        raise ConfigError(
            f"split {name!r}: no count of it is known without dataset.root; known for {kind}: {', '.join(known)}"
        )
    return known[name]


def _in_both(job: Job, train: int, held_out: int) -> int:
    """Keyframes that both splits have: ``parametrizing`` and ``verifying`` are the two parts of ``train``."""
    names = {job.dataset.train_split, job.dataset.eval_split}
    overlap = len(names) == 1 or ("train" in names and names & {"parametrizing", "verifying"})
    return min(train, held_out) if overlap else 0


def _labelled(job: Job, frames: int, scenes: int) -> int:
    """Size of :func:`clip2scene.training.finetune.choose_labelled`, for scenes of equal length."""
    every = job.finetune.every
    if job.finetune.protocol == "clip2scene_frame":
        return math.ceil(frames / every)
    return round(scenes // every * frames / scenes)


def _scaled(data: Data, num_frames: int) -> Data:
    share = num_frames / (data.train_frames or data.eval_frames)

    def times(count: int) -> int:
        return max(round(count * share), min(count, 1))

    return replace(
        data,
        frames=times(data.frames),
        train_frames=times(data.train_frames),
        eval_frames=times(data.eval_frames),
        labelled_frames=times(data.labelled_frames),
        images=times(data.images),
        train_images=times(data.train_images),
        source=f"--frames {num_frames}, in proportion to {data.source}",
    )
