"""How fast each stage was measured to be, where, when and by which command: what a plan's times are made from.

``rates.json`` ships with the package; ``clip2scene plan --rates FILE`` reads a file of the same form before it. A rate
is used only for jobs with the settings that it was measured with, so there are jobs without one; no time is made up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from clip2scene.config import ConfigError, Job, Settings
from clip2scene.jobfile import parse

PACKAGED = Path(__file__).with_name("rates.json")
Device = Literal["cpu", "gpu"]
RatedStage = Literal[
    "start", "streetworld", "index", "extract", "superpixels", "distill", "evaluate", "finetune", "verify",
    "streetworld_clip",
]  # fmt: skip
"""``start``: of a command, before its first stage; ``verify``: of a sweep's trials, on held-out keyframes."""


class Measured(Settings):
    """Where a number comes from."""

    machine: str
    measured: str
    """Date, YYYY-MM-DD."""
    command: str
    """What printed it, and how it follows from that where it does not stand there."""

    @property
    def source(self) -> str:
        """All three in one line."""
        return f"{self.command}; {self.machine}; {self.measured}"


class Rate(Measured):
    """What one worker of a stage gets done in a second."""

    stage: RatedStage
    unit: str
    """What is counted: images, clouds (a keyframe's sweeps count each), keyframes."""
    per_second: float = Field(gt=0)
    """Of one worker."""
    start_s: float = Field(0, ge=0)
    """Seconds before the first and after the last, whatever the number."""
    device: Device = "cpu"
    workers: int = Field(1, ge=1)
    """How many were at work, each on a core or a GPU of its own. For more of them the sum is an upper bound."""
    match: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of a job, and the values that it must have."""

    def fits(self, stage: str, device: str, settings: dict[str, Any]) -> bool:
        """Whether it was measured with these settings (a job's, as JSON)."""
        same = all(_value(settings, key) == value for key, value in self.match.items())
        return self.stage == stage and self.device == device and same


class Size(Measured):
    """Bytes of something."""

    name: str
    bytes: int = Field(gt=0)


class Rates(Settings):
    """Everything measured, best first."""

    rates: tuple[Rate, ...] = ()
    sizes: tuple[Size, ...] = ()
    images_per_second: float | None = Field(None, gt=0)
    """What the user says of an actor that encodes, whatever the settings."""
    steps_per_second: float | None = Field(None, gt=0)
    """What the user says of distillation with one worker."""

    def find(self, stage: RatedStage, device: Device, job: Job) -> Rate | None:
        """What the user says, or the first rate that was measured with the job's settings."""
        if stage == "extract" and self.images_per_second is not None:
            return _given(stage, "images", self.images_per_second, device, "--images-per-second")
        if stage == "distill" and self.steps_per_second is not None:
            clouds = job.distill.batch_size * job.distill.num_sweeps
            return _given(stage, "clouds", self.steps_per_second * clouds, device, "--steps-per-second")
        settings = job.model_dump(mode="json", by_alias=True)
        return next((rate for rate in self.rates if rate.fits(stage, device, settings)), None)

    def with_given(self, images_per_second: float | None, steps_per_second: float | None) -> Rates:
        """The same, with what the user says on the command line."""
        given = {"images_per_second": images_per_second, "steps_per_second": steps_per_second}
        return self.model_copy(update={key: value for key, value in given.items() if value is not None})

    def bytes_of(self, name: str) -> int:
        """A measured size, which the package has."""
        return next(size.bytes for size in self.sizes if size.name == name)


def read_rates(path: str | Path | None = None) -> Rates:
    """The package's rates, with those of a file before them.

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
