"""Synthetic sweeps: what a sweep writes to MLflow, through the same calls, without running it."""

from __future__ import annotations

import copy

import yaml

from clip2scene.config import Job
from clip2scene.tracking.records import find_named
from clip2scene.tracking.sweep.record import read_sweep_run
from clip2scene.tracking.sweep.runs import FORMAT, TrialRun, sweep_run
from commands import REPOSITORY

TAU, LAMBDA = "distill.scr.tau", "distill.stcr.lambda"
JOB = yaml.safe_load((REPOSITORY / "jobs" / "demo.yaml").read_text())


def interval(key, kind, low, high):
    return {"key": key, "kind": kind, "low": low, "high": high}


def listed(key, kind, *values):
    return {"key": key, "kind": kind, "values": list(values)}


def curve(final, epochs):
    """Scores of all epochs, which rise to the final ones."""
    return [{name: value * (1 - 0.4 / (epoch + 1)) for name, value in final.items()} for epoch in range(1, epochs)] + [
        final
    ]


def write_sweep(tracker, name, parameters, trials, *, metrics=None, **about):
    """Write a sweep.

    Args:
        tracker: Where.
        name: Its name.
        parameters: As in ``sweep.json``.
        trials: Dicts with ``values``, ``state``, ``scores`` (final ones, fractions), ``epochs`` that were run, and
            ``seed``, ``variant`` and ``reason`` where there are any.
        metrics: Of the sweep's own run.
        about: What differs in ``sweep.json``.

    Returns:
        The sweep's own run.
    """
    about = {
        "format": FORMAT,
        "sweep": name,
        "title": f"The sweep {name}",
        "command": f"clip2scene sweep {name}.yaml --job jobs/demo.yaml",
        "machine": "2 cores",
        "metric": "miou",
        "parameters": parameters,
        "variants": {},
        "seeds": [0],
        "scheduler": "asha",
        "searcher": "random",
        "num_trials": len(trials),
        "epochs": 6,
        "dataset": "streetworld",
        "splits": {"train": "parametrizing", "verify": "verifying"},
        "job": JOB,
        "set": {},
        "has_labels": True,
    } | about
    selection = "labels of the verifying scenes" if about["metric"] == "miou" else "no labels"
    with sweep_run(tracker, name, f"digest-{name}", {"selection": selection, "dataset": "streetworld"}) as parent:
        parent.log_dict(about, "sweep.json")
        for number, trial in enumerate(trials):
            write_trial(tracker, parent, about, number, **trial)
        parent.log_metrics(metrics or {})
    return parent


def read_sweep(uri, name):
    """The sweep of that name that ran last."""
    return read_sweep_run(uri, find_named(uri, name)[0].info.run_id)


def write_trial(tracker, parent, about, number, values, state, scores, epochs, seed=0, variant=None, reason=""):
    settings = copy.deepcopy(about["job"]) | {"seed": seed}
    for key, value in {**about["set"], **about["variants"].get(variant, {}), **values}.items():
        *parents, last = key.split(".")
        node = settings
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    run = TrialRun(tracker, parent, about["sweep"], number, Job.model_validate(settings), variant)
    for epoch, found in enumerate(curve(scores, epochs), start=1):
        run.log_epoch(epoch, found, {"loss": 2.0 / epoch})
    if state == "running":
        run.abandon()
    elif state == "failed" or state == "diverged":
        run.end(state, {"epochs": epochs, "seconds": 8.0 * epochs}, reason)
    else:
        run.end(state, scores | {"epochs": epochs, "seconds": 8.0 * epochs}, reason)
