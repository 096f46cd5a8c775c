"""Runs a sweep: one extraction for all trials, Ray Tune over them, one MLflow run a trial, and the best job at the end.

Everything that a sweep needs to go on after it was killed lies in ``STORAGE/sweeps/NAME``: what was asked for, Ray
Tune's own state, and the trials' checkpoints.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from clip2scene.config import ConfigError
from clip2scene.jobfile import put
from clip2scene.machine import num_cpus
from clip2scene.stages import Stages
from clip2scene.storage import Storage, writing
from clip2scene.sweeps.journal import Clock, Journal, Relay
from clip2scene.sweeps.scheduler import scheduler_of
from clip2scene.sweeps.slots import trial_slots
from clip2scene.sweeps.space import TRAIN_SPLIT, VERIFY_SPLIT, Distribution, Sweep, put_together
from clip2scene.sweeps.trial import TrialWork, run_trial
from clip2scene.sweeps.watch import Watch
from clip2scene.teacher.weights import absolute
from clip2scene.tracking.sweep_best import best_yaml
from clip2scene.tracking.sweep_record import SweepRecord, read_sweep_run
from clip2scene.tracking.sweep_report import keep_sweep
from clip2scene.tracking.sweep_runs import FORMAT, is_recorded, sweep_run
from clip2scene.tracking.tracker import Run, Tracker

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow has it all
    "TUNE_GLOBAL_CHECKPOINT_S": "2",  # what a SIGKILL of the driver may lose of Tune's own state
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends us as it ends every command; what is saved is enough
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_DRIVER_MEMORY_BYTES = 200 * 2**20


def sweep_folder(storage: str | Path, name: str) -> Path:
    """Where a sweep keeps what it needs to go on."""
    return Storage(storage).path("sweeps", name)


def remember(sweep: Sweep, command: str) -> tuple[Sweep, Path]:
    """Keep what was asked for, so that ``--resume NAME`` needs no other file, from any folder.

    Returns:
        The sweep with its paths, and so its digest, as they were kept when it first began; the sweep's folder.

    Raises:
        ConfigError: another sweep has that name here.
    """
    sweep = _absolute(sweep)
    folder = sweep_folder(sweep.base.storage, sweep.space.sweep)
    path = folder / "sweep.json"
    if path.is_file():
        held, _ = recall(folder)
        if _absolute(held).digest != sweep.digest:  # an earlier revision kept paths as they were given
            raise ConfigError(
                f"sweep={sweep.space.sweep}: {folder} holds another sweep of this name, with other settings; "
                "give another name (sweep=NAME) or remove that folder"
            )
        hours = held.space.budget.model_copy(update={"hours": sweep.space.budget.hours})
        # The order of its keys is that of Tune's trials, and no part of the digest.
        return Sweep(held.space.model_copy(update={"title": sweep.space.title, "budget": hours}), held.job), folder
    values = {
        "space": sweep.space.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "job": dict(sweep.job),
    }
    Storage(sweep.base.storage).write_json(path, values | {"command": command})
    return sweep, folder


def recall(folder: Path) -> tuple[Sweep, str]:
    """The sweep that a folder holds, with the storage that the folder is in, and the command that began it.

    Raises:
        ConfigError: it holds none, or one of another version.
    """
    path = folder / "sweep.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        space, command = values["space"], values["command"]
        job = {**values["job"], "storage": str(folder.parents[1])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no sweep to resume there ({type(error).__name__})") from error
    return put_together(space, job, str(path), str(path)), command


def run_sweep(sweep: Sweep, tracker: Tracker, folder: Path, command: str, pages_at: str | None = None) -> SweepRecord:
    """Run a sweep, or what is left of it. Ray must be initialised.

    Args:
        sweep: as :func:`remember` has it.
        tracker: where the runs are kept.
        folder: the sweep's own.
        command: what the user typed first, for the report.
        pages_at: address that the report's links to runs go to; the tracker's when not given.

    Raises:
        ConfigError, DataError, StorageError, TrackingError: nothing can be run at all.
        KeyboardInterrupt: the user stopped it; it can be resumed.
    """
    space = sweep.space
    tags = {
        "dataset": sweep.base.dataset.kind,
        "selection": f"labels of the {VERIFY_SPLIT} scenes" if space.reads_labels else "no labels",
    }
    with sweep_run(tracker, space.sweep, sweep.digest, tags) as parent:
        if not is_recorded(tracker, parent):
            slots = _slots(sweep)
            labels = _prepare(sweep, folder)
            parent.log_dict(_about(sweep, command, labels), "sweep.json")
            _search(sweep, TrialWork(_absolute(sweep), folder / "trials", labels), tracker, parent, folder, slots)
            _record_counts(sweep, parent, folder, _read(tracker, parent))
        record = _read(tracker, parent)
        keep_sweep(record, parent, pages_at)
    if record.best:
        with writing(folder / "best.yaml") as aside:
            aside.write_text(best_yaml(record), encoding="utf-8")
    return record


def _prepare(sweep: Sweep, folder: Path) -> bool:
    """World, index, features and texts of all trials, each once; returns whether trials may read labels.

    Raises:
        ConfigError: selection by labels where there are none.
    """
    prepared: dict[str, Stages] = {}
    encoded = wanted = 0
    for trial in sweep.trials if sweep.space.searcher == "random" else sweep.trials[:1]:
        stages = Stages(sweep.job_of(trial))
        if stages.inputs_digest not in prepared:
            prepared[stages.inputs_digest] = stages
            stages.check_images()
            done = stages.make_inputs()
            encoded, wanted = encoded + done.images_encoded, wanted + done.images_encoded + done.images_cached
            stages.text(stages.vocabulary, stages.job.prompts.templates)
    _add(folder, images_encoded=encoded)
    _set(folder, images_wanted=wanted)
    if not sweep.space.labels:
        return False
    labels = all(stages.labels_for_scores for stages in prepared.values())
    if not labels and sweep.space.reads_labels:
        raise ConfigError(
            f"metric=miou: not every {VERIFY_SPLIT} keyframe has labels; allowed: agreement, consistency, label_free"
        )
    return labels


def _search(sweep: Sweep, work: TrialWork, tracker: Tracker, parent: Run, folder: Path, slots: int) -> None:
    """Hand the trials to Ray Tune, or what is left of them."""
    for name, value in _TUNE.items():
        os.environ.setdefault(name, value)
    from ray import tune

    trainable = tune.with_resources(tune.with_parameters(run_trial, work=work), _resources(sweep))
    space = sweep.space
    with Watch(space.sweep, space.metric, len(sweep.trials), sweep.epochs) as watch:
        elapsed = _Elapsed(folder)
        journal = Journal(sweep, tracker, parent, watch, elapsed)
        where = folder / "tune"
        if tune.Tuner.can_restore(str(where)):
            Relay(journal)
            tuner = tune.Tuner.restore(str(where), trainable, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=_param_space(sweep),
                tune_config=tune.TuneConfig(
                    metric="objective",
                    mode="max",
                    scheduler=scheduler_of(sweep),
                    search_alg=_searcher(sweep),
                    num_samples=len(sweep.trials) if space.searcher == "tpe" else 1,
                    max_concurrent_trials=slots,
                    reuse_actors=space.resources.num_workers == 0,
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=str(folder),
                    failure_config=tune.FailureConfig(max_failures=space.resources.max_failures),
                    callbacks=[Relay(journal)],
                    stop=Clock(),
                    verbose=0,
                ),
            )
        try:
            tuner.fit()
            journal.finish()
        finally:
            journal.abandon()
            elapsed()


def _param_space(sweep: Sweep) -> dict[str, Any]:
    """What Tune varies: the trials' numbers where all was drawn beforehand, else the searched settings."""
    from ray import tune

    if sweep.space.searcher == "random":
        return {"trial": tune.grid_search([trial.number for trial in sweep.trials])}
    return {key: _domain(values) for key, values in sweep.space.parameters.items()}


def _domain(values: Distribution) -> Any:
    from ray import tune

    if values.choice is not None:
        return tune.choice(list(values.choice))
    low, high = values.bounds
    if values.randint is not None:
        return tune.randint(int(low), int(high) + 1)
    return (tune.uniform if values.uniform is not None else tune.loguniform)(low, high)


def _searcher(sweep: Sweep) -> Any:
    if sweep.space.searcher == "random":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(metric="objective", mode="max", seed=sweep.space.seed)


def _resources(sweep: Sweep) -> dict[str, float]:
    """What Tune books for a trial's own process; its workers book theirs themselves, within :func:`trial_slots`."""
    if sweep.space.resources.num_workers == 0:
        return {"cpu": sweep.space.resources.threads_per_worker}
    return {"cpu": 0, "memory": _DRIVER_MEMORY_BYTES}  # an empty bundle is refused


def _slots(sweep: Sweep) -> int:
    import ray

    return trial_slots((node["Resources"] for node in ray.nodes() if node["Alive"]), sweep.space.resources)


def _absolute(sweep: Sweep) -> Sweep:
    """The sweep with absolute paths: a trial's process may run in another folder."""
    base, values = sweep.base, copy.deepcopy(dict(sweep.job))
    put(values, "storage", str(Storage(base.storage).root), "job")
    if base.dataset.root is not None:
        put(values, "dataset.root", str(Path(base.dataset.root).expanduser().resolve()), "job")
    teacher = absolute(base.teacher)
    for key in ("model", "pretrained"):
        if getattr(teacher, key) != getattr(base.teacher, key):
            put(values, f"teacher.{key}", getattr(teacher, key), "job")
    return Sweep(sweep.space, values)


def _about(sweep: Sweep, command: str, labels: bool) -> dict[str, Any]:
    """The contents of the run's ``sweep.json``."""
    space = sweep.space
    parameters = []
    for key, values in space.parameters.items():
        found = (
            {"values": list(values.values)} if values.values else dict(zip(("low", "high"), values.bounds, strict=True))
        )
        parameters.append({"key": key, "kind": values.kind, **found})
    return {
        "format": FORMAT,
        "sweep": space.sweep,
        "title": space.title or space.sweep,
        "command": command,
        "machine": f"{num_cpus()} cores, {platform.machine()}, Python {platform.python_version()}",
        "metric": space.metric,
        "parameters": parameters,
        "variants": space.variants,
        "seeds": list(sweep.seeds),
        "scheduler": space.scheduler.kind,
        "searcher": space.searcher,
        "num_trials": len(sweep.trials),
        "epochs": sweep.epochs,
        "dataset": sweep.base.dataset.kind,
        "splits": {"train": TRAIN_SPLIT, "verify": VERIFY_SPLIT},
        "job": dict(sweep.job),
        "set": space.set_,
        "has_labels": labels,
    }


def _read(tracker: Tracker, parent: Run) -> SweepRecord:
    with tracker.told("read the sweep"):
        return read_sweep_run(tracker.uri, parent.run_id)


def _record_counts(sweep: Sweep, parent: Run, folder: Path, record: SweepRecord) -> None:
    """What the sweep cost, once, when it is over."""
    counts = _counts(folder)
    finals = [trial.finals for trial in record.trials]
    parent.log_metrics(
        {
            **counts,
            "images_cached": counts["images_wanted"] - counts["images_encoded"],
            "epochs_run": sum(final.get("epochs", 0) for final in finals),
            "epochs_full": len(sweep.trials) * sweep.epochs,
            "trials": len(finals),
        }
    )


class _Elapsed:
    """Adds the seconds since it was last called, so that a driver that is killed loses those of its last trials."""

    def __init__(self, folder: Path):
        self._folder, self._since_s = folder, time.monotonic()

    def __call__(self) -> None:
        now_s = time.monotonic()
        _add(self._folder, seconds=now_s - self._since_s)
        self._since_s = now_s


def _counts(folder: Path) -> dict[str, float]:
    """What all attempts at the sweep did together; of an extraction that was killed nothing is known."""
    path = folder / "counts.json"
    counts: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return counts


def _add(folder: Path, **more: float) -> None:
    counts = _counts(folder)
    _set(folder, **{name: counts.get(name, 0) + value for name, value in more.items()})


def _set(folder: Path, **values: float) -> None:
    with writing(folder / "counts.json") as aside:
        aside.write_text(json.dumps(_counts(folder) | values), encoding="utf-8")
