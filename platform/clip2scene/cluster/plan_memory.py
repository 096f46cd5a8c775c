"""Peak memory of a training worker and of an extraction actor, estimated from shapes before anything runs.

A training worker holds, in bytes (float32 and index types as in the code):

- ``process``: Python with torch, spconv and Ray, measured (``rates.json``);
- ``index``: the descriptions of all training keyframes, in every worker (``rates.json``);
- ``network``: parameters x 4 x (weights + gradients + optimiser: 1 state for SGD, 2 for AdamW, + 1 for the buckets of
  DistributedDataParallel with several workers);
- ``kept samples``: ``cached_frames`` (or all, if fewer) x a decoded keyframe: per point 16 (x, y, z, intensity; 12
  more for a mesh's colour), 8 (cloud) and 1 (label); per pair 44; per image h x w x D x 2;
- ``step``: what backpropagation keeps of one step, see :func:`step_bytes`, and the joined batch itself; in float32,
  fp16 needs less.

This is an estimate: within a factor of :data:`WITHIN` of measured peaks above ``process`` (tests/cluster/test_plan.py).

Legend: N points of a worker's share of a step, P point-pixel pairs, D width of the teacher's space.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from clip2scene.cluster.plan_data import Data
from clip2scene.cluster.rates import Rates
from clip2scene.config import Job, StudentSettings, TeacherSettings, TrainingSettings

WITHIN = 2.0
ON_GPU = ("network", "step")
"""What lies on the GPU of a worker that has one."""
STATES = {"sgd": 1, "adamw": 2}
"""Values that an optimiser keeps per parameter."""
_FLOAT, _INDEX = 4, 4
_POINT, _COLOUR, _PAIR = 24, 12, 44
_PAIRS_PER_IMAGE = {"streetworld": 0.107, "nuscenes": 0.107, "semantickitti": 0.16, "scannet": 0.029}
"""Per point, measured on one real keyframe of each data set."""
_KEPT_PER_CONVOLUTION = 3
"""Its input or skip, its output, and the output of batch norm; ReLU works in place."""
_KEPT_PER_HEAD = 6
"""Output, its normalised copy, the gradients of both, the means of the cells and the pixel features."""
_KERNEL = 27


def training_bytes(
    job: Job, settings: TrainingSettings, data: Data, rates: Rates, *, grid: tuple[int, int], dim: int
) -> Mapping[str, int] | None:
    """Peak memory of one worker by purpose; None if the size of a cloud is unknown.

    Args:
        job: what would be run.
        settings: ``job.distill`` or ``job.finetune``.
        data: what the job reads.
        rates: measured sizes.
        grid: h x w patches per image in the store.
        dim: D.
    """
    if data.points is None:
        return None
    workers = max(job.resources.num_workers, 1)
    distils = settings is job.distill
    sweeps = job.distill.num_sweeps if distils else 1
    frames = data.train_frames if distils else data.labelled_frames
    images = math.ceil(data.train_images / data.train_frames) if distils else 0
    pairs = images * _PAIRS_PER_IMAGE[job.dataset.kind]
    point = _POINT + _COLOUR * (job.dataset.kind == "scannet")
    sample = round(sweeps * data.points * (point + 1 + pairs * _PAIR) + images * grid[0] * grid[1] * dim * _FLOAT // 2)
    share = math.ceil(settings.batch_size / workers)
    points = share * sweeps * data.points
    states = STATES[settings.optimiser.kind]
    kept = min(job.resources.cached_frames, frames)
    if distils and job.distill.sweep_choice == "random":
        kept = 0
    return {
        "process": rates.bytes_of("worker process"),
        "index": frames * rates.bytes_of("keyframe in a worker"),
        "network": parameters(job.student, dim) * _FLOAT * (2 + states + (workers > 1)),
        "kept samples": kept * sample,
        "step": share * sample + step_bytes(job.student, points, round(points * pairs), dim),
    }


def step_bytes(student: StudentSettings, points: int, pairs: int, dim: int) -> int:
    """What one step keeps until its gradients are computed.

    Assumes as many voxels as points, and half as many after each halving of the resolution (upper bounds for real
    clouds): per convolution of width w on v voxels ``3 x 4 x v x w``, per level ``2 x 4 x 27 x v`` for the pairs of
    neighbours, per layer on points ``3 x 4 x N x w``, and ``6 x 4 x P x D`` for each of the two heads.
    """
    from clip2scene.student.layouts import layout_of

    layout = layout_of(student)
    voxels = [points / 2**level for level in range(layout.levels + 1)]
    widths = [(voxels[0], width) for _, width in layout.stem]
    skips = (layout.stem[-1][1], *layout.encoder[:-1])
    for level, (width, blocks) in enumerate(zip(layout.encoder, layout.encoder_blocks, strict=True), start=1):
        widths += [(voxels[level], width)] * (1 + 2 * blocks)
    for step, (width, blocks) in enumerate(zip(layout.decoder, layout.decoder_blocks, strict=True), start=1):
        level = layout.levels - step
        widths += [(voxels[level], width)] * 2 * blocks + [(voxels[level], width + skips[level])]
    widths += [(points, layout.decoder[-1])] * (1 + len(layout.fusions))
    kept = sum(_KEPT_PER_CONVOLUTION * _FLOAT * count * width for count, width in widths)
    neighbours = sum(2 * _INDEX * _KERNEL * count for count in voxels)
    return round(kept + neighbours + 2 * _KEPT_PER_HEAD * _FLOAT * pairs * dim)


@functools.lru_cache
def parameters(student: StudentSettings, dim: int) -> int:
    """Number of parameters of the network with both heads into the teacher's space."""
    import torch

    from clip2scene.student.network import Student

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Student(student, embedding_dim=dim).parameters())


def actor_bytes(
    teacher: TeacherSettings, teacher_parameters: int, frames_per_batch: int, cameras: int, rates: Rates
) -> int:
    """Peak memory of an extraction actor: its process, the teacher, and a batch of images in float32."""
    image = 3 * teacher.image_height_px * teacher.image_width_px * _FLOAT
    return (
        rates.bytes_of("worker process") + teacher_parameters * _FLOAT + 2 * frames_per_batch * max(cameras, 1) * image
    )
