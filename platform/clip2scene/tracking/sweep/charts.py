"""Charts of a sweep's scores over its parameters: over one, over two, and over all at once.

Scores are in percent. A point is a configuration, its score the mean over its seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import LinearTriInterpolator, Triangulation

from clip2scene.tracking.figures.style import BLUE, FRAME, GREY, INK, ORANGE, legend, new_figure, quiet
from clip2scene.tracking.sweep.axes import ParameterAxis
from clip2scene.tracking.sweep.names import value_text

_COLOURS = matplotlib.colormaps["viridis"]
_INTERPOLATED_POINTS = 6
"""A surface needs at least this many points."""
_SURFACE_CELLS = 400
"""Cells of a surface along each side."""
_PARALLEL_TICKS, _BEST_WIDTH = 5, 3.4


@dataclass(frozen=True)
class Point:
    """One configuration."""

    values: Mapping[str, Any]
    """Parameter (``variant`` too) to value."""
    score: float
    deviation: float | None
    """Standard deviation over seeds; None for a single one."""
    full: bool
    """Whether its score is of the same epoch as the others': the last one, where enough trials ran all."""
    best: bool


def surface(points: Sequence[Point], across: ParameterAxis, up: ParameterAxis, score: str, smooth: bool) -> Figure:
    """Scores over two parameters: one marker per configuration, and a linear interpolation between them.

    The interpolation covers the hull of the points of the same epoch, and needs six of those.

    Args:
        points: configurations.
        across: the parameter along x.
        up: the parameter along y.
        score: name of the score, for the colour bar.
        smooth: whether to interpolate, which says nothing where other parameters vary too.
    """
    figure = new_figure(8.4, 6.0)
    axes = figure.subplots()
    norm = _norm(points)
    quiet(axes)
    if smooth:
        _interpolate(axes, [point for point in points if point.full], across, up, norm)
    for label, marker, size, edge, shown in (
        ("stopped earlier", "v", 80, "white", [point for point in points if not point.full]),
        ("same epoch", "o", 80, "white", [point for point in points if point.full]),
        ("best", "o", 120, ORANGE, [point for point in points if point.best]),
    ):
        if shown:
            axes.scatter(
                [across.place(point.values[across.key]) for point in shown],
                [up.place(point.values[up.key]) for point in shown],
                c=[point.score for point in shown],
                cmap=_COLOURS,
                norm=norm,
                s=size,
                marker=marker,
                edgecolors=edge,
                linewidths=2.6 if edge == ORANGE else 1.2,
                label=label,
                zorder=3,
                clip_on=False,
            )
    across.lay_along(axes, "x")
    up.lay_along(axes, "y")
    legend(figure, 10, loc="outside upper center", ncols=3)
    lowest, highest = _ends(_scaled(points))
    beyond = (any(point.score < lowest for point in points), any(point.score > highest for point in points))
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[beyond]
    bar = figure.colorbar(ScalarMappable(norm, _COLOURS), ax=axes, fraction=0.04, pad=0.02, extend=extend)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=10, colors=INK)
    bar.set_label(score, fontsize=11, color=INK)
    return figure


def curve(points: Sequence[Point], axis: ParameterAxis, score: str) -> Figure:
    """Scores over a numeric parameter: one point per configuration; where values are listed, a line of their means."""
    figure = new_figure(8.4, 4.6)
    axes = figure.subplots()
    quiet(axes)
    if axis.listed:
        means = _means(points, axis)
        places = [axis.place(value) for value in means]
        axes.plot(places, list(means.values()), color=FRAME, linewidth=2, label="mean", zorder=1)
    for label, colour, hollow, shown in _kinds(points):
        places = [axis.place(point.values[axis.key]) for point in shown]
        heights = [point.score for point in shown]
        spreads = [point.deviation or 0.0 for point in shown]
        if any(spreads):
            axes.errorbar(places, heights, yerr=spreads, fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=2)
        face = "white" if hollow else colour
        axes.scatter(places, heights, s=52, facecolors=face, edgecolors=colour, linewidths=1.5, label=label, zorder=3)
    axis.lay_along(axes, "x")
    axes.set_ylabel(score)
    legend(axes, 10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def strip(points: Sequence[Point], axis: ParameterAxis, score: str, bars: bool) -> Figure:
    """Scores over a parameter that is not numeric: one row per value, one point per configuration.

    Args:
        points: configurations; with ``bars``, one point per trial.
        axis: the parameter.
        score: name of the score.
        bars: draw the mean over the points of the same epoch as a bar, and their standard deviation as a whisker.
    """
    figure = new_figure(8.4, 1.5 + 0.42 * len(axis.listed))
    axes = figure.subplots()
    quiet(axes)
    axes.grid(axis="y", visible=False)
    if bars:
        for value, mean in _means(points, axis).items():
            scores = [point.score for point in points if point.full and point.values[axis.key] == value]
            deviation = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
            best = any(point.best for point in points if point.values[axis.key] == value)
            axes.barh(axis.place(value), mean, 0.62, color=ORANGE if best else BLUE, alpha=0.35)
            if deviation:
                axes.errorbar(mean, axis.place(value), xerr=deviation, fmt="none", ecolor=INK, capsize=4)
        axes.set_xlim(left=0)
    for label, colour, hollow, shown in _kinds(points):
        face = "white" if hollow else colour
        places = [axis.place(point.values[axis.key]) for point in shown]
        scores = [point.score for point in shown]
        axes.scatter(scores, places, s=38, facecolors=face, edgecolors=colour, linewidths=1.4, label=label, zorder=3)
    axis.lay_along(axes, "y")
    axes.set_ylabel("" if bars else axis.name)
    axes.set_ylim(axis.high + 0.6, axis.low - 0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(score)
    legend(axes, 10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def parallel(points: Sequence[Point], columns: Sequence[ParameterAxis], score: str) -> Figure:
    """All parameters and the score as parallel axes: one line per configuration, coloured by its score."""
    norm = _norm(points)
    figure = new_figure(max(8.4, 2.1 * (len(columns) + 1)), 5.4)
    axes = figure.subplots()
    lowest, highest = _ends(points)
    for point in sorted(points, key=lambda point: (point.best, point.full, point.score)):
        heights = [column.share(point.values[column.key]) for column in columns]
        heights.append((point.score - lowest) / (highest - lowest))
        colour = _COLOURS(norm(point.score))
        width, dashes = _BEST_WIDTH if point.best else 1.8 if point.full else 1.0, "-" if point.full else "--"
        axes.plot(heights, color=colour, linestyle=dashes, linewidth=width, solid_capstyle="round")
    for place, column in enumerate(columns):
        axes.axvline(place, color=INK, linewidth=1.0)
        for value in column.ticks:
            _tick(axes, place, column.share(value), value_text(value))
    axes.axvline(len(columns), color=INK, linewidth=1.0)
    for value in MaxNLocator(_PARALLEL_TICKS).tick_values(lowest, highest):
        if lowest <= value <= highest:
            _tick(axes, len(columns), (value - lowest) / (highest - lowest), f"{value:g}")
    axes.set_xticks(range(len(columns) + 1), [*(column.name for column in columns), score], fontsize=11, color=INK)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.25, len(columns) + 0.15)
    axes.set_ylim(-0.04, 1.04)
    axes.spines[:].set_visible(False)
    return figure


def _ends(points: Sequence[Point]) -> tuple[float, float]:
    scores = [point.score for point in points]
    room = 0.5 if max(scores) == min(scores) else 0.0  # the ends of a scale must differ
    return min(scores) - room, max(scores) + room


def _scaled(points: Sequence[Point]) -> Sequence[Point]:
    """The points that set the colour scale: those of the same epoch, or all where there are none."""
    return [point for point in points if point.full] or points


def _norm(points: Sequence[Point]) -> Normalize:
    return Normalize(*_ends(_scaled(points)))


def _means(points: Sequence[Point], axis: ParameterAxis) -> dict[Any, float]:
    """Mean score of the points of the same epoch, by value."""
    full = sorted((axis.listed.index(point.values[axis.key]), point.score) for point in points if point.full)
    groups = itertools.groupby(full, key=lambda item: item[0])
    return {axis.listed[place]: float(np.mean([score for _, score in group])) for place, group in groups}


def _kinds(points: Sequence[Point]) -> list[tuple[str, str, bool, list[Point]]]:
    """Label, colour, whether hollow, and points of each group: stopped earlier, same epoch, best."""
    found = [
        ("stopped earlier", GREY, True, [point for point in points if not point.full and not point.best]),
        ("same epoch", BLUE, False, [point for point in points if point.full and not point.best]),
        ("best", ORANGE, False, [point for point in points if point.best]),
    ]
    return [kind for kind in found if kind[3]]


def _interpolate(
    axes: Axes, points: Sequence[Point], across: ParameterAxis, up: ParameterAxis, norm: Normalize
) -> None:
    if len(points) < _INTERPOLATED_POINTS:
        return
    sides, at = [], []
    for axis in (across, up):
        values = [point.values[axis.key] for point in points]
        sides.append((np.geomspace if axis.log else np.linspace)(min(values), max(values), _SURFACE_CELLS))
        at.append([axis.share(value) for value in values])
    try:
        between = LinearTriInterpolator(Triangulation(*at), [point.score for point in points])
    except RuntimeError:  # all on one line
        return
    # Linear in shares, as the axes show it; linear in the values would bend the hull on logarithmic ones.
    shares = [[axis.share(place) for place in side] for axis, side in zip((across, up), sides, strict=True)]
    heights = between(*np.meshgrid(*shares))
    axes.pcolormesh(*sides, heights, cmap=_COLOURS, norm=norm, alpha=0.85, shading="nearest", rasterized=True)


def _tick(axes: Axes, place: float, height: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
    axes.text(place - 0.03, height, text, ha="right", va="center", fontsize=9.5, color=INK, bbox=box)
