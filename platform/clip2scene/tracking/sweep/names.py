"""How settings, values and scores of a sweep are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_SCORES = {"miou": "mIoU", "label_free": "label-free"}


def score_name(name: str) -> str:
    """``miou`` as people write it."""
    return _SCORES.get(name, name)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys by as many of their last words as tell them apart (``scr.weight``, ``tau``)."""

    def last(key: str, words: int) -> str:
        return ".".join(key.split(".")[-words:])

    found = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        alone = (words for words in lengths if [last(other, words) for other in keys].count(last(key, words)) == 1)
        found[key] = last(key, next(alone, len(lengths)))
    return found


def value_text(value: Any) -> str:
    """A setting's value: three digits of a number, JSON of what is no word."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def correlation_text(value: float) -> str:
    """Two decimals and a true minus."""
    return f"{value:.2f}".replace("-", "−")
