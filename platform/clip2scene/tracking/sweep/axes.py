"""Searched parameters as axes of a chart: the positions of values, the scale and the ticks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from clip2scene.tracking.sweep.names import short_names, value_text
from clip2scene.tracking.sweep.record import SweepRecord

_TICKS = 5
"""About this many ticks, where values come from an interval."""
_SLACK = 1e-9


@dataclass(frozen=True)
class ParameterAxis:
    """A searched parameter, or the variants treated as one."""

    key: str
    """The parameter's dotted key; ``variant`` for the variants."""
    name: str
    """The parameter's short name."""
    kind: str
    """As in ``sweep.json``; ``choice`` for the variants."""
    listed: tuple[Any, ...]
    """All values, where the search space lists them."""
    low: float
    high: float
    """Ends of the axis: of the interval or of the listed numbers; for other values, of their positions in the list."""
    numeric: bool
    log: bool

    def place(self, value: Any) -> float:
        """Position of a value: the number itself, or the index of any other value in the list."""
        return float(value) if self.numeric else float(self.listed.index(value))

    def share(self, value: Any) -> float:
        """Position of a value between the ends of the axis, 0 to 1."""
        place, low, high = (math.log(x) if self.log else x for x in (self.place(value), self.low, self.high))
        return (place - low) / (high - low) if high > low else 0.5

    @property
    def ticks(self) -> list[Any]:
        """Values that are written along the axis."""
        if self.listed:
            return list(self.listed)
        if self.log:
            found = LogLocator(subs=(1, 2, 5), numticks=_TICKS).tick_values(self.low, self.high)
        else:
            found = MaxNLocator(_TICKS, integer=self.kind == "randint").tick_values(self.low, self.high)
        # Ticks at the bounds are subject to rounding errors.
        return [float(x) for x in found if self.low * (1 - _SLACK) <= x <= self.high * (1 + _SLACK)]

    def lay_along(self, axes: Axes, side: str) -> None:
        """Give a chart's ``x`` or ``y`` axis this scale, ticks and name."""
        chosen = getattr(axes, f"{side}axis")
        getattr(axes, f"set_{side}scale")("log" if self.log else "linear")
        chosen.set_ticks([self.place(value) for value in self.ticks], [value_text(value) for value in self.ticks])
        chosen.set_ticks([], minor=True)
        getattr(axes, f"set_{side}label")(self.name)


def axes_of(record: SweepRecord) -> tuple[ParameterAxis, ...]:
    """One axis per parameter that has more than one value, then one for the variants if there are several."""
    names = short_names(record.keys)
    found = [_axis(parameter, names[parameter["key"]]) for parameter in record.about["parameters"]]
    variants = tuple(record.about["variants"])
    if variants:
        found.append(ParameterAxis("variant", "variant", "choice", variants, 0, len(variants) - 1, False, False))
    return tuple(axis for axis in found if axis.high > axis.low)


def _axis(parameter: Mapping[str, Any], name: str) -> ParameterAxis:
    key, kind = parameter["key"], parameter["kind"]
    listed = tuple(parameter.get("values", ()))
    if not listed:
        return ParameterAxis(key, name, kind, (), parameter["low"], parameter["high"], True, kind == "loguniform")
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in listed):
        listed = tuple(sorted(listed))
        return ParameterAxis(key, name, kind, listed, listed[0], listed[-1], True, _is_geometric(listed))
    return ParameterAxis(key, name, kind, listed, 0, len(listed) - 1, False, False)


def _is_geometric(numbers: tuple[float, ...]) -> bool:
    """Whether sorted numbers are spaced more evenly on a logarithmic scale."""
    if numbers[0] <= 0 or len(numbers) < 3:
        return False
    steps, ratios = np.diff(numbers), np.diff(np.log(numbers))
    return float(ratios.std() / ratios.mean()) < float(steps.std() / steps.mean())
