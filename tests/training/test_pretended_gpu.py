"""GPU code on a pretended GPU: no operator gets a tensor of the CPU, and waits for the GPU are few and known."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import pretend_gpu
from clip2scene.config import FinetuneSettings, TeacherSettings
from clip2scene.data.vocabulary import vocabulary
from clip2scene.losses import stcr
from clip2scene.teacher.clip import load_teacher
from clip2scene.training.launch import Worker
from clip2scene.training.methods import EnsembleMethod, PointClipMethod, StudentMethod, TeacherMethod
from clip2scene.training.objectives import LOSSES
from clip2scene.training.samples import SampleSource, join
from clip2scene.training.validation import Validation
from pretend_gpu import pretended

RESOLUTIONS = 3
"""Of the student of these tests."""
NETWORK = {"student/voxels.py": 2, "spconv": 2 * RESOLUTIONS - 1}
"""Waits for the extent of the grid and its voxels; then for each table of neighbours, within and between resolutions.
Backward there are none.
"""


def begin():
    """Once, in the process of the device."""
    pretend_gpu.register()
    # StCR goes block by block on a CPU only, and torch rounds a vector's last elements differently from the others.
    stcr._PAIRS_IN_CACHE = 10**9


@pytest.fixture(scope="module")
def elsewhere():
    """``elsewhere(function, *args)``: its result in a process where torch knows the device from the start."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=begin) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def by_file(waits):
    return Counter(place.split(":")[0] for place in waits)


def both_steps(training):
    """A step here and on the device: loss terms and gradients of each, and the device's waits forward and backward."""
    results, batch = [], join([training.source.read(frame) for frame in training.frames])
    with pretended() as waits:
        for device in (torch.device("cpu"), pretend_gpu.device()):
            torch.manual_seed(0)
            model, moved = training.build().to(device), batch.to(device)
            waits.clear()
            terms = training.loss(model, moved, 0, 0)
            forward = by_file(waits)
            terms["loss"].backward()
            backward = by_file(waits) - forward
            terms = {name: value.detach().cpu() for name, value in terms.items()}
            results.append((terms, {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}))
        return *((as_here(terms), as_here(gradients)) for terms, gradients in results), forward, backward


def as_here(values):
    return {name: value.clone() for name, value in values.items()}


EXTRA = {
    "clip2scene": {"segments.py": 1},
    "slidr": {"losses/contrast.py": 2},
    "pointcontrast": {"student/voxels.py": 2 * NETWORK["student/voxels.py"]},
}
"""Waits for cells of StCR; superpixels and pairs without one; the voxels that PointContrast draws from."""


@pytest.mark.parametrize("method", LOSSES)
def test_a_step_of_every_method_is_the_same_on_the_pretended_gpu(elsewhere, distillation, method):
    here, there, forward, backward = elsewhere(both_steps, distillation(method))
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    assert forward == NETWORK | EXTRA.get(method, {})
    assert backward == {}


@pytest.mark.parametrize("settings", [{}, {"mode": "linear_probe"}, {"loss": "lovasz"}], ids=str)
def test_a_step_of_finetuning_is_the_same_on_the_pretended_gpu(elsewhere, tiny, settings):
    here, there, forward, backward = elsewhere(both_steps, tiny.finetuning(settings=FinetuneSettings(**settings)))
    torch.testing.assert_close(there, here, rtol=0, atol=0)
    assert forward == NETWORK
    assert backward == {}


class Alone(Worker):
    """The only worker; it keeps no checkpoint."""

    def __init__(self, device, heard):
        super().__init__(Path(), lambda kind, value: heard.append((kind, value)))
        self.device = device

    def last_checkpoint(self):
        return None

    def save(self, write):
        pass


def both_trainings(training):
    """Metrics of the epochs here and on the device, and the device's waits."""
    histories = []
    with pretended() as waits:
        for device in (torch.device("cpu"), pretend_gpu.device()):
            heard = []
            waits.clear()
            training(Alone(device, heard))
            histories.append([value for kind, value in heard if kind == "epoch"])
    for row in histories[0] + histories[1]:
        del row["frames_per_second"]
    return *histories, list(waits)


def test_a_training_is_the_same_on_the_pretended_gpu_and_has_no_other_waits(elsewhere, tiny):
    source = SampleSource(tiny.index.root, tiny.store, num_sweeps=2, label_vocabulary=vocabulary("nuscenes"))
    validation = Validation(tiny.index.frames[4:], source, tiny.text_CD)
    here, there, _ = elsewhere(both_trainings, tiny.distillation(validation=validation, epochs=2))
    assert here == there
    assert "verifying/miou" in here[0]
    waits = [elsewhere(both_trainings, tiny.distillation(epochs=1, max_steps=steps))[2] for steps in (1, 2)]
    assert by_file(waits[1]) - by_file(waits[0]) == Counter(NETWORK) + Counter(EXTRA["clip2scene"])


def both_answers(methods, teacher, sample):
    """Classes by method, here and on the device."""
    loaded = [load_teacher(teacher) for _ in range(2)]  # here, as safetensors reads no file while a device is pretended
    with pretended(), torch.inference_mode(), patch("clip2scene.teacher.clip.load_teacher", lambda _: loaded.pop()):
        return [
            {name: method.prepare(device)(sample.to(device)).cpu().clone() for name, method in methods.items()}
            for device in (torch.device("cpu"), pretend_gpu.device())
        ]


def test_every_annotation_free_method_answers_the_same_on_the_pretended_gpu(elsewhere, tiny):
    training = tiny.distillation()
    torch.manual_seed(0)
    student = training.student, training.build().state_dict()
    teacher = TeacherSettings(model="streetworld", image_height_px=96, image_width_px=160)
    methods = {
        "teacher_2d": TeacherMethod(tiny.text_CD),
        "student_3d": StudentMethod(*student, tiny.text_CD, 16),
        "ensemble": EnsembleMethod(*student, tiny.text_CD),
        "pointclip": PointClipMethod(teacher, torch.eye(16, load_teacher(teacher).dim)),
    }
    here, there = elsewhere(both_answers, methods, teacher, training.source.read(tiny.index.frames[0]))
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def both_encodings(settings):
    """Features of two images, and texts, here and on the device."""
    results = []
    for device in (torch.device("cpu"), pretend_gpu.device()):
        teacher = load_teacher(settings)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, settings.image_height_px, settings.image_width_px, generator=generator)
        with pretended():
            teacher = teacher.to(device)
            results.append({"image": teacher(images.to(device)).cpu().clone()})
            results[-1]["text"] = teacher.encode_text(["a car", "the road"]).cpu().clone()
    return results


@pytest.mark.parametrize(("model", "precision"), [("streetworld", "fp32"), ("streetworld", "bf16"), ("RN50", "fp32")])
def test_teachers_encode_the_same_on_the_pretended_gpu(elsewhere, model, precision):
    settings = TeacherSettings(model=model, precision=precision, image_height_px=64, image_width_px=96)
    if model != "streetworld":
        settings = settings.model_copy(update={"pretrained": "random"})
    here, there = elsewhere(both_encodings, settings)
    # The CPU has faster kernels for the attention of a whole block, which round differently.
    torch.testing.assert_close(there, here, rtol=0, atol=1e-5)


def what_is_noticed():
    """Places of waits, and the error for tensors of two devices."""
    with pretended() as waits:
        there = torch.arange(4.0).to(pretend_gpu.device(), non_blocking=True)
        assert not waits
        noted = {}
        for name, work in {
            "copied": lambda: torch.arange(4.0).to(pretend_gpu.device()),
            "number": lambda: float(there.sum()),
            "mask": lambda: there[there > 1],
            "unique": lambda: there.unique(),
            "back": lambda: there.cpu(),
            "rows": lambda: there[there.long()],
            "sum": lambda: there.sum() * 2,
        }.items():
            waits.clear()
            work()
            noted[name] = len(waits)
        leaf = there.clone().requires_grad_()
        leaf.register_hook(lambda gradient: gradient * float(gradient.sum()))
        waits.clear()
        leaf.sum().backward()
        noted["backward"] = len(waits)
        try:
            there + torch.arange(4.0)
        except RuntimeError as error:
            return noted, str(error)
    return noted, ""


def test_a_wait_and_a_mixture_are_noticed(elsewhere):
    noted, mixture = elsewhere(what_is_noticed)
    assert noted == {"copied": 1, "number": 1, "mask": 1, "unique": 1, "back": 1, "rows": 0, "sum": 0, "backward": 1}
    assert "some of its tensors are on pretend:0 and some on the CPU" in mixture
