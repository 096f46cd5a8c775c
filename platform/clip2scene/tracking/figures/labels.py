"""Labels on a keyframe's images and from above, and where they are wrong.

Figures are made without pyplot, so they touch no global state and need no display. Labels are those of a vocabulary: 0
is ignored (no label, no prediction), class ``c`` is ``c + 1``.

Legend: N points, M points in view sorted by height, S of these with a true label, P points visible to one camera, H x W
pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clip2scene.data.vocabulary import IGNORE, Vocabulary
from clip2scene.tracking.figures.style import (
    CORRECT,
    FAINT,
    FRAME,
    GREY,
    INK,
    MISSING,
    RADIUS_M,
    WIDE_IN,
    WRONG,
    legend,
    new_figure,
    readable,
)

_CAMERA_ORDER = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")


def frame_overview(
    images: Mapping[str, np.ndarray],
    pixels: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray] | None,
    vocabulary: Vocabulary,
) -> Figure:
    """All cameras of a frame with their points, three in a row (nuScenes' cameras as they sit on the car).

    Args:
        images: per camera, uint8 RGB (H, W, 3).
        pixels: per camera, u (right) and v (down) of its points (P, 2).
        labels: per camera, labels (P,); ignored points are grey and small. None draws all points in one colour.
        vocabulary: classes and colours.
    """
    known = [name for name in _CAMERA_ORDER if name in images]
    names = known + [name for name in images if name not in known]
    columns = min(3, max(len(names), 1))
    rows = math.ceil(len(names) / columns)
    ratio = max((image.shape[0] / image.shape[1] for image in images.values()), default=0.5)
    panel_in = WIDE_IN / columns
    figure = new_figure(WIDE_IN, rows * (panel_in * ratio + 0.35) + 1.0)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        labels_P = None if labels is None else labels[name]
        _draw_camera(axes, images[name], pixels[name], labels_P, vocabulary, size=11.0 / columns)
        axes.set_title(f"{name}: {len(pixels[name]):,} points", fontsize=11, color=INK)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_axis_off()
    if labels:
        handles = class_handles(list(labels.values()), vocabulary, GREY)
        columns = int(figure.get_figwidth() / 1.85)
        legend(figure, handles=handles, loc="outside lower center", ncols=columns, handletextpad=0.1)
    return figure


def birds_eye(
    points_N3: np.ndarray,
    panels: Mapping[str, np.ndarray],
    truth_N: np.ndarray,
    vocabulary: Vocabulary,
) -> Figure:
    """The cloud from above: ground truth and predictions side by side, and below each prediction its errors.

    Args:
        points_N3: points in the LiDAR's frame, metres (nuScenes: x right, y forward).
        panels: method to its labels (N,); 0 where it predicts nothing.
        truth_N: True labels; points with 0 are not scored and appear in no error map.
        vocabulary: classes and colours.
    """
    near_N = (np.abs(points_N3[:, :2]) <= RADIUS_M).all(axis=1)
    points_M3 = points_N3[near_N]
    order_M = np.argsort(points_M3[:, 2], kind="stable")  # points higher up cover those below
    xy_M2 = points_M3[order_M, :2]

    def visible(labels_N: np.ndarray) -> np.ndarray:
        return np.asarray(labels_N)[near_N][order_M]

    columns = len(panels) + 1
    figure = new_figure(4.7 * columns, 9.9)
    grid = figure.subplots(2, columns, squeeze=False)
    truth_M = visible(truth_N)
    scored_M = truth_M != IGNORE
    draw_top_view(grid[0, 0], xy_M2, colours(truth_M, vocabulary), ~scored_M, RADIUS_M, "ground truth")
    occurring = [truth_M]
    for axes, below, (name, labels_N) in zip(grid[0, 1:], grid[1, 1:], panels.items(), strict=True):
        labels_M = visible(labels_N)
        occurring.append(labels_M)
        draw_top_view(axes, xy_M2, colours(labels_M, vocabulary), labels_M == IGNORE, RADIUS_M, name)
        draw_errors(below, xy_M2, truth_M, labels_M, RADIUS_M, f"errors of {name}")
    corner = grid[1, 0]
    corner.set_axis_off()
    style: dict[str, Any] = {"title_fontsize": 12, "handletextpad": 0.1}
    classes = class_handles(occurring, vocabulary, FAINT)
    verdicts = [dot(CORRECT, "right"), dot(WRONG, "wrong"), dot(MISSING, "no prediction")]
    upper = legend(
        corner, handles=classes, title="classes", ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.98), **style
    )
    corner.add_artist(upper)  # or the next legend would replace it
    style |= {"columnspacing": 1.0}
    legend(corner, handles=verdicts, title="errors", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.16), **style)
    return figure


def _draw_camera(
    axes: Axes,
    image_HW3: np.ndarray,
    pixels_P2: np.ndarray,
    labels_P: np.ndarray | None,
    vocabulary: Vocabulary,
    size: float,
) -> None:
    grey_HW1 = image_HW3.mean(axis=2, keepdims=True)
    # Pale and less colourful: points of every colour stand out, dark ones too, and the scene stays visible.
    axes.imshow((0.55 * (0.4 * image_HW3 + 0.6 * grey_HW1) + 105).astype(np.uint8))
    height, width = image_HW3.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_axis_off()
    u_P, v_P = pixels_P2[:, 0], pixels_P2[:, 1]
    if labels_P is None:
        axes.scatter(u_P, v_P, s=size, c="#c2185b", linewidths=0)
        return
    ignored_P = labels_P == IGNORE
    axes.scatter(u_P[ignored_P], v_P[ignored_P], s=size * 0.35, c=GREY, linewidths=0)
    colours_P3 = colours(labels_P, vocabulary)
    axes.scatter(u_P[~ignored_P], v_P[~ignored_P], s=size, c=colours_P3[~ignored_P], linewidths=0)


def draw_top_view(
    axes: Axes, xy_M2: np.ndarray, rgb_M3: np.ndarray, faint_M: np.ndarray, radius_m: float, title: str
) -> None:
    """Draw points from above within ``radius_m`` of the sensor in their colours, and faint ones small and grey."""
    size = 2.4
    axes.scatter(xy_M2[faint_M, 0], xy_M2[faint_M, 1], s=size * 0.5, c=FAINT, linewidths=0)
    axes.scatter(xy_M2[~faint_M, 0], xy_M2[~faint_M, 1], s=size, c=rgb_M3[~faint_M], linewidths=0)
    axes.plot(0, 0, marker="^", color="black", markersize=7, markeredgecolor="white")
    axes.set_xlim(-radius_m, radius_m)
    axes.set_ylim(-radius_m, radius_m)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=12, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter(lambda metres, _: f"{metres:g} m")
    axes.tick_params(labelsize=10, colors=INK)
    axes.spines[:].set_color(FRAME)


def draw_errors(
    axes: Axes, xy_M2: np.ndarray, truth_M: np.ndarray, labels_M: np.ndarray, radius_m: float, heading: str
) -> None:
    """Draw from above which points with a true label are predicted right, predicted wrong, or not predicted."""
    scored_M = truth_M != IGNORE
    truth_S, labels_S = truth_M[scored_M], labels_M[scored_M]
    right_S = labels_S == truth_S
    verdict_S = np.where(labels_S == IGNORE, MISSING, np.where(right_S, CORRECT, WRONG))
    share = f"{right_S.mean():.0%} right" if len(right_S) else "no point is scored"
    nowhere_S = np.zeros(len(right_S), dtype=bool)
    draw_top_view(axes, xy_M2[scored_M], verdict_S, nowhere_S, radius_m, f"{heading}: {share}")


def colours(labels_P: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """RGB in [0, 1], (P, 3); grey where ignored."""
    table = np.vstack([[158, 158, 158], np.asarray(vocabulary.colours)]) / 255
    return np.asarray(table[labels_P.astype(np.int64)])


def class_handles(labels: list[np.ndarray], vocabulary: Vocabulary, ignored: str) -> list[Line2D]:
    """Legend entries of the classes that occur, in the vocabulary's order, and of ignored points in that colour."""
    occurring = sorted(set(np.unique(np.concatenate(labels)).tolist()))
    handles = []
    for label in occurring:
        if label != IGNORE:
            red, green, blue = (value / 255 for value in vocabulary.colours[label - 1])
            handles.append(dot((red, green, blue), readable(vocabulary.classes[label - 1])))
    return handles + ([dot(ignored, "none")] if IGNORE in occurring else [])


def dot(colour: str | tuple[float, float, float], label: str) -> Line2D:
    """A legend entry."""
    return Line2D([], [], linestyle="", marker="o", markersize=8, markeredgewidth=0, color=colour, label=label)
