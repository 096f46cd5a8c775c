"""A keyframe's points on its images, read from the dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clip2scene.data.clouds import read_cloud, read_depths, read_image, read_labels, resolve
from clip2scene.data.index import Frame, Index
from clip2scene.data.vocabulary import Vocabulary
from clip2scene.geometry.pairing import pair
from clip2scene.tracking.figures import frame_overview

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def frame_figure(index: Index, frame: Frame, vocabulary: Vocabulary, labels_N: np.ndarray | None = None) -> Figure:
    """Draw the points of a keyframe on all its images, coloured by label.

    Args:
        index: names the dataset's folder.
        frame: the keyframe.
        vocabulary: of the labels, with their colours.
        labels_N: (N,) labels of the cloud's points, 0 = none; the true ones when not given, if there are any.

    Raises:
        DataError: a file is missing or damaged.
    """
    cloud = read_cloud(resolve(index.root, frame.cloud_path))
    if labels_N is None and frame.label_path is not None:
        labels_N = read_labels(resolve(index.root, frame.label_path), len(cloud), vocabulary)
    pairs = pair(cloud[:, :3], frame.world_from_lidar, frame.cameras, read_depths(index.root, frame))
    images, pixels, labels = {}, {}, {}
    for position, camera in enumerate(frame.cameras):
        chosen_P = pairs.camera_P == position
        images[camera.name] = read_image(resolve(index.root, camera.image_path), camera.width, camera.height)
        pixels[camera.name] = pairs.pixel_P2[chosen_P]
        if labels_N is not None:
            labels[camera.name] = labels_N[pairs.point_P[chosen_P]]
    return frame_overview(images, pixels, None if labels_N is None else labels, vocabulary)
