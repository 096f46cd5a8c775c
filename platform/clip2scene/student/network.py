"""SPVCNN-like sparse U-Net: voxels for context, a point-wise branch for detail (Tang et al., ECCV 2020; CLIP2Scene).

Layout for ``channels = (c0, c1, ..., cL)``: a stem of two submanifold convolutions at full resolution (c0); L encoder
levels, each a strided convolution that halves the resolution and ``blocks_per_level`` residual blocks (c1 ... cL); L
decoder levels that go back with inverse convolutions and skip connections (width of the level they reach, at least
c1/2). The point branch carries features of every single point around the voxel network: it is added at the stem, the
bottleneck and the output. Voxel features reach points by the voxel that holds them (nearest, not trilinear).

Legend: N points, V voxels, F backbone width, D width of the teacher's space, C classes.
"""

from __future__ import annotations

import gc
import warnings

import torch
from torch import nn

with warnings.catch_warnings():
    # spconv 2.3 uses torch.cuda.amp's old names; nothing here can change that.
    warnings.simplefilter("ignore", FutureWarning)
    # Its import describes every CUDA kernel in Python objects: 4.5 s with the garbage collector running, 2.1 s without.
    gc.disable()
    try:
        import spconv.pytorch as spconv
        from spconv.core import ConvAlgo
    finally:
        gc.enable()

from clip2scene.config import StudentSettings
from clip2scene.student.voxels import Voxels, mean_of_points, rows_of_points, voxelise


class Student(nn.Module):
    """Backbone with heads chosen by what it is trained for.

    Pre-training has two linear heads into the teacher's space, one for SCR (which also predicts) and one for StCR: the
    paper's losses work only on two different learnable heads. Fine-tuning has one linear classifier.
    """

    def __init__(self, settings: StudentSettings, *, embedding_dim: int | None = None, num_classes: int | None = None):
        super().__init__()
        self.settings = settings
        self.backbone = SparseUNet(settings)
        heads: dict[str, nn.Module] = {}
        if embedding_dim is not None:
            heads["scr"] = nn.Linear(self.backbone.width, embedding_dim)
            heads["stcr"] = nn.Linear(self.backbone.width, embedding_dim)
        if num_classes is not None:
            heads["classifier"] = nn.Linear(self.backbone.width, num_classes)
        self.heads = nn.ModuleDict(heads)

    def forward(self, points_N4: torch.Tensor, cloud_N: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features of every input point for every head.

        Args:
            points_N4: x, y, z in metres and intensity in [0, 1], all clouds of the batch one after another.
            cloud_N: (N,) int64, the cloud of each point.

        Returns:
            ``{head: (N, D or C)}``.
        """
        features_NF = self.backbone(points_N4, cloud_N)
        return {name: head(features_NF) for name, head in self.heads.items()}


class SparseUNet(nn.Module):
    """Point features from a sparse U-Net with a point branch: (N, 4) to (N, F)."""

    def __init__(self, settings: StudentSettings):
        super().__init__()
        self.settings = settings
        widths = settings.channels
        inputs = 4 if settings.use_intensity else 3
        self.levels = len(widths) - 1
        self.stem = nn.ModuleList(
            [_Submanifold(inputs, widths[0], "level0"), _Submanifold(widths[0], widths[0], "level0")]
        )
        self.encoders = nn.ModuleList(
            _Encoder(widths[i], widths[i + 1], i, settings.blocks_per_level) for i in range(self.levels)
        )
        up_widths = [max(widths[i], widths[1] // 2) for i in range(self.levels)] + [widths[-1]]
        self.decoders = nn.ModuleList(
            _Decoder(up_widths[i + 1], widths[i], up_widths[i], i, settings.blocks_per_level)
            for i in reversed(range(self.levels))
        )
        self.width = up_widths[0]
        if settings.point_branch:
            self.point_stem = _PointLayer(inputs, widths[0])
            self.point_bottleneck = _PointLayer(widths[0], widths[-1])
            self.point_output = _PointLayer(widths[-1], self.width)

    def forward(self, points_N4: torch.Tensor, cloud_N: torch.Tensor) -> torch.Tensor:
        """Features of every point, (N, F); see :class:`Student`."""
        settings = self.settings
        voxels = voxelise(points_N4[:, :3], cloud_N, settings.voxel_size_m, 2**self.levels)
        inputs_N = self._inputs(points_N4, voxels)
        x = self._sparse(mean_of_points(inputs_N, voxels.voxel_of_point_N, len(voxels.coordinates_V4)), voxels, cloud_N)
        for layer in self.stem:
            x = layer(x)
        rows_N = voxels.voxel_of_point_N
        if settings.point_branch:
            point_N = self.point_stem(inputs_N) + x.features[rows_N]
            x = x.replace_feature(mean_of_points(point_N, rows_N, len(x.features)))
        skips = []
        for encoder in self.encoders:
            skips.append(x)
            x = encoder(x)
        if settings.point_branch:
            bottom_N = rows_of_points(voxels, x.indices, 2**self.levels)
            point_N = self.point_bottleneck(point_N) + x.features[bottom_N]
            x = x.replace_feature(mean_of_points(point_N, bottom_N, len(x.features)))
        for decoder, skip in zip(self.decoders, reversed(skips), strict=True):
            x = decoder(x, skip)
        features_NF = x.features[rows_N]
        return features_NF + self.point_output(point_N) if settings.point_branch else features_NF

    def _inputs(self, points_N4: torch.Tensor, voxels: Voxels) -> torch.Tensor:
        """x and y from the voxel's centre (voxels), height above the sensor (metres), intensity: (N, 3 or 4)."""
        size = self.settings.voxel_size_m
        offset_N3 = points_N4[:, :3] / size - torch.floor(points_N4[:, :3] / size) - 0.5
        # Height says a lot about a street's classes; x and y would only say where the sensor stood.
        columns = [offset_N3[:, :2], points_N4[:, 2:3]]
        if self.settings.use_intensity:
            columns.append(points_N4[:, 3:4])
        return torch.cat(columns, dim=1)

    def _sparse(self, features_V: torch.Tensor, voxels: Voxels, cloud_N: torch.Tensor) -> spconv.SparseConvTensor:
        return spconv.SparseConvTensor(features_V, voxels.coordinates_V4, list(voxels.shape), int(cloud_N.max()) + 1)


class _Submanifold(nn.Module):
    """3 x 3 x 3 submanifold convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, key: str):
        super().__init__()
        self.convolution = spconv.SubMConv3d(inputs, outputs, 3, padding=1, bias=False, indice_key=key, algo=_ALGORITHM)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.convolution(x)
        return x.replace_feature(torch.relu(self.norm(x.features)))


class _Residual(nn.Module):
    """Two submanifold convolutions with a skip connection (projected where the width changes)."""

    def __init__(self, inputs: int, outputs: int, key: str):
        super().__init__()
        self.first = _Submanifold(inputs, outputs, key)
        self.second = spconv.SubMConv3d(outputs, outputs, 3, padding=1, bias=False, indice_key=key, algo=_ALGORITHM)
        self.norm = nn.BatchNorm1d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        y = self.second(self.first(x))
        return y.replace_feature(torch.relu(self.norm(y.features) + self.skip(x.features)))


class _Encoder(nn.Module):
    """Halve the resolution, then residual blocks."""

    def __init__(self, inputs: int, outputs: int, level: int, blocks: int):
        super().__init__()
        self.down = spconv.SparseConv3d(
            inputs, outputs, 2, stride=2, bias=False, indice_key=f"down{level}", algo=_ALGORITHM
        )
        self.norm = nn.BatchNorm1d(outputs)
        self.blocks = nn.ModuleList(_Residual(outputs, outputs, f"level{level + 1}") for _ in range(blocks))

    def forward(self, x: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.down(x)
        x = x.replace_feature(torch.relu(self.norm(x.features)))
        for block in self.blocks:
            x = block(x)
        return x


class _Decoder(nn.Module):
    """Back to the resolution of ``skip``, joined with it, then residual blocks."""

    def __init__(self, inputs: int, skip: int, outputs: int, level: int, blocks: int):
        super().__init__()
        self.up = spconv.SparseInverseConv3d(inputs, outputs, 2, bias=False, indice_key=f"down{level}", algo=_ALGORITHM)
        self.norm = nn.BatchNorm1d(outputs)
        widths = [outputs + skip] + [outputs] * blocks
        self.blocks = nn.ModuleList(_Residual(widths[i], outputs, f"level{level}") for i in range(blocks))

    def forward(self, x: spconv.SparseConvTensor, skip: spconv.SparseConvTensor) -> spconv.SparseConvTensor:
        x = self.up(x)
        x = x.replace_feature(torch.cat((torch.relu(self.norm(x.features)), skip.features), dim=1))
        for block in self.blocks:
            x = block(x)
        return x


class _PointLayer(nn.Sequential):
    """Linear, batch norm, ReLU on single points."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


# The other algorithms are CUDA only; weights have the same layout for all, so one checkpoint serves both.
_ALGORITHM = ConvAlgo.Native
