"""How figures look: resolution, colours and the style of axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110
INK = "#2b2f36"
FRAME = "#c4c8ce"
GREY = "#808080"
FAINT = "#cfd3d8"
CORRECT, WRONG, MISSING = "#a9adb3", "#d62728", "#a8cdec"
"""Points of an error map: predicted right, predicted wrong, without a prediction."""


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure of this size in inches with an automatic layout, made without pyplot."""
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")


def quiet(axes: Axes) -> None:
    """Style the axes of a chart: a pale grid behind the data, no frame at the top and right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def readable(name: str) -> str:
    """``traffic_cone`` to ``traffic cone``."""
    return name.replace("_", " ")
