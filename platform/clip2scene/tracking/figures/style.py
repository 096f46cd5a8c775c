"""How figures look: resolution, colours and the style of axes."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

DPI = 110
WIDE_IN = 15.0
"""Width of a figure of several panels."""
RADIUS_M = 35.0
"""Half the side of the largest square that is drawn from above."""
INK = "#2b2f36"
FRAME = "#c4c8ce"
GREY = "#808080"
FAINT = "#cfd3d8"
GRID = "#e3e6ea"
BLUE, ORANGE = "#1f5fa8", "#e07b00"
CORRECT, WRONG, MISSING = "#a9adb3", "#d62728", "#a8cdec"
"""Points of an error map: predicted right, predicted wrong, without a prediction."""


def new_figure(width_in: float, height_in: float, title: str = "", title_size: int = 14) -> Figure:
    """An empty figure of this size in inches with an automatic layout, made without pyplot."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, fontsize=title_size, color=INK)
    return figure


def quiet(axes: Axes) -> None:
    """Style the axes of a chart and their labels: a pale grid behind the data, no frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=11, color=INK)


def legend(owner: Axes | Figure, fontsize: int = 11, **how: Any) -> Legend:
    """A legend without a frame; ``how`` is matplotlib's."""
    return owner.legend(fontsize=fontsize, frameon=False, labelcolor=INK, **how)


def readable(name: str) -> str:
    """``traffic_cone`` to ``traffic cone``."""
    return name.replace("_", " ")
