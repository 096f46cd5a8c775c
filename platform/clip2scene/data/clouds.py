"""Reads the sensor files that an index names. Workers use this; no devkit is needed.

A file is read whole and checked, or refused in one sentence: nothing damaged goes on silently.
Shapes: N points, H x W pixels.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from clip2scene.data.index import DataError
from clip2scene.data.vocabulary import Vocabulary

_POINT_BYTES = 20
_POINT_COLUMNS = 5


def resolve(root: Path, relative: str) -> Path:
    """The file that an index names, refused where it lies outside the dataset's root (also through a link).

    Args:
        root: the dataset's folder.
        relative: POSIX path below it, from the dataset's tables.

    Raises:
        DataError: the path is empty, absolute, climbs with ``..`` or follows a link out of the root.
    """
    check_relative(relative, "the index")
    path = inside(root, relative)
    if path is None:
        raise DataError(
            f"the index: path {relative!r} leaves the dataset's root through a link; allowed: files in {root}"
        )
    return path


def inside(root: Path, relative: str) -> Path | None:
    """The file with every link followed, or None where that is not below the root."""
    # os.path.realpath, as Path.resolve raises on a loop of links.
    path = Path(os.path.realpath(root / relative))
    return path if path.is_relative_to(os.path.realpath(root)) else None


def check_relative(path: object, source: str) -> str:
    """The path, if its text alone stays below the root that it is relative to.

    Args:
        path: what a table gives as a path.
        source: the table, for the message.

    Raises:
        DataError: not a text, empty, absolute, or with ``..`` in it.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{source}: {path!r} is not a path of a file; allowed: a relative path with forward slashes")
    if path.startswith("/") or (".." in path and ".." in path.split("/")):
        raise DataError(f"{source}: path {path!r} leaves the dataset's root; allowed: paths below it, relative to it")
    return path


def read_cloud(path: Path) -> np.ndarray:
    """Read a nuScenes ``.pcd.bin`` cloud: float32 x, y, z (metres, sensor frame), intensity (0 to 255) and ring.

    Returns:
        (N, 5) float32.

    Raises:
        DataError: missing, truncated (its size is no multiple of 20 bytes), empty, or with values that are not finite.
    """
    data = _read_bytes(path, "point cloud")
    if len(data) % _POINT_BYTES:
        raise DataError(
            f"{path}: truncated point cloud: {len(data)} bytes is not a multiple of {_POINT_BYTES} (5 float32 a point)"
        )
    if not data:
        raise DataError(f"{path}: empty point cloud; at least one point of {_POINT_BYTES} bytes is needed")
    cloud_N5 = np.frombuffer(data, dtype="<f4").reshape(-1, _POINT_COLUMNS).astype(np.float32)
    if not np.isfinite(cloud_N5).all():
        row = int(np.flatnonzero(~np.isfinite(cloud_N5).all(axis=1))[0])
        raise DataError(f"{path}: point {row} of {len(cloud_N5)} is not finite ({cloud_N5[row].tolist()})")
    return cloud_N5


def read_labels(path: Path, num_points: int, vocabulary: Vocabulary) -> np.ndarray:
    """Read a lidarseg label file (one byte a point) as labels of the vocabulary.

    Returns:
        (N,) uint8 labels in [0, C]; 0 is ignored.

    Raises:
        DataError: missing, not one label per point, or with a class that the vocabulary does not know.
    """
    raw_N = np.frombuffer(_read_bytes(path, "label file"), dtype=np.uint8)
    if len(raw_N) != num_points:
        raise DataError(
            f"{path}: {len(raw_N)} labels for a cloud of {num_points} points; exactly one a point is allowed"
        )
    return vocabulary.labels(raw_N, str(path))


def read_image(path: Path, width: int, height: int) -> np.ndarray:
    """Read and fully decode an image.

    Args:
        path: a JPEG (or any format that Pillow reads).
        width: expected width, pixels, from the index.
        height: expected height, pixels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        DataError: missing, truncated, no image, or of another size.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            # The header gives the size: an image of the wrong one is never decoded.
            pixels_HW3 = np.array(image.convert("RGB")) if size == (width, height) else None
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing image") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: truncated or damaged image ({' '.join(str(error).split())})") from error
    if pixels_HW3 is None:
        raise DataError(f"{path}: the image has {size[0]} x {size[1]} pixels, the index says {width} x {height}")
    return pixels_HW3


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing {what}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the {what} ({error.strerror})") from error
