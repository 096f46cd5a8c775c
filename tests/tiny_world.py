"""The settings of the street world that most tests share; its images are small, as they take most of its time."""

from __future__ import annotations

TINY_WORLD = {
    "train_scenes": 2,
    "val_scenes": 2,
    "keyframes_per_scene": 2,
    "sweeps_between_keyframes": 3,
    "lidar_azimuth_steps": 240,
    "image_width_px": 208,
    "image_height_px": 112,
}
