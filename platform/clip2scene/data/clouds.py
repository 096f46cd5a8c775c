"""Reads the sensor files that an index names. Workers use this; no devkit is needed.

A file's suffix tells its format. Every file is checked, and a damaged one is refused in one sentence.

Legend: N points, I values per point, H x W pixels.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from clip2scene.data import ply
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Frame
from clip2scene.data.vocabulary import Vocabulary
from clip2scene.errors import DataError, one_line

_COLUMNS = {".pcd.bin": 5, ".bin": 4}
"""float32 values per point: nuScenes x, y, z, intensity (0 to 255) and ring; SemanticKITTI x, y, z and intensity (0 to
1). The longer suffix must come first."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a file that is damaged or not an image."""


def read_cloud(path: Path) -> np.ndarray:
    """Read a point cloud: nuScenes' ``.pcd.bin``, SemanticKITTI's ``.bin`` or ScanNet's mesh ``.ply``.

    Returns:
        (N, 4) float32: x, y, z (metres, sensor frame) and the intensity in [0, 1]. Of a mesh (N, 7): the luminance of
        its colour for the intensity, then red, green and blue in [0, 1].

    Raises:
        DataError: the file is missing, truncated (its size is not a multiple of a point's), empty, of another suffix, a
            file of labels, or has values that are not finite.
    """
    if path.suffix == ".ply" and any(name.endswith(".labels.ply") for name in (path.name, os.path.realpath(path))):
        raise DataError(f"{path}: a file of labels (its colours are the labels), which is never read as a point cloud")
    if path.suffix == ".ply":
        return ply.points(_read_bytes(path, "point cloud"), str(path))
    suffix = next((suffix for suffix in _COLUMNS if path.name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{path}: its name is not a point cloud's; allowed: {', '.join((*_COLUMNS, '.ply'))}")
    cloud_NK = _read_floats(path, _COLUMNS[suffix])
    cloud_NI = cloud_NK[:, :4].copy()
    if suffix == ".pcd.bin":
        cloud_NI[:, 3] /= 255
    return cloud_NI


def _read_floats(path: Path, columns: int) -> np.ndarray:
    """(N, columns) float32 of a file of points, which must be finite and at least one."""
    data = _read_bytes(path, "point cloud")
    size = 4 * columns
    if len(data) % size:
        raise DataError(
            f"{path}: truncated point cloud: {len(data)} bytes is not a multiple of {size} ({columns} float32 each)"
        )
    if not data:
        raise DataError(f"{path}: empty point cloud; at least one point of {size} bytes is needed")
    cloud_NK = np.frombuffer(data, dtype="<f4").reshape(-1, columns)
    if not np.isfinite(cloud_NK).all():
        row = int(np.flatnonzero(~np.isfinite(cloud_NK).all(axis=1))[0])
        raise DataError(f"{path}: point {row} of {len(cloud_NK)} is not finite ({cloud_NK[row].tolist()})")
    return cloud_NK


def read_labels(path: Path, num_points: int, vocabulary: Vocabulary) -> np.ndarray:
    """Read a label file as labels of the vocabulary.

    Formats: nuScenes-lidarseg's ``.bin`` (one byte per point), SemanticKITTI's ``.label`` (one uint32 per point: the
    class in its lower 16 bits, the instance in the upper ones) and ScanNet's ``.labels.ply`` (one nyu40 id per vertex).

    Returns:
        (N,) uint8 labels in [0, C]; 0 is ignored.

    Raises:
        DataError: the file is missing, has not one label per point, or has a class that the vocabulary does not know.
        ConfigError: the vocabulary is for prompts only.
    """
    raw_N = _read_label_ids(path)
    if len(raw_N) != num_points:
        raise DataError(
            f"{path}: {len(raw_N)} labels for a cloud of {num_points} points; exactly one per point is allowed"
        )
    return vocabulary.labels(raw_N, str(path))


def _read_label_ids(path: Path) -> np.ndarray:
    """(N,) raw class ids, integers from 0."""
    data = _read_bytes(path, "label file")
    if path.suffix == ".ply":
        return ply.labels(data, str(path))
    if path.suffix != ".label":
        return np.frombuffer(data, dtype=np.uint8)
    if len(data) % 4:
        raise DataError(
            f"{path}: truncated label file: {len(data)} bytes is not a multiple of 4 (one uint32 per point)"
        )
    return np.frombuffer(data, dtype="<u4") & 0xFFFF


def image_size(path: Path, format_: str | None = None) -> tuple[int, int]:
    """Width and height (pixels) from an image's header.

    Raises:
        DataError: the file is missing, damaged, or not of the ``format_``, where one is given (``PNG``).
    """
    try:
        with Image.open(path, formats=None if format_ is None else (format_,)) as image:
            return image.size
    except _UNREADABLE as error:
        raise DataError(f"{path}: truncated or damaged image ({one_line(error)})") from error


def read_image(path: Path, width: int, height: int) -> np.ndarray:
    """Read and fully decode an image.

    Args:
        path: a JPEG, or any format that Pillow reads.
        width: expected width in pixels, from the index.
        height: expected height in pixels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        DataError: the file is missing, truncated, not an image, or an image of another size.
    """
    try:
        with Image.open(path) as image:
            size = image.size
            # The size is in the header, so an image of another size is not decoded.
            pixels_HW3 = np.array(image.convert("RGB")) if size == (width, height) else None
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing image") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: truncated or damaged image ({one_line(error)})") from error
    if pixels_HW3 is None:
        raise DataError(f"{path}: the image has {size[0]} x {size[1]} pixels, the index says {width} x {height}")
    return pixels_HW3


def read_depth(path: Path) -> np.ndarray:
    """Read a depth map as ScanNet exports it: a 16-bit grey PNG of millimetres along the optical axis.

    Returns:
        (h, w) float32 metres; 0 where nothing was measured.

    Raises:
        DataError: the file is missing, truncated, not an image, or not of one 16-bit channel.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            depth_hw = np.asarray(image) if mode.startswith("I") else None
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing depth map") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: truncated or damaged depth map ({one_line(error)})") from error
    if depth_hw is None:
        raise DataError(f"{path}: the depth map has mode {mode}; one channel of 16 bits (millimetres) is needed")
    return depth_hw.astype(np.float32) / 1000


def read_depths(root: DataRoot, frame: Frame) -> tuple[np.ndarray | None, ...] | None:
    """The depth maps of a keyframe, one per camera (None for a camera without); None if no camera has one.

    Raises:
        DataError: a depth map is missing or damaged.
    """
    if all(camera.depth_path is None for camera in frame.cameras):
        return None
    return tuple(
        None if camera.depth_path is None else read_depth(root.path_of(camera.depth_path)) for camera in frame.cameras
    )


def _read_bytes(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing {what}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot read the {what} ({error.strerror})") from error
