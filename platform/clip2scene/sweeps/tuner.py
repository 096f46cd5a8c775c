"""A sweep's trials in Ray Tune: what is varied, who searches, what is booked, and how it goes on after a kill."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from ray import tune

from clip2scene.machine import ray_nodes
from clip2scene.sweeps.counts import Counts
from clip2scene.sweeps.distribution import Distribution
from clip2scene.sweeps.journal import HoursOverError, Journal, JournalCallback
from clip2scene.sweeps.progress import SweepProgress
from clip2scene.sweeps.scheduler import REPORTED, scheduler_of
from clip2scene.sweeps.slots import trial_slots
from clip2scene.sweeps.sweep import Sweep
from clip2scene.sweeps.trial import TrialWork, run_trial
from clip2scene.tracking.run import Run
from clip2scene.tracking.tracker import Tracker

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has everything
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # how much of Tune's own state a SIGKILL of the driver may lose
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends this command like any other; what is saved is enough
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_STATE = "tune"
_DRIVER_MEMORY_BYTES = 200 * 2**20


def search(
    sweep: Sweep,
    work: TrialWork,
    tracker: Tracker,
    parent: Run,
    folder: Path,
    slots: int,
    extended_from: tuple[int, ...] = (),
) -> None:
    """Run the trials, or those left of an interrupted sweep, at most ``slots`` at once; ``folder`` is the sweep's.

    Ray Tune cannot add trials to an experiment, so each extension of a sweep is an experiment of its own, and begins
    with what earlier trials reported to the scheduler.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    trainable = tune.with_resources(tune.with_parameters(run_trial, work=work), _resources(sweep))
    space, counts, starts = sweep.space, Counts(folder), (0, *extended_from)
    with SweepProgress(space.sweep, space.metric, len(sweep.trials), sweep.epochs) as progress:
        journal = Journal(sweep, tracker, parent, progress, on_ended=counts.add_seconds)
        callback = JournalCallback(journal)
        try:
            for place, (first, end) in enumerate(itertools.pairwise((*starts, len(sweep.trials)))):
                journal.num_before = first
                state = _state(folder, first)
                if tune.Tuner.can_restore(str(state)):
                    tuner = tune.Tuner.restore(str(state), trainable, resume_unfinished=True, resume_errored=True)
                else:
                    if first:
                        _take_reports(_state(folder, starts[place - 1]), state)
                    tuner = _new_tuner(sweep, trainable, callback, state, range(first, end), slots)
                tuner.fit()
        except HoursOverError:
            journal.pause()
        finally:
            journal.abandon()
            counts.add_seconds()


def _new_tuner(
    sweep: Sweep, trainable: Any, callback: JournalCallback, state: Path, numbers: range, slots: int
) -> tune.Tuner:
    space = sweep.space
    return tune.Tuner(
        trainable,
        param_space=_param_space(sweep, numbers),
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            scheduler=scheduler_of(sweep),
            search_alg=_searcher(sweep),
            num_samples=len(numbers) if space.searcher == "tpe" else 1,
            max_concurrent_trials=slots,
            reuse_actors=space.resources.num_workers == 0,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            storage_path=str(state.parent),
            failure_config=tune.FailureConfig(max_failures=space.resources.max_failures),
            callbacks=[callback],
            verbose=0,
        ),
    )


def _state(folder: Path, first: int) -> Path:
    """Folder of the experiment that begins with this trial."""
    return folder / (f"{_STATE}-{first}" if first else _STATE)


def _take_reports(earlier: Path, state: Path) -> None:
    if (earlier / REPORTED).is_file():  # ASHA's
        state.mkdir(exist_ok=True)
        shutil.copyfile(earlier / REPORTED, state / REPORTED)


def has_begun(folder: Path) -> bool:
    """Whether Ray Tune has begun the sweep of this folder."""
    return bool(tune.Tuner.can_restore(str(folder / _STATE)))


def slots_of(sweep: Sweep) -> int:
    """Return how many trials fit at once into what Ray has.

    Raises:
        ConfigError: not even one fits.
    """
    return trial_slots(ray_nodes(), sweep.space.resources)


def _param_space(sweep: Sweep, numbers: range) -> dict[str, Any]:
    """What Tune varies: the trials' numbers if all draws were made beforehand, otherwise the searched settings."""
    if sweep.space.searcher == "random":
        return {"trial": tune.grid_search(list(numbers))}
    return {key: _domain(distribution) for key, distribution in sweep.space.parameters.items()}


def _domain(distribution: Distribution) -> Any:
    if distribution.choice is not None:
        return tune.choice(list(distribution.choice))
    low, high = distribution.bounds
    if distribution.randint is not None:
        return tune.randint(int(low), int(high) + 1)
    return (tune.uniform if distribution.uniform is not None else tune.loguniform)(low, high)


def _searcher(sweep: Sweep) -> Any:
    if sweep.space.searcher == "random":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(metric="objective", mode="max", seed=sweep.space.seed)


def _resources(sweep: Sweep) -> dict[str, float]:
    """What Tune reserves for a trial's own process; its workers reserve theirs within :func:`trial_slots`."""
    if sweep.space.resources.num_workers == 0:
        return {"cpu": sweep.space.resources.threads_per_worker}
    return {"cpu": 0, "memory": _DRIVER_MEMORY_BYTES}  # Ray refuses an empty bundle
