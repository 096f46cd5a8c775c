"""Sparse U-Nets: voxels for context and, in SPVCNN, a point-wise branch for detail.

:mod:`clip2scene.student.layouts` lists the layouts (widths, depths, sources). Common to all: a stem at full resolution;
encoder levels, each a strided convolution that halves the resolution and residual blocks; decoder levels that go back
with inverse convolutions and skip connections. Batch norm and ReLU follow every convolution.

The point branch carries features of every single point around the voxel network. At a fusion, points add their voxel's
feature, and voxels then take the mean of their points. A point takes the feature of the voxel that holds it, where the
published SPVCNN interpolates between eight; so that points of one voxel still differ, our branch starts with a layer on
the points' own inputs, which the published one does not have. Dropout is left out, as in the code that CLIP2Scene's
authors released (Tang et al. have 0.3 before the first and third decoder level).

Legend: N points, I values per point, V voxels, F backbone width, D width of the teacher's space, C classes.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from clip2scene.config import StudentSettings
from clip2scene.errors import ConfigError
from clip2scene.machine import has_nvidia_driver
from clip2scene.segments import segment_mean
from clip2scene.student.layouts import Layout, layout_of
from clip2scene.student.voxels import Voxels, rows_of_points, voxelise

with warnings.catch_warnings():
    # spconv 2.3 uses torch.cuda.amp's old names; nothing here can change that.
    warnings.simplefilter("ignore", FutureWarning)
    from spconv import core as spconv_core

    # Importing the rest describes each CUDA kernel of these lists in Python objects: seconds, half of them for gc.
    if not has_nvidia_driver():
        spconv_core.ALL_IMPGEMM_PARAMS.clear()
        spconv_core.ALL_NATIVE_PARAMS.clear()
    gc.disable()
    try:
        import spconv.pytorch as spconv
    finally:
        gc.enable()

# With its first tensor spconv calls a torch.fx function by a deprecated name, which torch logs.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

_CELLS_ON_CPU = 2**32
"""spconv 2.3's CPU hash has 32-bit keys: a cell beyond this has the key of another cloud's cell."""
# The other algorithms need CUDA; weights have the same layout for all, so one checkpoint works on both.
_ALGORITHM = spconv_core.ConvAlgo.Native

Forward = Callable[..., dict[str, torch.Tensor]]
"""What a loss calls: :meth:`Student.forward`, possibly wrapped."""


class Student(nn.Module):
    """A backbone, with the heads of its training.

    Pre-training has two linear heads into the teacher's space, one for SCR (which also predicts) and one for StCR, as
    the paper's losses work only on two different learnable heads; methods with one loss have only the head ``scr``.
    Fine-tuning has one linear classifier.
    """

    def __init__(
        self,
        settings: StudentSettings,
        *,
        embedding_dim: int | None = None,
        heads: tuple[Literal["scr", "stcr"], ...] = ("scr", "stcr"),
        num_classes: int | None = None,
    ):
        super().__init__()
        self.settings = settings
        self.backbone = SparseUNet(settings)
        self.heads = nn.ModuleDict()
        if embedding_dim is not None:
            for name in heads:
                self.heads[name] = nn.Linear(self.backbone.width, embedding_dim)
        if num_classes is not None:
            self.heads["classifier"] = nn.Linear(self.backbone.width, num_classes)
        self._backbone_is_frozen = False

    def freeze_backbone(self) -> None:
        """From now on only the heads learn; the backbone stays in eval mode, which keeps its batch norm statistics."""
        self._backbone_is_frozen = True
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Student:
        """As in torch, but for a frozen backbone."""
        super().train(mode)
        if self._backbone_is_frozen:
            self.backbone.eval()
        return self

    def forward(
        self, points_NI: torch.Tensor, cloud_N: torch.Tensor, rows_P: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Features of the input points for every head.

        Args:
            points_NI: x, y, z in metres and, in [0, 1], the intensity and (I = 7) red, green and blue, with the clouds
                of the batch one after another.
            cloud_N: (N,) int64, the cloud of each point.
            rows_P: (P,) int64, the points to return (those with a pixel, say), in any order, also repeatedly; all
                points if not given.

        Returns:
            ``{head: (N or P, D or C)}``.
        """
        features_NF = self.backbone(points_NI, cloud_N)
        if rows_P is not None:
            features_NF = _rows(features_NF, rows_P)
        return {name: head(features_NF) for name, head in self.heads.items()}


class SparseUNet(nn.Module):
    """Point features from a sparse U-Net, with a point branch or without: (N, I) to (N, F)."""

    def __init__(self, settings: StudentSettings):
        super().__init__()
        self.settings = settings
        self.layout = layout = layout_of(settings)
        inputs = 3 * settings.use_position + settings.use_intensity + 3 * settings.use_colour
        stem_widths = [inputs] + [width for _, width in layout.stem]
        self.stem = nn.ModuleList(
            _Submanifold(stem_widths[i], width, "level0" if kernel == 3 else "stem", kernel)
            for i, (kernel, width) in enumerate(layout.stem)
        )
        # The encoder levels' input widths are also those of the skip connections.
        skips = [stem_widths[-1], *layout.encoder[:-1]]
        self.encoders = nn.ModuleList(_Encoder(skips[i], i, layout) for i in range(layout.levels))
        decoder_inputs = [layout.encoder[-1], *layout.decoder[:-1]]
        self.decoders = nn.ModuleList(
            _Decoder(decoder_inputs[i], skips[-1 - i], i, layout) for i in range(layout.levels)
        )
        self.width = layout.decoder[-1]
        if layout.fusions:
            self.point_stem = _PointLayer(inputs, stem_widths[-1])
            point_width = stem_widths[-1]
            for level in layout.fusions:
                width = decoder_inputs[level] if level < layout.levels else self.width
                self.add_module(self._point_layer(level), _PointLayer(point_width, width))
                point_width = width

    def forward(self, points_NI: torch.Tensor, cloud_N: torch.Tensor) -> torch.Tensor:
        """Features of every point, (N, F); see :class:`Student`."""
        layout = self.layout
        voxels = voxelise(points_NI[:, :3], cloud_N, self.settings.voxel_size_m, 2**layout.levels)
        rows_N = voxels.voxel_of_point_N
        inputs_N = self._inputs(points_NI)
        x = self._sparse(segment_mean(inputs_N, rows_N, len(voxels.coordinates_V4)), voxels)
        for layer in self.stem:
            x = layer(x)
        point_N = inputs_N
        if layout.fusions:
            point_N = self.point_stem(inputs_N) + _rows(x.features, rows_N)
            x = x.replace_feature(segment_mean(point_N, rows_N, len(x.features)))
        skips = []
        for encoder in self.encoders:
            skips.append(x)
            x = encoder(x)
        for i, (decoder, skip) in enumerate(zip(self.decoders, reversed(skips), strict=True)):
            if i in layout.fusions:
                rows_here_N = rows_of_points(voxels, x.indices, 2 ** (layout.levels - i))
                point_N = self.get_submodule(self._point_layer(i))(point_N) + _rows(x.features, rows_here_N)
                x = x.replace_feature(segment_mean(point_N, rows_here_N, len(x.features)))
            x = decoder(x, skip)
        features_NF = _rows(x.features, rows_N)
        if layout.fusions:
            features_NF = features_NF + self.get_submodule(self._point_layer(layout.levels))(point_N)
        return features_NF

    def _point_layer(self, level: int) -> str:
        """Name of the layer on the points before their fusion with the voxels, after that many decoder levels."""
        return {0: "point_bottleneck", self.layout.levels: "point_output"}.get(level, f"point_decoder{level}")

    def _inputs(self, points_NI: torch.Tensor) -> torch.Tensor:
        """x and y from the voxel's centre (voxels), height above the sensor (metres), intensity, red, green and blue,
        as far as the settings want them: (N, 1 to 7).
        """
        columns = []
        if self.settings.use_position:
            size = self.settings.voxel_size_m
            offset_N2 = points_NI[:, :2] / size - torch.floor(points_NI[:, :2] / size) - 0.5
            # Height tells much about a street's classes; x and y would only tell where the sensor stood.
            columns = [offset_N2, points_NI[:, 2:3]]
        if self.settings.use_intensity:
            columns.append(points_NI[:, 3:4])
        if self.settings.use_colour:
            columns.append(points_NI[:, 4:7])
        return torch.cat(columns, dim=1)

    def _sparse(self, features_V: torch.Tensor, voxels: Voxels) -> spconv.SparseConvTensor:
        if features_V.device.type == "cpu" and math.prod(voxels.shape) * voxels.num_clouds > _CELLS_ON_CPU:
            raise ConfigError(
                f"student.voxel_size_m={self.settings.voxel_size_m:g}: on a CPU spconv confuses the voxels of "
                f"{voxels.num_clouds} clouds of {' x '.join(map(str, voxels.shape))} cells (at most 2^32 in all are "
                "allowed); lower batch_size or distill.num_sweeps, take larger voxels, or train on GPUs"
            )
        return spconv.SparseConvTensor(features_V, voxels.coordinates_V4, list(voxels.shape), voxels.num_clouds)


class _Submanifold(nn.Module):
    """Submanifold convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, key: str, kernel: int = 3):
        super().__init__()
        self.convolution = spconv.SubMConv3d(
            inputs, outputs, kernel, padding=kernel // 2, bias=False, indice_key=key, algo=_ALGORITHM
        )
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.convolution(x)
        return x.replace_feature(self.norm(x.features).relu_())


class _Residual(nn.Module):
    """Two submanifold convolutions with a skip connection (projected where the width changes)."""

    def __init__(self, inputs: int, outputs: int, key: str, norm_on_skip: bool):
        super().__init__()
        self.first = _Submanifold(inputs, outputs, key)
        self.second = spconv.SubMConv3d(outputs, outputs, 3, padding=1, bias=False, indice_key=key, algo=_ALGORITHM)
        self.norm = nn.BatchNorm1d(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            linear = nn.Linear(inputs, outputs, bias=False)
            self.skip = nn.Sequential(linear, nn.BatchNorm1d(outputs)) if norm_on_skip else linear

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        y = self.second(self.first(x))
        return y.replace_feature(self.norm(y.features).add_(self.skip(x.features)).relu_())


class _Encoder(nn.Module):
    """Halve the resolution, then residual blocks."""

    def __init__(self, inputs: int, index: int, layout: Layout):
        super().__init__()
        outputs = layout.encoder[index]
        strided = outputs if layout.widen_with_stride else inputs
        self.down = spconv.SparseConv3d(
            inputs, strided, 2, stride=2, bias=False, indice_key=f"down{index}", algo=_ALGORITHM
        )
        self.norm = nn.BatchNorm1d(strided)
        self.blocks = _blocks(strided, outputs, layout.encoder_blocks[index], f"level{index + 1}", layout)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.down(x)
        x = x.replace_feature(self.norm(x.features).relu_())
        for block in self.blocks:
            x = block(x)
        return x


class _Decoder(nn.Module):
    """Double the resolution, concatenate ``skip``, then residual blocks."""

    def __init__(self, inputs: int, skip: int, index: int, layout: Layout):
        super().__init__()
        outputs, level = layout.decoder[index], layout.levels - 1 - index
        self.up = spconv.SparseInverseConv3d(inputs, outputs, 2, bias=False, indice_key=f"down{level}", algo=_ALGORITHM)
        self.norm = nn.BatchNorm1d(outputs)
        self.blocks = _blocks(outputs + skip, outputs, layout.decoder_blocks[index], f"level{level}", layout)

    def forward(self, x: spconv.SparseConvTensor, skip: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.up(x)
        x = x.replace_feature(torch.cat((self.norm(x.features).relu_(), skip.features), dim=1))
        for block in self.blocks:
            x = block(x)
        return x


def _rows(features_VF: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """``features_VF[rows_N]``, (N, F)."""
    # Gradients of a voxel's points are summed in fp32: in fp16 the small ones of a coarse voxel's many would vanish.
    return features_VF.float().index_select(0, rows_N).to(features_VF.dtype)


def _blocks(inputs: int, outputs: int, count: int, key: str, layout: Layout) -> nn.ModuleList:
    widths = [inputs] + [outputs] * count
    return nn.ModuleList(_Residual(widths[i], outputs, key, layout.norm_on_skip) for i in range(count))


class _PointLayer(nn.Sequential):
    """Linear, batch norm, ReLU on single points."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True))
