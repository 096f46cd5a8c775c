"""Which trials are stopped early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from clip2scene.sweeps.sweep import Sweep

REPORTED = "reported.jsonl"
"""Name of the file beside Ray Tune's state that keeps what trials reported."""


class _Asha(ASHAScheduler):
    """ASHA that survives a kill of the driver: it keeps what trials reported in a file beside Ray Tune's state.

    Tune saves the trials and their search, but a scheduler only as it was at the start. After a resume, trials would
    not be compared with earlier ones, and a stop that was decided but not yet carried out would be lost.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._file: Path | None = None
        self._reported: set[tuple[str, int]] = set()
        self._stopped: dict[str, int] = {}
        """The epoch at which each stopped trial was stopped."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if self._file is None:
            self._file = Path(trial.storage.experiment_fs_path) / REPORTED
            self._replay(self._file)
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        assert self._file is not None
        if (trial.trial_id, result["epoch"]) in self._reported:  # a restarted trial reports its history again
            ends = result["epoch"] >= self._stopped.get(trial.trial_id, math.inf)
            return TrialScheduler.STOP if ends else TrialScheduler.CONTINUE
        decision = self._decide(trial, result)
        line = {"trial": trial.trial_id, "epoch": result["epoch"], "objective": result["objective"]}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return decision

    def _replay(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                result = json.loads(line)
            except ValueError:  # the driver was killed while it wrote this line
                continue
            trial = SimpleNamespace(trial_id=result["trial"])
            super().on_trial_add(None, trial)
            self._decide(trial, result)

    def _decide(self, trial: Any, result: dict[str, Any]) -> str:
        self._reported.add((trial.trial_id, result["epoch"]))
        decision: str = super().on_trial_result(None, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped.setdefault(trial.trial_id, result["epoch"])
        return decision


def scheduler_of(sweep: Sweep) -> TrialScheduler:
    """Ray Tune's scheduler as the space sets it."""
    settings = sweep.space.scheduler
    if settings.kind == "none":
        return FIFOScheduler()
    return _Asha(
        time_attr="epoch",
        max_t=sweep.epochs,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
    )
