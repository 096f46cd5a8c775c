"""Rows of a GPU: absolute times with its name, and whether half precision says the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from bench import Bench
from harness import Measured, Skipped, at_least, paired, row
from rows_student import batch_of, distillation
from spconv.core import ConvAlgo
from spconv.pytorch.conv import SparseConvolution
from torch import Tensor

from clip2scene.config import TeacherSettings
from clip2scene.teacher.clip import DenseClip, load_teacher
from clip2scene.training.distill import Distillation
from clip2scene.training.samples import Sample

_IMAGES = 24
_CLASSES = 16


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise Skipped("no GPU here")
    return torch.device("cuda")


def _teacher(precision: Any) -> DenseClip:
    settings = TeacherSettings(pretrained="random", precision=precision)
    return load_teacher(settings).to(_device())


def _images(settings: TeacherSettings) -> Tensor:
    """Smooth noise, so that patches differ as in a photograph."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(_IMAGES, 3, 14, 26, generator=generator)
    size = (settings.image_height_px, settings.image_width_px)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").to(_device())


def _synchronised(work: Any) -> None:
    work()
    torch.cuda.synchronize()


@row(
    "gpu-bf16-labels",
    "teacher in bf16: share of patches with fp32's label",
    baseline="none: the share itself",
    goal=at_least(0.995),
    compare="ours",
)
def bf16_labels(bench: Bench) -> Measured:
    exact, half = _teacher("fp32"), _teacher("bf16")
    images = _images(exact.settings)
    features = exact(images)
    # Random weights have no texts: prototypes are the means of random patches, which are as far apart as patches are.
    flat_ND = torch.nn.functional.normalize(features.flatten(0, 2), dim=1)
    chosen = torch.randperm(len(flat_ND), generator=torch.Generator().manual_seed(0))[:_CLASSES].to(flat_ND.device)
    text_CD = torch.nn.functional.normalize(flat_ND[chosen] - flat_ND.mean(0), dim=1)
    labels = [(teacher(images) @ text_CD.T).argmax(-1) for teacher in (exact, half)]
    shares = (labels[0] == labels[1]).float().flatten(1).mean(1).tolist()
    return Measured(f"ViT-B-16, random weights, {_IMAGES} images, {torch.cuda.get_device_name()}", shares, unit="")


@row(
    "gpu-teacher",
    "teacher's dense forward on the GPU, bf16",
    baseline="the same in fp32",
    goal=None,
    compare="baseline / ours",
)
def gpu_teacher(bench: Bench) -> Measured:
    exact, half = _teacher("fp32"), _teacher("bf16")
    images = _images(exact.settings)
    ours, baseline = paired(lambda: _synchronised(lambda: half(images)), lambda: _synchronised(lambda: exact(images)))
    rate = _IMAGES / statistics.median(ours)
    work = f"ViT-B-16, {_IMAGES} images of 224 x 416, {rate:.0f} images/s, {torch.cuda.get_device_name()}"
    return Measured(work, ours, baseline)


def _student_step(
    training: Distillation, batch: Sample, half: bool = False, native: bool = False
) -> Callable[[], None]:
    """A forward and backward pass of a fresh network, until the GPU is done with it."""
    torch.manual_seed(0)
    model = training.build().to(_device())
    for module in model.modules() if native else ():
        if isinstance(module, SparseConvolution):
            module.algo = ConvAlgo.Native
    network = torch.autocast("cuda", torch.float16, enabled=half)(lambda *given: model(*given))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        training.loss(network, batch, 0, 0)["loss"].backward()

    return lambda: _synchronised(run)


@row(
    "gpu-student-step",
    "student step on the GPU, fp16",
    baseline="the same in fp32",
    goal=None,
    compare="baseline / ours",
)
def gpu_student_step(bench: Bench) -> Measured:
    return _steps(bench, "fp32", {"half": True}, {})


@row(
    "gpu-implicit",
    "student step on the GPU, fp16, by spconv's MaskImplicitGemm",
    baseline="the same by its native algorithm",
    goal=None,
    compare="baseline / ours",
)
def gpu_implicit(bench: Bench) -> Measured:
    return _steps(bench, "native", {"half": True}, {"half": True, "native": True})


def _steps(bench: Bench, base: str, ours: dict[str, bool], baseline: dict[str, bool]) -> Measured:
    device = _device()
    training = distillation(bench, num_workers=0)
    batch = batch_of(training).to(device)
    samples = paired(_student_step(training, batch, **ours), _student_step(training, batch, **baseline))
    base_s = statistics.median(samples[1])
    return Measured(f"{len(batch.points_NI)} points, {base} {base_s:.3f} s, {torch.cuda.get_device_name()}", *samples)
