"""The published networks have the published number of parameters."""

from __future__ import annotations

import pytest

from clip2scene.config import StudentSettings
from clip2scene.student.layouts import layout_of
from clip2scene.student.network import Student


def convolution(kernel: int, inputs: int, outputs: int) -> int:
    """Weights, and batch norm's scale and shift."""
    return kernel**3 * inputs * outputs + 2 * outputs


def blocks(inputs: int, outputs: int, count: int) -> int:
    total = 0
    for width in [inputs] + [outputs] * (count - 1):
        total += convolution(3, width, outputs) + convolution(3, outputs, outputs)
        total += convolution(1, width, outputs) if width != outputs else 0
    return total


def unet(planes: tuple[int, ...], layers: tuple[int, ...]) -> int:
    """PLANES and LAYERS as in MinkowskiEngine's examples/minkunet.py, behind a stem of 32 channels."""
    total, width, skips = 0, 32, []
    for plane, layer in zip(planes[:4], layers[:4], strict=True):
        skips.append(width)
        total += convolution(2, width, width) + blocks(width, plane, layer)
        width = plane
    for plane, layer in zip(planes[4:], layers[4:], strict=True):
        total += convolution(2, width, plane) + blocks(plane + skips.pop(), plane, layer)
        width = plane
    return total


SPVCNN_POINTS = sum(i * o + 2 * o for i, o in ((4, 32), (32, 256), (256, 128), (128, 96)))
EXPECTED = {
    "minkunet14": convolution(5, 4, 32) + unet((32, 64, 128, 256, 128, 128, 96, 96), (1,) * 8),
    "minkunet18": convolution(5, 4, 32) + unet((32, 64, 128, 256, 128, 128, 96, 96), (2,) * 8),
    "minkunet34": convolution(5, 4, 32) + unet((32, 64, 128, 256, 256, 128, 96, 96), (2, 3, 4, 6, 2, 2, 2, 2)),
    "spvcnn": convolution(3, 4, 32)
    + convolution(3, 32, 32)
    + unet((32, 64, 128, 256, 256, 128, 96, 96), (2,) * 8)
    + SPVCNN_POINTS,
}
REPORTED_MILLIONS = {"minkunet34": 37.9, "spvcnn": 21.8}


@pytest.mark.parametrize("architecture", EXPECTED)
def test_parameters(architecture):
    student = Student(StudentSettings(architecture=architecture))
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == EXPECTED[architecture]
    if architecture in REPORTED_MILLIONS:
        assert round(count / 1e6, 1) == REPORTED_MILLIONS[architecture]
    assert student.backbone.width == 96


def test_channels_ask_for_a_smaller_spvcnn_with_one_block_a_level():
    layout = layout_of(StudentSettings(channels=(32, 48, 64, 96)))
    assert layout.encoder == (48, 64, 96)
    assert layout.decoder == (64, 48, 32)
    assert layout.encoder_blocks == layout.decoder_blocks == (1, 1, 1)
    assert layout.fusions == (0, 3)
    assert layout_of(StudentSettings(channels=(8, 40, 16))).decoder == (40, 20)
