"""Runs a sweep: one extraction for all trials, Ray Tune over them, one MLflow run per trial, and the best job.

Everything that a sweep needs to go on after a kill is in ``STORAGE/sweeps/NAME``: what was asked for, Ray Tune's state,
and the trials' checkpoints.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from clip2scene.config import ConfigError
from clip2scene.jobfile import put
from clip2scene.machine import description
from clip2scene.progress import console
from clip2scene.stages import Stages
from clip2scene.storage import Storage, folder_of, writing
from clip2scene.sweeps.counts import Counts
from clip2scene.sweeps.space import TRAIN_SPLIT, VERIFY_SPLIT
from clip2scene.sweeps.sweep import Sweep, combine
from clip2scene.sweeps.trial import TrialWork
from clip2scene.sweeps.tuner import search, slots_of
from clip2scene.teacher.weights import absolute
from clip2scene.tracking.run import Run
from clip2scene.tracking.sweep.best import best_yaml
from clip2scene.tracking.sweep.keep import keep_sweep
from clip2scene.tracking.sweep.record import SweepRecord, read_sweep_run
from clip2scene.tracking.sweep.runs import FORMAT, is_recorded, sweep_run
from clip2scene.tracking.tracker import Tracker
from clip2scene.training.samples import check_window


def remember(sweep: Sweep, command: str) -> tuple[Sweep, Path]:
    """Keep what was asked for, so that ``--resume NAME`` needs no other file and works from any folder.

    Returns:
        The sweep as it was first kept, with absolute paths, but with the title and hours of this one; its folder.

    Raises:
        ConfigError: the storage holds another sweep of that name.
    """
    sweep = _absolute(sweep)
    storage = Storage(sweep.base.storage)
    folder = storage.path("sweeps", sweep.space.sweep)
    path = folder / "sweep.json"
    if path.is_file():
        held, _ = recall(folder)
        if held.digest != sweep.digest:
            raise ConfigError(
                f"sweep={sweep.space.sweep}: {folder} holds another sweep of this name, with other settings; "
                "give another name (sweep=NAME) or remove that folder"
            )
        hours = held.space.budget.model_copy(update={"hours": sweep.space.budget.hours})
        # Tune numbered the trials by the order of the keys that was kept; the digest does not depend on that order.
        return Sweep(held.space.model_copy(update={"title": sweep.space.title, "budget": hours}), held.job), folder
    values = {
        "space": sweep.space.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "job": dict(sweep.job),
    }
    storage.write_json(path, values | {"command": command})
    return sweep, folder


def recall(folder: Path) -> tuple[Sweep, str]:
    """Return the sweep that a folder holds, with the storage that the folder is in, and the command that began it.

    Raises:
        ConfigError: the folder holds no sweep, or one of another version.
    """
    path = folder / "sweep.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        space, command = values["space"], values["command"]
        job = {**values["job"], "storage": str(folder.parents[1])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no sweep to resume there ({type(error).__name__})") from error
    return combine(space, job, str(path), str(path)), command


def run_sweep(sweep: Sweep, tracker: Tracker, folder: Path, command: str, pages_at: str | None = None) -> SweepRecord:
    """Run a sweep, or what is left of it. Ray must be initialised.

    Args:
        sweep: from :func:`remember` or :func:`recall`.
        tracker: where the runs are kept.
        folder: the sweep's own.
        command: the command that began it, for the report.
        pages_at: address that the report's links to runs point to; the tracker's when not given.

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
            slots = slots_of(sweep)  # before hours of preparation
            labels = _prepare(sweep, folder)
            parent.log_dict(_about(sweep, command, labels), "sweep.json")
            search(sweep, TrialWork(sweep, folder / "trials", labels), tracker, parent, folder, slots)
            _record_counts(sweep, parent, folder, _read(tracker, parent))
        record = _read(tracker, parent)
        keep_sweep(record, parent, pages_at)
    if record.best:
        with writing(folder / "best.yaml") as aside:
            aside.write_text(best_yaml(record), encoding="utf-8")
    return record


def _prepare(sweep: Sweep, folder: Path) -> bool:
    """Make world, index, features and texts of all trials, each once; return whether trials may read labels.

    Raises:
        ConfigError: trials are selected by labels, and there are none; or a window of sweeps is too long for the index.
        DataError: there is no image to distil from.
    """
    indexed: dict[str, Stages] = {}
    for job in map(sweep.job_of, sweep.extremes):
        stages = indexed.setdefault(job.dataset.digest(), Stages(job))
        check_window(stages.train_frames, job.distill, job.dataset.max_sweeps)
    prepared: dict[str, Stages] = {}
    encoded = wanted = 0
    for trial in sweep.trials if sweep.space.searcher == "random" else sweep.trials[:1]:
        stages = Stages(sweep.job_of(trial))
        if stages.inputs_digest not in prepared:
            prepared[stages.inputs_digest] = stages
            stages.check_images()
            for sentence in stages.omissions:
                console().print(f"index: {sentence}", markup=False, soft_wrap=True)
            done = stages.make_inputs()
            encoded, wanted = encoded + done.images_encoded, wanted + done.images_encoded + done.images_cached
            stages.text(stages.vocabulary, stages.job.prompts.templates)
    counts = Counts(folder)
    counts.add(images_encoded=encoded)
    counts.set(images_wanted=wanted)
    if not sweep.space.labels:
        return False
    labels = all(stages.labels_for_scores for stages in prepared.values())
    if not labels and sweep.space.reads_labels:
        raise ConfigError(
            f"metric=miou: not every {VERIFY_SPLIT} keyframe has labels; allowed: agreement, consistency, label_free"
        )
    return labels


def _absolute(sweep: Sweep) -> Sweep:
    """The sweep with absolute paths: a trial's process may run in another folder, and so may a resumed sweep."""
    base, values = sweep.base, copy.deepcopy(dict(sweep.job))
    put(values, "storage", str(folder_of(base.storage)), "job")
    if base.dataset.root is not None:
        put(values, "dataset.root", str(Path(base.dataset.root).expanduser().resolve()), "job")
    teacher = absolute(base.teacher)
    for key in ("model", "pretrained"):
        if getattr(teacher, key) != getattr(base.teacher, key):
            put(values, f"teacher.{key}", getattr(teacher, key), "job")
    return Sweep(sweep.space, values)


def _about(sweep: Sweep, command: str, labels: bool) -> dict[str, Any]:
    """Contents of the run's ``sweep.json``."""
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
        "machine": description(),
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
    with tracker.synced("read the sweep"):
        return read_sweep_run(tracker.uri, parent.run_id)


def _record_counts(sweep: Sweep, parent: Run, folder: Path, record: SweepRecord) -> None:
    """Log what the sweep cost, once, when it is over."""
    counts = Counts(folder).read()
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
