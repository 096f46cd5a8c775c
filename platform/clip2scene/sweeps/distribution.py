"""Where the values of a searched setting come from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from clip2scene.config import Settings

FINITE = ("grid", "choice")
"""Kinds that list their values."""


class Distribution(Settings):
    """Where a setting's values come from; exactly one of these keys."""

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these values, in combination with everything else."""
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values, all equally likely."""
    uniform: tuple[float, float] | None = None
    """A number between two."""
    loguniform: tuple[float, float] | None = None
    """A number between two above 0, uniform in its logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number between two, both included."""

    @model_validator(mode="after")
    def _is_one(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(type(self).model_fields)} is required, not {' and '.join(given) or 'none'}"
            )
        if given[0] in FINITE:
            values = [repr(value) for value in self.values]
            if len(set(values)) < len(values):
                raise ValueError(f"{given[0]}={list(self.values)}: a value is given twice")
            return self
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"{given[0]}=[{low}, {high}]: empty; the first number must be below the second")
        if given[0] == "loguniform" and low <= 0:
            raise ValueError(f"loguniform=[{low}, {high}]: both numbers must be above 0")
        return self

    @property
    def kind(self) -> str:
        """``grid``, ``choice``, ``uniform``, ``loguniform`` or ``randint``."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> tuple[Any, ...]:
        """The values of a ``grid`` or a ``choice``; empty for the other kinds."""
        return self.grid or self.choice or ()

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value of the other kinds."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that stand for all: if a job may have each of these, it may have any."""
        return self.values or self.bounds

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value; not for a ``grid``."""
        if self.choice is not None:
            return self.choice[int(rng.integers(len(self.choice)))]
        if self.randint is not None:
            return int(rng.integers(self.randint[0], self.randint[1], endpoint=True))
        low, high = self.bounds
        if self.loguniform is not None:
            return math.exp(rng.uniform(math.log(low), math.log(high)))
        return float(rng.uniform(low, high))
