"""A sweep as text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from clip2scene.progress import duration
from clip2scene.tracking.sweep.comparison import ranking
from clip2scene.tracking.sweep.names import correlation_text, score_name, short_names, value_text
from clip2scene.tracking.sweep.record import ENDED, Configuration, SweepRecord, TrialRecord
from clip2scene.tracking.sweep.runs import OBJECTIVES
from clip2scene.tracking.text import new_table, plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType

BEST, SO_FAR = "*", "so far"
TEXTUAL = ("variant", "state", "trials")
"""Headings of columns that hold words."""
_COUNTS = ("images_encoded", "images_wanted", "images_cached", "epochs_run", "epochs_full")
_COMPARED_RUNS = 100
"""The most runs that MLflow's compare page takes."""


def scores_shown(record: SweepRecord) -> tuple[str, ...]:
    """The objective, and the other scores that any trial has."""
    others = [name for name in OBJECTIVES if name != record.metric]
    return (record.metric, *(name for name in others if any(t.latest_score(name) is not None for t in record.trials)))


def legend(record: SweepRecord) -> str:
    """What the numbers of the tables are."""
    spread = "; mean ± sample standard deviation over the seeds that are compared" if has_seeds(record) else ""
    legend = (
        f"Scores in percent on the {record.about['splits']['verify']} scenes, at a trial's last epoch{spread}. Trials "
        f"that ran all {record.about['epochs']} epochs come first; the scores of others are of fewer."
    )
    if any(trial.so_far for trial in record.trials):
        legend += f" {SO_FAR!r}: the trial has not ended, and these are its latest scores."
    return legend


def has_seeds(record: SweepRecord) -> bool:
    """Whether configurations were trained with more than one seed."""
    return len(record.about["seeds"]) > 1


def trial_headings(record: SweepRecord) -> tuple[str, ...]:
    """Headings of :func:`trial_texts`."""
    seed = ("seed",) if has_seeds(record) else ()
    scores = (f"{score_name(name)} (%)" for name in scores_shown(record))
    return ("trial", *_settings_headings(record), *seed, "epochs", *scores, "state", "time")


def trial_texts(record: SweepRecord, trial: TrialRecord) -> tuple[str, ...]:
    """Number, settings, epochs, scores, state, time; a dash for what is missing."""
    seed = (str(trial.seed),) if has_seeds(record) else ()
    scores = (_number(trial.latest_score(name)) for name in scores_shown(record))
    epochs = "–" if trial.epochs is None else str(trial.epochs)
    epochs = f"{trial.so_far['epochs']} {SO_FAR}" if trial.so_far else epochs
    return (f"{trial.number:02d}", *_settings(record, trial), *seed, epochs, *scores, trial.state, _time(trial.seconds))


def configuration_headings(record: SweepRecord) -> tuple[str, ...]:
    """Headings of :func:`configuration_texts`."""
    scores = (f"{score_name(name)} (%)" for name in scores_shown(record))
    return (*_settings_headings(record), "seeds", "epochs", *scores, "trials")


def configuration_texts(record: SweepRecord, configuration: Configuration) -> tuple[str, ...]:
    """Settings, how many of its seeds are compared and after how many epochs, their scores, and all trials."""
    scores = []
    for name in scores_shown(record):
        mean, deviation = configuration.score(name)
        scores.append("–" if mean is None else f"{mean:.1f} ± {_number(deviation)}")
    seeds = f"{len(configuration.compared)} of {len(configuration.trials)}"
    epochs = "–" if configuration.epochs is None else str(configuration.epochs)
    numbers = ", ".join(f"{trial.number:02d}" for trial in configuration.trials)
    return (*_settings(record, configuration), seeds, epochs, *scores, numbers)


def sentences(record: SweepRecord) -> Iterator[str]:
    """How far it is, what failed, its cost, how trials were selected, and how well scores without labels rank them."""
    if record.num_left:
        yield _progress(record)
    for trial in record.trials:
        if trial.reason:
            yield f"trial {trial.number:02d} {trial.state}: {trial.reason}"
    if "epochs_run" in record.metrics:
        if record.num_left:
            yield (
                f"{record.num_left} of {record.about['num_trials']} trials failed or lacked time (budget.hours); "
                "the same command goes on with them"
            )
        counts = {name: int(record.metrics[name]) for name in _COUNTS}
        yield (
            f"images encoded: {counts['images_encoded']} of the {counts['images_wanted']} that the trials read; "
            f"{counts['images_cached']} were in the feature store"
        )
        share = counts["epochs_run"] / counts["epochs_full"]
        yield (
            f"epochs run: {counts['epochs_run']} of {counts['epochs_full']} ({share:.0%}) that "
            f"{record.about['num_trials']} full trials have; {duration(record.metrics['seconds'])}"
        )
    yield f"selected by {score_name(record.metric)} ({record.selection})"
    if record.about["has_labels"]:
        yield _ranking(record)


def provenance(record: SweepRecord) -> dict[str, str]:
    """What the scores hold for."""
    about = record.about
    found = {
        "dataset": about["dataset"],
        "scenes": f"trained on {about['splits']['train']}, scored on {about['splits']['verify']}",
        "seeds": ", ".join(map(str, about["seeds"])),
        "search": f"{about['num_trials']} trials, searcher {about['searcher']}, scheduler {about['scheduler']}",
        "in all trials": ", ".join(f"{key}={value_text(value)}" for key, value in about["set"].items()) or "–",
        "code": record.git_revision,
        "machine": about["machine"],
        "command": about["command"],
        "MLflow run": record.run_id,
    }
    return {key: str(value) for key, value in found.items()}


def sweep_text(record: SweepRecord) -> str:
    """The sweep as plain text."""
    return plain_text(_parts(record))


def compare_url(record: SweepRecord, pages_at: str | None = None) -> str:
    """MLflow's compare page of the best trials, at most the hundred that it takes."""
    chosen = sorted(record.trials, key=record.order)[:_COMPARED_RUNS]
    asked = {"runs": [trial.run_id for trial in chosen], "experiments": [record.experiment_id]}
    words = "&".join(f"{name}={quote(json.dumps(values))}" for name, values in asked.items())
    # Without the type, the UI shows its menus for language models.
    return f"{pages_at or record.uri}/#/compare-runs?{words}&workflowType=machine_learning"


def _parts(record: SweepRecord) -> Iterator[RenderableType]:
    title = f"{record.about['title']} ({record.about['dataset']})"
    if has_seeds(record):
        chosen = [record.configurations[0]] if record.best else []
        yield _table(title, configuration_headings(record), record.configurations, chosen, configuration_texts, record)
        title = "trials"
    best = [record.best_trial] if record.best_trial else []
    trials = sorted(record.trials, key=record.order)
    yield _table(title, trial_headings(record), trials, best, trial_texts, record)
    best_row = "the best configuration, and its best trial" if has_seeds(record) else "the best"
    yield f"{BEST} {best_row}. {legend(record)}" if best else legend(record)
    yield "\n".join(sentences(record))
    yield "\n".join(f"{key}: {value}" for key, value in provenance(record).items())


def _table(
    title: str,
    headings: Sequence[str],
    rows: Sequence[Any],
    best: Sequence[Any],
    texts: Callable[[SweepRecord, Any], Sequence[str]],
    record: SweepRecord,
) -> RenderableType:
    table = new_table(title)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in TEXTUAL else "right", no_wrap=True)
    for row in rows:
        table.add_row(BEST if row in best else "", *texts(record, row))
    return table


def _settings_headings(record: SweepRecord) -> tuple[str, ...]:
    return (*short_names(record.keys).values(), *(("variant",) if record.about["variants"] else ()))


def _settings(record: SweepRecord, of: TrialRecord | Configuration) -> tuple[str, ...]:
    values: Mapping[str, Any] = of.values
    texts = [value_text(values[key]) if key in values else "–" for key in record.keys]
    return (*texts, *((of.variant or "–",) if record.about["variants"] else ()))


def _progress(record: SweepRecord) -> str:
    """``2 of 12 trials ended, 1 running, 9 to come``."""
    states = Counter(trial.state for trial in record.trials if trial.state not in ENDED)
    ended = len(record.trials) - states.total()
    others = states | {"to come": record.about["num_trials"] - len(record.trials)}
    listed = (f", {count} {state}" for state, count in others.items() if count)
    return f"{ended} of {record.about['num_trials']} trials ended{''.join(listed)}"


def _ranking(record: SweepRecord) -> str:
    found = ranking(record)
    if found is None:
        return (
            "Spearman rank correlation with mIoU: none, fewer than three trials have differing scores at the same epoch"
        )
    compared = found.compared
    others = [
        f"{score_name(name)} {correlation_text(other.spearman)}"
        for name in ("agreement", "consistency")
        if (other := ranking(record, name)) is not None
    ]
    return (
        f"Spearman rank correlation with mIoU over the {len(compared.trials)} trials {compared.which}: "
        f"label-free {correlation_text(found.spearman)}{''.join(f', {other}' for other in others)}"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _time(seconds: float) -> str:
    return "–" if math.isnan(seconds) else duration(seconds)
