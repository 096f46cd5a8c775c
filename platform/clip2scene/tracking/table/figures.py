"""Figures of a table, as in the paper: per method a scan, its truth, predictions and errors; and IoU per class.

Labels are those of a vocabulary: 0 is ignored.

Legend: N points, M points in view sorted by height.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clip2scene.data.vocabulary import IGNORE, Vocabulary
from clip2scene.tracking.figures.labels import class_handles, colours, dot, draw_errors, draw_top_view
from clip2scene.tracking.figures.style import (
    BLUE,
    CORRECT,
    FAINT,
    GREY,
    INK,
    MISSING,
    ORANGE,
    RADIUS_M,
    WRONG,
    legend,
    new_figure,
    quiet,
    readable,
)

_QUANTILES = (0.02, 0.98)
"""Of coordinates: where a scan ends for its middle, its size and the colours of its heights, outliers aside."""


def scene_row(
    points_N3: np.ndarray, truth_N: np.ndarray, labels_N: np.ndarray, vocabulary: Vocabulary, title: str = ""
) -> Figure:
    """One method from above: input scan (coloured by height), ground truth, prediction, error map.

    Args:
        points_N3: points, metres, with the LiDAR at the origin; a scan that lies elsewhere (ScanNet) is centred.
        truth_N: True labels; points with 0 are not scored and appear in no error map.
        labels_N: predicted labels; 0 where nothing is predicted.
        vocabulary: classes and colours.
        title: title of the figure.
    """
    xyz_N3 = points_N3[:, :3].astype(np.float64)
    low, high = np.quantile(xyz_N3[:, :2], _QUANTILES, axis=0)
    room = not ((low < 0) & (high > 0)).all() or np.abs(xyz_N3[:, :2]).max() < 15
    if room:
        xyz_N3 = xyz_N3 - [*(low + high) / 2, 0.0]
        radius_m = float((high - low).max() / 2 * 1.08)
    else:
        radius_m = float(np.clip(np.quantile(np.abs(xyz_N3[:, :2]).max(axis=1), 0.95), 5.0, RADIUS_M))
    near_N = (np.abs(xyz_N3[:, :2]) <= radius_m).all(axis=1)
    order_M = np.argsort(xyz_N3[near_N, 2], kind="stable")  # points higher up cover those below

    def visible(values_N: np.ndarray) -> np.ndarray:
        return np.asarray(values_N)[near_N][order_M]

    xyz_M3, truth_M, labels_M = visible(xyz_N3), visible(truth_N), visible(labels_N)
    scored_M = truth_M != IGNORE
    figure = new_figure(14.0, 4.75, title, 13)
    panels = figure.subplots(1, 4)
    bottom, top = np.quantile(xyz_M3[:, 2], _QUANTILES)
    heights_M = np.clip((xyz_M3[:, 2] - bottom) / max(top - bottom, 1e-6), 0, 1)
    nothing_M = np.zeros(len(xyz_M3), dtype=bool)
    colours_M3 = matplotlib.colormaps["viridis"](0.92 * heights_M)[:, :3]
    xy_M2 = xyz_M3[:, :2]
    draw_top_view(panels[0], xy_M2, colours_M3, nothing_M, radius_m, "input scan, by height")
    draw_top_view(panels[1], xy_M2, colours(truth_M, vocabulary), ~scored_M, radius_m, "ground truth")
    draw_top_view(panels[2], xy_M2, colours(labels_M, vocabulary), labels_M == IGNORE, radius_m, "prediction")
    draw_errors(panels[3], xy_M2, truth_M, labels_M, radius_m, "errors")
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(5, prune="both"))
        if room:
            axes.lines[-1].remove()  # a room has no LiDAR in its middle
        if axes is not panels[0]:
            axes.set_yticklabels([])
    verdicts = [(CORRECT, "error map: right"), (WRONG, "error map: wrong"), (MISSING, "error map: no prediction")]
    shown = {CORRECT, WRONG} | ({MISSING} if (labels_M[scored_M] == IGNORE).any() else set())
    handles = class_handles([truth_M, labels_M], vocabulary, FAINT)
    handles += [dot(colour, name) for colour, name in verdicts if colour in shown]
    legend(figure, 10, handles=handles, loc="outside lower center", ncols=10, handletextpad=0.1, columnspacing=1.2)
    return figure


def class_panels(
    iou_by_row: Mapping[str, Mapping[str, tuple[float, float | None]]],
    classes: Sequence[str],
    reference: str,
    title: str = "",
) -> Figure:
    """Bars of the IoU per class, one panel per method, with the reference method's IoU as a mark on each bar.

    Args:
        iou_by_row: method to class to mean and standard deviation over seeds (percent; None for a single seed).
        classes: all classes, in order; those without a score are marked absent.
        reference: the method that the marks show; without marks where it is not among the methods.
        title: title of the figure.
    """
    columns = min(4, max(len(iou_by_row), 1))
    rows = math.ceil(len(iou_by_row) / columns) or 1
    figure = new_figure(14.0, rows * (0.215 * len(classes) + 0.95) + 0.3, title, 13)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    places = np.arange(len(classes))
    marks = iou_by_row.get(reference, {})
    highest = max((mean + (dev or 0) for ious in iou_by_row.values() for mean, dev in ious.values()), default=1.0)
    for axes, (row, ious) in zip(grid.flat, iou_by_row.items(), strict=False):
        means = np.array([ious.get(name, (math.nan, None))[0] for name in classes])
        deviations = np.array([ious.get(name, (0.0, None))[1] or 0.0 for name in classes])
        known = ~np.isnan(means)
        axes.barh(places[known], means[known], 0.72, color=ORANGE if row == reference else BLUE)
        several = known & (deviations > 0)
        axes.errorbar(means[several], places[several], xerr=deviations[several], fmt="none", ecolor=INK, elinewidth=1.0)
        right = axes.get_yaxis_transform()  # a column of numbers at the right, clear of bars and marks
        for place, mean in zip(places[known], means[known], strict=True):
            axes.text(1.0, place, f"{mean:.1f}", transform=right, ha="right", va="center", fontsize=8, color=INK)
        for place in places[~known]:
            axes.text(0.01 * highest, place, "absent", va="center", fontsize=8, color=GREY)
        if row != reference and marks:
            xs = [marks.get(name, (math.nan, None))[0] for name in classes]
            axes.scatter(xs, places, marker="|", s=90, color=ORANGE, linewidths=2.0, zorder=3)
        overall = f"{np.nanmean(means):.1f}" if known.any() else "none"
        axes.set_title(f"{row}\nmean {overall}", fontsize=10, color=INK)
        quiet(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    grid[0, 0].set_yticks(places, [readable(name) for name in classes])
    grid[0, 0].set_ylim(len(classes) - 0.4, -0.6)
    grid[0, 0].set_xlim(0, highest * 1.14 + 1)
    for place in range(len(iou_by_row), rows * columns):
        grid.flat[place].set_axis_off()
    for axes in list(grid.flat)[max(len(iou_by_row) - columns, 0) : len(iou_by_row)]:
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel("IoU (%)", fontsize=10)
    return figure
