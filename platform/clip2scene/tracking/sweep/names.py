"""How a sweep's parameters, values and scores are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SCORES = {"miou": "mIoU", "label_free": "label-free"}


def score_name(name: str) -> str:
    """A score's name for people: ``mIoU``, ``label-free``."""
    return _SCORES.get(name, name)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys and the fewest of their last words that tell them apart (``scr.weight``, ``tau``)."""

    def last(key: str, words: int) -> str:
        return ".".join(key.split(".")[-words:])

    found = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        alone = (words for words in lengths if [last(other, words) for other in keys].count(last(key, words)) == 1)
        found[key] = last(key, next(alone, len(lengths)))
    return found


def value_text(value: Any) -> str:
    """A setting's value: a fraction with three digits, words as they are, anything else as JSON."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def correlation_text(value: float) -> str:
    """Two decimals, with a minus sign and not a hyphen."""
    return f"{value:.2f}".replace("-", "−")
