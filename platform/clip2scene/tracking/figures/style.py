"""How figures look: the size of a pixel, inks, and a quiet set of axes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110
INK = "#2b2f36"
FRAME = "#c4c8ce"
GREY = "#808080"


def new_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure of that size in inches, laid out by itself; pyplot knows nothing of it."""
    return Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained", facecolor="white")


def quiet(axes: Axes) -> None:
    """Axes for a chart: a pale grid behind the data, two sides open."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    axes.tick_params(labelsize=10, colors=INK)
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)


def readable(name: str) -> str:
    """``traffic_cone`` to ``traffic cone``."""
    return name.replace("_", " ")
