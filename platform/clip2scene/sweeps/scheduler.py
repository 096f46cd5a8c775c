"""Which trials are stopped early."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from clip2scene.sweeps.space import Sweep


class _Asha(ASHAScheduler):
    """ASHA whose stops outlive a killed driver.

    Ray's forgets one that was decided but not yet carried out: its rung has the trial already, and a trial that comes
    again to a rung that has it goes on.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self._stopped: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self._stopped.add(trial.trial_id)
        return TrialScheduler.STOP if trial.trial_id in self._stopped else decision


def scheduler_of(sweep: Sweep) -> TrialScheduler:
    """Ray Tune's scheduler as the space asks for it."""
    settings = sweep.space.scheduler
    if settings.kind == "none":
        return FIFOScheduler()
    return _Asha(
        time_attr="epoch",
        max_t=sweep.epochs,
        grace_period=settings.grace_epochs,
        reduction_factor=settings.reduction_factor,
    )
