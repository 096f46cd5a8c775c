"""What a dataset's files contain, by a sample of them.

A copy with relabelled or corrupted clouds has the names, sizes and poses of its original, and must not get the
original's features, students and scores. Reading all of nuScenes would take an hour; a sample of every kind takes a
second, and changes as soon as a file in it does. A copy in which only a few files differ may pass for the original.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from clip2scene.data.index import Contents, Frame, Index, sampled
from clip2scene.errors import DataError, one_line


def sample_contents(index: Index) -> Contents:
    """Hash the files of 64 keyframes, spread evenly: the cloud, one sweep, one image, its depth map and the labels.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    hashes = {kind: hashlib.sha256() for kind in ("images", "clouds", "labels")}
    stats: list[tuple[str, int, int]] = []
    for number, frame in enumerate(sampled(index.frames)):
        for kind, relative in _files(frame, number):
            path = index.root.path_of(relative)
            try:
                contents, stat = path.read_bytes(), path.stat()
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({one_line(error)})") from error
            hashes[kind].update(len(contents).to_bytes(8, "little") + contents)
            stats.append((relative, stat.st_size, stat.st_mtime_ns))
    images, clouds, labels = (hashed.hexdigest()[:16] for hashed in hashes.values())
    return Contents(images, clouds, labels, tuple(stats))


def are_current(index: Index) -> bool:
    """Whether the files below the index's root still contain what they did when it was built.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    if index.contents is None:
        return False
    found = [_stat(index.root.path / relative) for relative, _, _ in index.contents.files]
    if found == [(size, time) for _, size, time in index.contents.files]:
        return True
    # Copied files have other times, and the same contents.
    return sample_contents(index).hashes == index.contents.hashes


def _files(frame: Frame, number: int) -> list[tuple[str, str]]:
    """Files of one keyframe to read, with their kinds; its number chooses among its sweeps and images."""
    files = [("clouds", frame.cloud_path)]
    if frame.sweeps:
        files.append(("clouds", frame.sweeps[number % len(frame.sweeps)].path))
    if frame.cameras:
        camera = frame.cameras[number % len(frame.cameras)]
        files.append(("images", camera.image_path))
        if camera.depth_path is not None:
            files.append(("clouds", camera.depth_path))
    if frame.label_path is not None:
        files.append(("labels", frame.label_path))
    return files


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
