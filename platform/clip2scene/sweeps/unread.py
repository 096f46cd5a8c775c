"""Settings of the distillation that others make meaningless: a sweep over one would repeat the same training."""

from __future__ import annotations

from collections.abc import Iterable

from clip2scene.config import DistillSettings

_OF_METHOD = {
    "clip2scene": ("normalise_features", "scr", "stcr", "s3"),
    "kl": ("normalise_features", "scr.tau"),
    "openscene": (),
    "ppkt": ("contrast.temperature", "contrast.max_pairs"),
    "slidr": ("contrast.temperature", "contrast.superpixels_per_image", "contrast.compactness"),
    "pointcontrast": ("contrast.temperature", "contrast.max_pairs"),
}
"""Settings that only some methods read, per method in :data:`clip2scene.training.objectives.LOSSES`."""


def why_unread(key: str, settings: DistillSettings) -> str | None:
    """Find the setting that makes another one meaningless.

    Args:
        key: dotted key (``distill.scr.tau``).
        settings: the distillation's.

    Returns:
        That setting as a user writes it (``distill.scr.form=cross_entropy``), or None if the key matters.

    Example:
        >>> why_unread("distill.scr.tau", DistillSettings(method="openscene"))
        'distill.method=openscene'
    """
    group, _, key = key.partition(".")
    if group != "distill":
        return None
    every_method = {name for names in _OF_METHOD.values() for name in names}
    if _below(key, every_method) and not _below(key, _OF_METHOD[settings.method]):
        return f"distill.method={settings.method}"
    scr, stcr, random = settings.scr, settings.stcr, settings.sweep_choice == "random"
    ours = settings.method == "clip2scene"
    reasons = {
        "scr.weight=0": ours and scr.weight == 0 and (_below(key, ["s3"]) or key in ("scr.tau", "scr.form")),
        "scr.form=cross_entropy": ours and scr.form == "cross_entropy" and key == "scr.tau",
        f"s3.start_epoch={settings.s3.start_epoch} and distill.epochs={settings.epochs}": (
            ours and settings.s3.start_epoch >= settings.epochs and _below(key, ["s3"])
        ),
        "optimiser.kind=adamw": (
            settings.optimiser.kind == "adamw" and key in ("optimiser.momentum", "optimiser.dampening")
        ),
        "s3.probability=0": ours and settings.s3.probability == 0 and _below(key, ["s3"]) and key != "s3.probability",
        "stcr.weight=0": ours and stcr.weight == 0 and _below(key, ["stcr"]) and key != "stcr.weight",
        "stcr.grid=voxel": ours and stcr.grid == "voxel" and key == "stcr.grid_size_m",
        "num_sweeps=1": settings.num_sweeps == 1 and key in ("sweep_window_s", "sweep_choice", "merge_sweeps"),
        "sweep_choice=random": random and key == "sweep_window_s",
    }
    return next((f"distill.{reason}" for reason, holds in reasons.items() if holds), None)


def _below(key: str, names: Iterable[str]) -> bool:
    """Whether a key is one of the names, or in a group of that name."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
