"""Checks of poses and cameras that the readers of all datasets share, and the inverse of a pose."""

from __future__ import annotations

import numpy as np

from clip2scene.errors import DataError

_RIGID_TOLERANCE = 1e-3
"""How far R^T R may be from the identity: files with six digits round a rotation, and more is a damaged pose."""


def check_pinhole(intrinsics: np.ndarray, source: str) -> None:
    """Refuse a (3, 3) matrix that is not a pinhole camera's.

    Raises:
        DataError: it is not; ``source`` names the file or record.
    """
    if (
        not np.isfinite(intrinsics).all()
        or min(intrinsics[0, 0], intrinsics[1, 1]) <= 0
        or (intrinsics[2] != (0, 0, 1)).any()
    ):
        raise DataError(
            f"{source} {intrinsics.tolist()} is not a pinhole camera; needed: positive focal lengths, last row 0 0 1"
        )


def is_rotation(matrices: np.ndarray) -> np.ndarray:
    """Whether matrices (..., 3, 3) are rotations up to rounding: (...) bool."""
    error = np.abs(matrices.swapaxes(-1, -2) @ matrices - np.eye(3)).max(axis=(-1, -2))
    return (error <= _RIGID_TOLERANCE) & (np.linalg.det(matrices) > 0)


def inverse(target_from_source: np.ndarray) -> np.ndarray:
    """The (4, 4) transform ``source_from_target``; exact for a rotation, where a general inverse loses digits.

    Example:
        >>> pose = np.eye(4)
        >>> pose[:3, 3] = [1, 2, 3]
        >>> inverse(pose)[:3, 3]
        array([-1., -2., -3.])
    """
    matrix = np.asarray(target_from_source, dtype=np.float64)
    result = np.eye(4)
    result[:3, :3] = matrix[:3, :3].T
    result[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return result
