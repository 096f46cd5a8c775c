"""Charts of one run's numbers: confusion matrix, losses per epoch, and IoU per class.

Legend: C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clip2scene.data.vocabulary import Vocabulary
from clip2scene.tracking.figures.style import (
    BLUE,
    GREY,
    GRID,
    INK,
    ORANGE,
    WIDE_IN,
    legend,
    new_figure,
    quiet,
    readable,
)

_LINES = (BLUE, ORANGE, "#2e8b57", "#a23b72", "#6b6f76", "#00a3a3")


def confusion_matrix(counts_CC: np.ndarray, vocabulary: Vocabulary, title: str = "") -> Figure:
    """The share of each true class's points that got each class, in percent; rows are the truth, columns predictions.

    Args:
        counts_CC: points of a true class (row) that got a predicted class (column), without the ignored label.
        vocabulary: classes.
        title: title of the figure.
    """
    counts_CC = np.asarray(counts_CC)
    num_classes = len(vocabulary.classes)
    assert counts_CC.shape == (num_classes, num_classes), counts_CC.shape
    totals_C = counts_CC.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_CC = counts_CC / totals_C[:, None]
    side_in = 3.4 + 0.52 * num_classes
    figure = new_figure(side_in + 0.6, side_in - 0.6)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("shares", ["#ffffff", "#9ec5e8", BLUE, "#0b2a55"]).with_extremes(
        bad="#efefef"
    )
    drawn = axes.imshow(np.ma.masked_invalid(share_CC), cmap=colours, vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(np.nan_to_num(share_CC) >= 0.005), strict=True):
        share = share_CC[row, column]
        ink, weight = ("white" if share > 0.45 else INK), ("bold" if row == column else "normal")
        axes.text(column, row, f"{share:.0%}"[:-1], ha="center", va="center", fontsize=10, color=ink, weight=weight)
    names = [readable(name) for name in vocabulary.classes]
    rows = [f"{name}  ({_count(int(total))})" for name, total in zip(names, totals_C, strict=True)]
    axes.set_xticks(range(num_classes), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=11)
    axes.set_yticks(range(num_classes), rows, fontsize=11)
    axes.set_xticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=12, color=INK)
    axes.set_ylabel("truth (points)", fontsize=12, color=INK)
    axes.set_title(title, fontsize=14, color=INK)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01, format=lambda share, _: f"{share:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10, colors=INK)
    return figure


def loss_curves(history: Sequence[Mapping[str, float]], title: str = "") -> Figure:
    """Values per epoch: all losses in one panel, every other quantity in its own.

    Args:
        history: per epoch, name to value; ``epoch`` is its number, or else its position from 1.
        title: title of the figure.
    """
    names = list(dict.fromkeys(name for row in history for name in row if name != "epoch"))
    losses = [name for name in names if "loss" in name]
    groups = ([losses] if losses else []) + [[name] for name in names if name not in losses]
    columns = min(3, max(len(groups), 1))
    rows = math.ceil(max(len(groups), 1) / columns)
    figure = new_figure(4.0 + 3.6 * columns if columns > 1 else 9.0, 4.6 if rows == 1 else 3.6 * rows, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    epochs = [row.get("epoch", place) for place, row in enumerate(history, start=1)]
    for axes, group in zip(grid.flat, groups, strict=False):
        for colour, name in zip(_LINES * len(group), group, strict=False):
            values = [row.get(name, math.nan) for row in history]
            axes.plot(epochs, values, color=colour, linewidth=2, marker="o", markersize=3.5, label=readable(name))
        quiet(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        if len(groups) > 1:
            axes.set_title("losses" if group is losses else readable(group[0]), fontsize=12, color=INK)
        if len(group) > 1 or len(groups) == 1:
            legend(axes)
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_axis_off()
    return figure


def class_bars(iou_by_method: Mapping[str, Mapping[str, float | None]], title: str = "") -> Figure:
    """IoU of every class for each method, and its mean over the classes that have one.

    Args:
        iou_by_method: method to class to IoU in [0, 1]; NaN or None where the class is absent.
        title: title of the figure.
    """
    classes = list(dict.fromkeys(name for scores in iou_by_method.values() for name in scores))
    methods = list(iou_by_method)
    width = 0.84 / max(len(methods), 1)
    figure = new_figure(WIDE_IN, 5.8, title)
    axes = figure.subplots()
    absent = set(classes)
    for place, (colour, method) in enumerate(zip(_LINES * len(methods), methods, strict=False)):
        scores = [iou_by_method[method].get(name) for name in classes]
        percents = np.array([math.nan if score is None else 100 * score for score in scores], dtype=float)
        known = ~np.isnan(percents)
        absent -= {name for name, is_known in zip(classes, known, strict=True) if is_known}
        centres = (np.arange(len(classes)) + (place - (len(methods) - 1) / 2) * width)[known]
        mean = f"{percents[known].mean():.1f}" if known.any() else "none"
        axes.bar(centres, percents[known], width * 0.92, color=colour, label=f"{method} (mean {mean})")
        for centre, percent in zip(centres, percents[known], strict=True):
            axes.text(centre, percent + 1, f"{percent:.0f}", ha="center", va="bottom", fontsize=9, color=INK)
    for name in absent:
        axes.text(classes.index(name), 1, "absent", ha="center", va="bottom", fontsize=10, color=GREY)
    quiet(axes)
    axes.grid(axis="x", visible=False)
    names = [readable(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=28, ha="right", rotation_mode="anchor", fontsize=11)
    axes.set_xlim(-0.55, len(classes) - 0.45)
    axes.set_ylim(0, 105)
    axes.set_ylabel("IoU (%)")
    if methods:
        legend(figure, loc="outside lower center", ncols=4)
    return figure


def _count(number: int) -> str:
    """``950``, ``12.3k``, ``4.5M``."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)
