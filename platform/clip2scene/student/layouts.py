"""Widths and depths of the published networks, and of smaller SPVCNNs given by ``student.channels``.

Parameters are counted without a classifier and with 4 input columns.

- MinkUNet14A, 18A and 34C: Choy, Gwak and Savarese, CVPR 2019, in the layout of MinkowskiEngine's
  ``examples/minkunet.py``. A stem of one 5 x 5 x 5 convolution to 32 channels at full resolution; four convolutions of
  kernel and stride 2 that keep the width, each before residual blocks of 32, 64, 128, 256 channels; four transposed
  convolutions of kernel 2, each concatenated with the skip connection and followed by residual blocks. A and C name the
  decoder's widths: A (128, 128, 96, 96) is the smallest variant of 14 and 18; C (256, 128, 96, 96) is the variant of 34
  that the paper and most later ones use for ScanNet. They have 8,026,560, 15,495,232 and 37,858,112 parameters; others
  report 37.9 M for the last.
- SPVCNN: Tang et al., ECCV 2020, in the layout of ``spvnas``: the voxel side has the encoder of MinkUNet18 behind a
  stem of two 3 x 3 x 3 convolutions and the decoder widths of 34C; points and voxels are fused at the stem, the
  bottleneck, the middle of the decoder and the end. It has 21,775,872 parameters; the paper reports 21.8 M. Of these,
  192 are the layer on the points' own inputs, which is ours; the 480 biases of its point layers, which batch norm
  cancels, are left out. (The authors' released network concatenates the features of all three later fusions, 480 wide;
  ours passes on those of the last one, 96 wide, as published. And its last skip connection carries the stem's output
  before the first fusion, ours that after it.)
"""

from __future__ import annotations

from dataclasses import dataclass

from clip2scene.config import StudentSettings


@dataclass(frozen=True)
class Layout:
    """A sparse U-Net with one encoder level and one decoder level per halving of the resolution."""

    stem: tuple[tuple[int, int], ...]
    """(Kernel size, width) of the convolutions at full resolution."""
    encoder: tuple[int, ...]
    """Widths of the levels, from the first halving down."""
    encoder_blocks: tuple[int, ...]
    """Residual blocks per encoder level."""
    decoder: tuple[int, ...]
    """Widths of the levels, from the bottleneck up; the last is the width of the network's output."""
    decoder_blocks: tuple[int, ...]
    """Residual blocks per decoder level."""
    fusions: tuple[int, ...] = ()
    """After how many decoder levels points and voxels are fused; empty if there is no point branch."""
    widen_with_stride: bool = False
    """Whether the strided convolution changes to the level's width, instead of the first residual block."""
    norm_on_skip: bool = True
    """Whether batch norm follows the 1 x 1 x 1 convolution on the skip connection of a residual block."""

    @property
    def levels(self) -> int:
        """How often the resolution is halved."""
        return len(self.encoder)


def _minkunet(encoder_blocks: int | tuple[int, ...], decoder_blocks: int, decoder: tuple[int, ...]) -> Layout:
    blocks = (encoder_blocks,) * 4 if isinstance(encoder_blocks, int) else encoder_blocks
    return Layout(((5, 32),), (32, 64, 128, 256), blocks, decoder, (decoder_blocks,) * 4)


PUBLISHED = {
    "minkunet14": _minkunet(1, 1, (128, 128, 96, 96)),
    "minkunet18": _minkunet(2, 2, (128, 128, 96, 96)),
    "minkunet34": _minkunet((2, 3, 4, 6), 2, (256, 128, 96, 96)),
    "spvcnn": Layout(((3, 32), (3, 32)), (32, 64, 128, 256), (2,) * 4, (256, 128, 96, 96), (2,) * 4, fusions=(0, 2, 4)),
}
"""By ``student.architecture``."""


def layout_of(settings: StudentSettings) -> Layout:
    """The published layout of ``settings.architecture``, or a smaller SPVCNN of ``settings.channels``.

    The smaller one has one residual block per level. A decoder level has the width of the encoder level at the same
    resolution, but at least half the width of the first encoder level.
    """
    if settings.channels is None:
        return PUBLISHED[settings.architecture]
    stem, *encoder = settings.channels
    decoder = [max(width, encoder[0] // 2) for width in (stem, *encoder[:-1])]
    ones = (1,) * len(encoder)
    return Layout(
        ((3, stem), (3, stem)),
        tuple(encoder),
        ones,
        tuple(reversed(decoder)),
        ones,
        fusions=(0, len(encoder)),
        widen_with_stride=True,
        norm_on_skip=False,
    )
