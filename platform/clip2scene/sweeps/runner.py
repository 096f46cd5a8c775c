"""Runs a sweep: one extraction for all trials, Ray Tune over them, one MLflow run per trial, and the best job.

Everything that a sweep needs to go on after a kill is in ``STORAGE/sweeps/NAME``: what was asked for, Ray Tune's state,
and the trials' checkpoints.
"""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip2scene.errors import ConfigError
from clip2scene.jobfile import put
from clip2scene.machine import description
from clip2scene.paths import relative_paths
from clip2scene.progress import say
from clip2scene.stages import Stages
from clip2scene.storage import Storage, locked, writing
from clip2scene.sweeps.counts import Counts
from clip2scene.sweeps.space import TRAIN_SPLIT, VERIFY_SPLIT
from clip2scene.sweeps.sweep import Sweep, combine
from clip2scene.sweeps.trial import TrialWork
from clip2scene.sweeps.tuner import has_begun, search, slots_of
from clip2scene.tracking.run import Run
from clip2scene.tracking.sweep.best import best_yaml
from clip2scene.tracking.sweep.keep import keep_best, keep_sweep
from clip2scene.tracking.sweep.record import SweepRecord, read_sweep_run
from clip2scene.tracking.sweep.runs import FORMAT, is_complete, is_known, sweep_run
from clip2scene.tracking.table.record import metrics_of
from clip2scene.tracking.tracker import Tracker
from clip2scene.training.samples import check_window

TRIALS = "trials"
"""Folder of the trials' checkpoints, in the sweep's own."""
_SHOWN = 5
"""How many differing settings a sentence names."""


@dataclass(frozen=True)
class KeptSweep:
    """A sweep as its folder keeps it, so that ``--resume NAME`` needs no other file and works from any folder."""

    sweep: Sweep
    """With absolute paths."""
    folder: Path
    id: str
    """Of this sweep alone: another one with the same settings, in another storage, has other trials."""
    command: str
    """That began it, for the report."""
    tracking_uri: str | None
    """The MLflow server that it began on; None for the one in its storage."""
    extended_from: tuple[int, ...] = ()
    """How many trials it had before each time that more were asked for."""


def remember(sweep: Sweep, command: str, tracking_uri: str | None) -> KeptSweep:
    """Keep what was asked for: a new sweep, or more trials of a kept one.

    Returns:
        The sweep as it was first kept, but with the title, hours and number of trials of this one.

    Raises:
        ConfigError: the storage holds another sweep of that name.
    """
    sweep = _absolute(sweep)
    storage = Storage(sweep.job.storage)
    folder = storage.path("sweeps", sweep.space.sweep)
    path = folder / "sweep.json"
    if path.is_file():
        kept = recall(folder)
        held = kept.sweep
        if held.digest != sweep.digest:
            differences = sweep.differences(held)
            longer = held.with_trials_of(sweep) if differences.keys() == {"num_trials"} else None
            if longer is None:
                raise ConfigError(_refusal(sweep.space.sweep, folder, differences))
            extended_from = (*kept.extended_from, len(held.trials))
            kept = replace(kept, sweep=longer, command=command, extended_from=extended_from)
            _write(storage, kept)
            held = longer
        hours = held.space.budget.model_copy(update={"hours": sweep.space.budget.hours})
        # Tune numbered the trials by the order of the keys that was kept; the digest does not depend on that order.
        space = held.space.model_copy(update={"title": sweep.space.title, "budget": hours})
        return replace(kept, sweep=Sweep(space, held.job_values))
    kept = KeptSweep(sweep, folder, uuid.uuid4().hex, command, tracking_uri)
    _write(storage, kept)
    return kept


def _write(storage: Storage, kept: KeptSweep) -> None:
    values = {
        "id": kept.id,
        "space": kept.sweep.space.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        "job": dict(kept.sweep.job_values),
        "command": kept.command,
        "tracking_uri": kept.tracking_uri,
        "extended_from": kept.extended_from,
    }
    storage.write_json(kept.folder / "sweep.json", values)


def _refusal(name: str, folder: Path, differences: Mapping[str, tuple[str, str]]) -> str:
    changes = [f"{key}={new} (there {old})" for key, (new, old) in differences.items()]
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    draws = "only a larger num_trials with searcher=random, no grid and no variants adds trials; "
    return (
        f"sweep={name}: {folder} holds another sweep of this name, with other settings: "
        f"{', '.join(changes[:_SHOWN])}{more}; {draws if 'num_trials' in differences else ''}"
        "give another name (sweep=NAME) or remove that folder"
    )


def recall(folder: Path) -> KeptSweep:
    """Return the sweep that a folder holds, with the storage that the folder is in.

    Raises:
        ConfigError: the folder holds no sweep, or one of another version.
    """
    path = folder / "sweep.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        space, job = values["space"], {**values["job"], "storage": str(folder.parents[1])}
        about = (values["id"], values["command"], values["tracking_uri"], tuple(values.get("extended_from", ())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no sweep to resume there ({type(error).__name__})") from error
    return KeptSweep(combine(space, job, str(path), str(path)), folder, *about)


def run_sweep(kept: KeptSweep, tracker: Tracker, pages_at: str | None = None) -> SweepRecord:
    """Run a sweep, or what is left of it, failed trials included. Ray must be initialised.

    A second call at the same time waits for the first.

    Args:
        kept: from :func:`remember` or :func:`recall`.
        tracker: where the runs are kept.
        pages_at: address that the report's links to runs point to; the tracker's when not given.

    Raises:
        ConfigError: the sweep's trials are on another MLflow server; or as below.
        ConfigError, DataError, StorageError, TrackingError: nothing can be run at all.
        KeyboardInterrupt: the user stopped it; it can be resumed.
    """
    sweep, folder = kept.sweep, kept.folder
    space = sweep.space
    tags = {
        "dataset": sweep.job.dataset.kind,
        "selection": f"labels of the {VERIFY_SPLIT} scenes" if space.reads_labels else "no labels",
    }
    with locked(folder, "runs this sweep"), _sweep_run(kept, tracker, tags) as parent:
        # The metrics of a sweep that is being extended are those of before.
        all_recorded = metrics_of(tracker, parent).get("trials") == len(sweep.trials)
        if not (all_recorded and is_complete(tracker, parent)):
            slots = slots_of(sweep)  # before hours of preparation
            labels = _prepare(sweep, folder)
            parent.log_dict(_about(sweep, kept.command, labels), "sweep.json")
            work = TrialWork(sweep, folder / TRIALS, labels)
            search(sweep, work, tracker, parent, folder, slots, kept.extended_from)
            record = _read(tracker, parent)
            keep_best(record, parent)  # before the counts, which say that the sweep is complete
            _record_counts(sweep, parent, folder, record)
        record = _read(tracker, parent)
        if not record.num_left:
            shutil.rmtree(folder / TRIALS, ignore_errors=True)  # checkpoints, which nothing will continue from
        keep_sweep(record, parent, pages_at)
    if record.best:
        with writing(folder / "best.yaml") as aside:
            aside.write_text(best_yaml(record), encoding="utf-8")
    return record


def _sweep_run(kept: KeptSweep, tracker: Tracker, tags: Mapping[str, str]) -> AbstractContextManager[Run]:
    """The sweep's own run. Ray Tune never repeats a trial, so another server would lack those that ended before."""
    name = kept.sweep.space.sweep
    if has_begun(kept.folder) and not is_known(tracker, name, kept.id):
        server = f"--tracking-uri {kept.tracking_uri}" if kept.tracking_uri else "no --tracking-uri"
        raise ConfigError(
            f"sweep {name!r}: its trials are not on MLflow at {tracker.uri}, where none can be added to them; allowed: "
            f"the server that it began on ({server}), or another name (sweep=NAME)"
        )
    return sweep_run(tracker, name, kept.id, tags)


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
                say(f"index: {sentence}")
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
    values = copy.deepcopy(dict(sweep.job_values))
    for key, (_, path) in relative_paths(sweep.job).items():
        put(values, key, path, "job")
    return Sweep(sweep.space, values)


def _about(sweep: Sweep, command: str, labels: bool) -> dict[str, Any]:
    """Contents of the run's ``sweep.json``."""
    space = sweep.space
    parameters = []
    for key, distribution in space.parameters.items():
        found = (
            {"values": list(distribution.values)}
            if distribution.values
            else dict(zip(("low", "high"), distribution.bounds, strict=True))
        )
        parameters.append({"key": key, "kind": distribution.kind, **found})
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
        "dataset": sweep.job.dataset.kind,
        "splits": {"train": TRAIN_SPLIT, "verify": VERIFY_SPLIT},
        "job": dict(sweep.job_values),
        "set": space.set_,
        "has_labels": labels,
    }


def _read(tracker: Tracker, parent: Run) -> SweepRecord:
    with tracker.synced("read the sweep"):
        return read_sweep_run(tracker.uri, parent.run_id)


def _record_counts(sweep: Sweep, parent: Run, folder: Path, record: SweepRecord) -> None:
    """Log what the sweep has cost when all its trials or its hours are over."""
    counts = Counts(folder).read()
    finals = [trial.finals for trial in record.trials]
    parent.log_metrics(
        {
            **counts,
            "images_cached": counts["images_wanted"] - counts["images_encoded"],
            "epochs_run": sum(final.get("epochs", 0) for final in finals),
            "epochs_full": len(sweep.trials) * sweep.epochs,
            "trials": len(finals),
            "trials_left": record.num_left,
        }
    )
