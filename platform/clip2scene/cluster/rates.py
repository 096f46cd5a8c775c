"""Measured speed of each stage, with machine, date and command: the source of a plan's times.

``rates.json`` ships with the package; rates of a file (``clip2scene plan --rates FILE``) of the same form come first.
A rate is used only for jobs with the settings that it was measured with; other jobs get no time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clip2scene.config import Job, Settings
from clip2scene.errors import ConfigError
from clip2scene.jobfile import parse

PACKAGED = Path(__file__).with_name("rates.json")
Device = Literal["cpu", "gpu"]
RatedStage = Literal[
    "start", "streetworld", "index", "extract", "superpixels", "distill", "evaluate", "finetune", "predict", "verify",
]  # fmt: skip
"""``start``: of a command, before its first stage; ``verify``: scores of a sweep's trials on held-out keyframes."""


class Measured(Settings):
    """The source of a number."""

    machine: str
    measured: str
    """Date, YYYY-MM-DD."""
    command: str
    """What printed the number, and how it was derived if it was not printed as such."""

    @property
    def source(self) -> str:
        """All three in one line."""
        return f"{self.command}; {self.machine}; {self.measured}"


class Rate(Measured):
    """The work that one worker of a stage does per second."""

    stage: RatedStage
    unit: str
    """Unit of the work: images, clouds (every sweep of a keyframe counts), keyframes."""
    per_second: float = Field(gt=0)
    """Of one worker."""
    start_s: float = Field(0, ge=0)
    """Fixed time before the first and after the last unit."""
    device: Device = "cpu"
    workers: int = Field(1, ge=1)
    """Number of workers when it was measured, each on its own core or GPU; more workers scale at most linearly."""
    match: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of a job, and the values that they must have."""

    def fits(self, stage: RatedStage, device: Device, settings: dict[str, Any]) -> bool:
        """Whether it was measured with these settings of a job (as JSON)."""
        same = all(_value(settings, key) == value for key, value in self.match.items())
        return self.stage == stage and self.device == device and same


class Size(Measured):
    """A measured size in bytes."""

    name: str
    bytes: int = Field(gt=0)


class Rates(Settings):
    """All measured rates and sizes; the first that fits is used."""

    rates: tuple[Rate, ...] = ()
    sizes: tuple[Size, ...] = ()
    images_per_second: float | None = Field(None, gt=0)
    """Given by the user for one extraction actor, with any settings."""
    steps_per_second: float | None = Field(None, gt=0)
    """Given by the user for distillation with one worker."""

    def find(self, stage: RatedStage, device: Device, job: Job) -> Rate | None:
        """The rate given by the user, or the first that was measured with the job's settings."""
        if stage == "extract" and self.images_per_second is not None:
            return _given(stage, "images", self.images_per_second, device, "--images-per-second")
        if stage == "distill" and self.steps_per_second is not None:
            clouds = job.distill.batch_size * job.distill.num_sweeps
            return _given(stage, "clouds", self.steps_per_second * clouds, device, "--steps-per-second")
        settings = job.model_dump(mode="json", by_alias=True)
        return next((rate for rate in self.rates if rate.fits(stage, device, settings)), None)

    def with_given(self, images_per_second: float | None, steps_per_second: float | None) -> Rates:
        """The same, with the rates given on the command line."""
        given = {"images_per_second": images_per_second, "steps_per_second": steps_per_second}
        return self.model_copy(update={key: value for key, value in given.items() if value is not None})

    def bytes_of(self, name: str) -> int:
        """A measured size; the package has all of them."""
        return next(size.bytes for size in self.sizes if size.name == name)


def read_rates(path: str | Path | None = None) -> Rates:
    """The package's rates, preceded by those of a file.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    packaged = _read(PACKAGED)
    if path is None:
        return packaged
    given = _read(Path(path))
    return given.model_copy(update={"rates": given.rates + packaged.rates, "sizes": given.sizes + packaged.sizes})


def _read(path: Path) -> Rates:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--rates {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--rates {path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--rates {path}: a mapping with rates and sizes is needed, as in the package's rates.json")
    return parse(Rates, values, f"--rates {path}")


def _given(stage: RatedStage, unit: str, per_second: float, device: Device, option: str) -> Rate:
    return Rate(
        stage=stage,
        unit=unit,
        per_second=per_second,
        device=device,
        machine="yours",
        measured="date not given",
        command=f"{option} as you say",
    )


def _value(settings: dict[str, Any], key: str) -> Any:
    node: Any = settings
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node
