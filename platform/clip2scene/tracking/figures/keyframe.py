"""Reads a keyframe from its dataset and draws its points on its images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from clip2scene.data.clouds import read_cloud, read_depths, read_image, read_labels
from clip2scene.data.index import Frame, Index
from clip2scene.data.vocabulary import Vocabulary
from clip2scene.errors import DataError
from clip2scene.geometry.pairing import pair
from clip2scene.tracking.figures.labels import frame_overview

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)


def readable_images(index: Index, frame: Frame) -> dict[str, np.ndarray]:
    """The images of a keyframe by camera, (H, W, 3) uint8 RGB.

    An image that cannot be read is left out with a warning, because extraction tolerates some of those too.
    """
    images = {}
    for camera in frame.cameras:
        try:
            images[camera.name] = read_image(index.root.path_of(camera.image_path), camera.width, camera.height)
        except DataError as error:
            _log.warning("%s; it is left out of the figures", error)
    return images


def frame_figure(
    index: Index,
    frame: Frame,
    vocabulary: Vocabulary,
    labels_N: np.ndarray | None = None,
    images: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Draw the points of a keyframe on its images, coloured by label.

    Args:
        index: index of the dataset.
        frame: keyframe of the index.
        vocabulary: classes and colours.
        labels_N: (N,) labels of the cloud's points, 0 = none; the true ones when not given, if there are any.
        images: images to draw on, by camera; :func:`readable_images` when not given.

    Raises:
        DataError: the cloud, a depth map or the label file is missing or damaged, or there is no image to draw on.
    """
    images = readable_images(index, frame) if images is None else images
    if not images:
        raise DataError(f"frame {frame.frame_id}: has no readable image to draw its points on")
    cloud = read_cloud(index.root.path_of(frame.cloud_path))
    if labels_N is None and frame.label_path is not None:
        labels_N = read_labels(index.root.path_of(frame.label_path), len(cloud), vocabulary)
    pairs = pair(cloud[:, :3], frame.world_from_lidar, frame.cameras, read_depths(index.root, frame))
    pixels, labels = {}, {}
    for position, camera in enumerate(frame.cameras):
        if camera.name not in images:
            continue
        chosen_P = pairs.camera_P == position
        pixels[camera.name] = pairs.pixel_P2[chosen_P]
        if labels_N is not None:
            labels[camera.name] = labels_N[pairs.point_P[chosen_P]]
    return frame_overview(images, pixels, None if labels_N is None else labels, vocabulary)
