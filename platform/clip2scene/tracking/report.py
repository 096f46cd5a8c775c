"""The tables that a pipeline prints at its end, from the contents of its ``report.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clip2scene.progress import duration
from clip2scene.tracking.text import new_table, plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_SCORES = (
    ("majority_miou", "majority class everywhere"),
    ("teacher_2d_miou", "2D-only: the teacher's labels on the points"),
    ("student_3d_miou", "3D-only: the student, no label read"),
    ("ensemble_miou", "both together, no label read"),
    ("pointclip_miou", "PointCLIP carried to scenes, no label read"),
    ("student_3d_all_points_miou", "3D-only, also on points that no image shows"),
)
_INITIALISATIONS = {"pretrained": "from the student", "scratch": "from random weights"}


def summary_text(report: Mapping[str, Any]) -> str:
    """Scores, scores per class and seconds per stage as plain text.

    Args:
        report: the contents of ``report.json``: ``seed``, ``teacher_2d_miou``, ``student_3d_miou``, ``finetuned_miou``
            (initialisation to mIoU), ``label_fraction``, ``majority_miou``, ``per_class`` (method to class to IoU or
            None), ``images_encoded``, ``seconds`` (stage to s), ``protocol``, ``vocabulary``, ``predictions`` (where
            they are), ``predicted_frames``; scores and the label fraction are fractions of 1. What is missing, because
            its stage did not run, is left out.
    """
    rows = _scores(report)
    parts = [_score_table(rows)] if rows else []
    if report.get("per_class"):
        parts.append(_classes(report["per_class"]))
    if report.get("seconds"):
        parts.append(_seconds(report["seconds"]))
    text = plain_text([*parts, _origin(report)], width=100)
    if report.get("predictions"):
        text += f"predictions of {report['predicted_frames']} keyframes: {report['predictions']}\n"
    return text


def percent(fraction: float | None) -> str:
    """``0.4112`` as ``41.1``; a dash where there is no score (None or NaN)."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f}"


def _scores(report: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    rows = [(text, report[key]) for key, text in _SCORES if report.get(key) is not None]
    fraction = report.get("label_fraction")
    labels = f"fine-tuned on {100 * fraction:.3g}% of the labels" if fraction is not None else "fine-tuned"
    for name, score in (report.get("finetuned_miou") or {}).items():
        rows.append((f"{labels}, {_INITIALISATIONS.get(name, name)}", score))
    return rows


def _score_table(rows: list[tuple[str, float | None]]) -> RenderableType:
    table = new_table("mIoU on held-out scenes")
    table.add_column("", justify="left")
    table.add_column("mIoU (%)", justify="right", style="bold")
    for text, score in rows:
        table.add_row(text, percent(score))
    return table


def _classes(per_class: Mapping[str, Mapping[str, float | None]]) -> RenderableType:
    table = new_table("IoU per class (%)")
    table.add_column("class", justify="left", no_wrap=True)
    for method in per_class:
        table.add_column(method.replace("_", " "), justify="right")
    for name in dict.fromkeys(name for scores in per_class.values() for name in scores):
        table.add_row(name.replace("_", " "), *(percent(scores.get(name)) for scores in per_class.values()))
    return table


def _seconds(seconds: Mapping[str, float]) -> RenderableType:
    table = new_table("time")
    table.add_column("stage", justify="left")
    table.add_column("took", justify="right")
    for stage, taken_s in seconds.items():
        table.add_row(stage, duration(taken_s))
    table.add_section()
    table.add_row("total", duration(sum(seconds.values())))
    return table


def _origin(report: Mapping[str, Any]) -> str:
    """What the scores hold for, so that they are not compared with others by mistake."""
    names = ("seed", "protocol", "vocabulary", "images_encoded")
    return ", ".join(f"{name.replace('_', ' ')} {report[name]}" for name in names if report.get(name) is not None)
