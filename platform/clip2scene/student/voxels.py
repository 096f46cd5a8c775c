"""Points to voxels and back, on every level of the network.

Legend: N points of all clouds of a batch, V occupied voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Voxels:
    """Occupied voxels of a batch of clouds."""

    coordinates_V4: torch.Tensor
    """(V, 4) int32: cloud, then x, y, z voxel indices from 0."""
    shape: tuple[int, int, int]
    """Extent of the grid in voxels."""
    num_clouds: int
    voxel_of_point_N: torch.Tensor
    """(N,) int64 row of ``coordinates_V4``."""


def voxelise(coordinates_N3: torch.Tensor, cloud_N: torch.Tensor, voxel_size_m: float, alignment: int) -> Voxels:
    """Assign every point to its voxel.

    Args:
        coordinates_N3: metres.
        cloud_N: (N,) int64, the cloud each point belongs to.
        voxel_size_m: edge of a voxel.
        alignment: the grid's origin is a multiple of this many voxels, so that on every level of the network a point's
            cell does not depend on what else is in the batch.
    """
    cell_N3 = torch.floor(coordinates_N3 / voxel_size_m).long()
    origin_3 = torch.div(cell_N3.amin(0), alignment, rounding_mode="floor") * alignment
    cell_N3 = cell_N3 - origin_3
    size_3 = (torch.div(cell_N3.amax(0), alignment, rounding_mode="floor") + 1) * alignment
    # One copy for all numbers that the host needs, as each copy waits for a GPU.
    *shape, num_clouds = torch.cat((size_3, cloud_N.amax(0, keepdim=True) + 1)).tolist()
    keys_N = _keys(cloud_N, cell_N3, shape)
    keys_V, voxel_of_point_N = torch.unique(keys_N, return_inverse=True)
    coordinates_V4 = torch.stack(
        (
            keys_V // (shape[0] * shape[1] * shape[2]),
            keys_V // (shape[1] * shape[2]) % shape[0],
            keys_V // shape[2] % shape[1],
            keys_V % shape[2],
        ),
        dim=1,
    ).int()
    return Voxels(coordinates_V4, (shape[0], shape[1], shape[2]), num_clouds, voxel_of_point_N)


def rows_of_points(voxels: Voxels, indices_V4: torch.Tensor, stride: int) -> torch.Tensor:
    """Row in a sparse tensor's (V, 4) indices of the voxel of stride ``stride`` that holds each point: (N,) int64."""
    shape = tuple(size // stride for size in voxels.shape)
    fine_V4, coarse_V4 = voxels.coordinates_V4.long(), indices_V4.long()
    sorted_V, order_V = _keys(coarse_V4[:, 0], coarse_V4[:, 1:], shape).sort()
    # Looked up per voxel, not per point: there are fewer, and their keys are nearly sorted.
    rows_V = order_V[torch.searchsorted(sorted_V, _keys(fine_V4[:, 0], fine_V4[:, 1:] // stride, shape))]
    return rows_V[voxels.voxel_of_point_N]


def _keys(cloud_N: torch.Tensor, cell_N3: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return ((cloud_N * shape[0] + cell_N3[:, 0]) * shape[1] + cell_N3[:, 1]) * shape[2] + cell_N3[:, 2]
