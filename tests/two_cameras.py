"""A dataset of random images that a tiny CLIP reads, for tests of extraction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip2scene.config import TeacherSettings
from clip2scene.data.dataroot import DataRoot
from clip2scene.data.index import Camera, Frame, Index

WIDTH, HEIGHT = 96, 64


def make_index(root: Path, num_frames: int) -> Index:
    """Frames of two cameras with random JPEGs, and no clouds: extraction reads none."""
    root.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    frames = []
    for number in range(num_frames):
        cameras = []
        for name in ("CAM_LEFT", "CAM_RIGHT"):
            coarse = generator.integers(0, 256, (4, 6, 3), dtype=np.uint8)
            file = root / f"{name}-{number}.jpg"
            Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(file)
            cameras.append(Camera(name, file.name, WIDTH, HEIGHT, np.eye(3), np.eye(4), number))
        frames.append(Frame(f"frame-{number}", "scene", number, "none", np.eye(4), (), tuple(cameras), None))
    return Index("nuscenes", DataRoot.at(root), "v1.0-test", tuple(frames))


def teacher_settings(folder: Path, **changes: Any) -> TeacherSettings:
    return TeacherSettings(model=f"local-dir:{folder}", image_height_px=64, image_width_px=96, **changes)
