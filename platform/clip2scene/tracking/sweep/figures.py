"""All figures of a sweep, from its record.

Scores are in percent. A point is a configuration, its score the mean over its seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clip2scene.tracking.figures.style import BLUE, GREY, INK, ORANGE, legend, new_figure, quiet
from clip2scene.tracking.records import mean_and_deviation
from clip2scene.tracking.sweep.axes import ParameterAxis, axes_of
from clip2scene.tracking.sweep.charts import Point, curve, parallel, strip, surface
from clip2scene.tracking.sweep.comparison import Comparison, compare, ranking
from clip2scene.tracking.sweep.names import correlation_text, score_name
from clip2scene.tracking.sweep.record import SweepRecord, TrialRecord

_STATES = {"finished": BLUE, "stopped": "#b4b9c0", "diverged": "#b3261e", "failed": "#b3261e"}
_EXPLAINED_TRIALS = 4
"""Functional ANOVA of fewer trials explains nothing."""
_LABEL_FREE = ("label_free", "agreement", "consistency")


def sweep_figures(record: SweepRecord) -> Iterator[tuple[str, str, Figure]]:
    """All figures of a sweep: file name, caption and figure; where no trial ended with a score, at most ``learning``.

    The names are ``surface`` (of two numeric parameters), ``curve_KEY`` for every parameter and for the variants,
    ``parallel``, ``importance``, ``learning`` and ``ranking``.
    """
    compared, axes, score = compare(record, record.metric), axes_of(record), f"{score_name(record.metric)} (%)"
    points = _points(record, compared)
    at = score if compared.full or not compared.trials else f"{score} at epoch {compared.epoch}"
    best = record.best.compared if record.best else ()
    curves = [(_percent(record.curve(trial, record.metric)), trial.state, trial in best) for trial in record.trials]
    curves = [curve for curve in curves if curve[0]]
    if not points:
        if curves:
            yield "learning", "One line per trial.", learning(curves, record.about["epochs"], score)
        return
    numeric = [axis for axis in axes if axis.numeric]
    if len(numeric) == 2:
        alone = len(axes) == 2
        caption = f"Colour between points: linear interpolation inside the hull of six or more {compared.which}."
        caption = caption if alone else ""
        yield "surface", caption, surface(points, numeric[0], numeric[1], at, smooth=alone)
    for axis in axes:
        about = f"{axis.key}; the points differ in {_listed(axes, axis)} too." if len(axes) > 1 else f"{axis.key}."
        if axis.numeric:
            figure = curve(points, axis, at)
        else:
            bars = axis.key == "variant"
            about = f"{about} Bars and whiskers: mean and standard deviation over trials." if bars else about
            figure = strip(_points_of_seeds(record, compared) if bars else points, axis, at, bars)
        yield f"curve_{axis.key}", about, figure
    if len(axes) > 1:
        caption = "One line per configuration; dashed: stopped earlier. Thick: the best."
        yield "parallel", caption, parallel(points, axes, at)
        shares = importances(record, compared, axes)
        if shares:
            over = f"{len(compared.trials)} trials {compared.which}"
            caption = f"Functional ANOVA (a random forest, by Optuna) over the {over}."
            yield "importance", caption, importance(shares)
    yield "learning", "One line per trial.", learning(curves, record.about["epochs"], score)
    panels = [panel for name in _LABEL_FREE if (panel := _panel(record, name))]
    if panels:
        yield "ranking", "One point per trial.", rankings(panels, f"{score_name('miou')} (%)")


def importances(record: SweepRecord, compared: Comparison, axes: Sequence[ParameterAxis]) -> dict[str, float]:
    """How much of the objective's variance over trials each parameter explains, by functional ANOVA.

    Returns:
        The share of every parameter by its short name; none for fewer than four trials, for a single parameter, and
        where all trials have the same score.
    """
    scores = compared.scores[record.metric]
    if len(scores) < _EXPLAINED_TRIALS or len(axes) < 2 or len(set(scores)) == 1:
        return {}
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs the study
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(before)
    distributions = {axis.name: _distribution(axis) for axis in axes}
    for trial, score in zip(compared.trials, scores, strict=True):
        params = {axis.name: _hashable(_with_variant(trial)[axis.key], axis) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def importance(shares: Mapping[str, float]) -> Figure:
    """One bar per parameter: the share of the score's variance that it explains."""
    figure = new_figure(8.4, 1.3 + 0.42 * len(shares))
    axes = figure.subplots()
    quiet(axes)
    axes.grid(axis="y", visible=False)
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    axes.barh([name for name, _ in ordered], [100 * share for _, share in ordered], 0.62, color=BLUE)
    for place, (_, share) in enumerate(ordered):
        axes.text(100 * share + 1, place, f"{share:.0%}", va="center", fontsize=10, color=INK)
    axes.set_xlim(0, 108)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of the variance that single parameters explain (%)")
    return figure


def learning(curves: Sequence[tuple[Mapping[int, float], str, bool]], epochs: int, score: str) -> Figure:
    """The score at every epoch that has one, one line per trial.

    Args:
        curves: epoch to score, the trial's state, and whether it belongs to the best configuration.
        epochs: epochs of a full trial.
        score: name of the score.
    """
    figure = new_figure(8.4, 4.8)
    axes = figure.subplots()
    quiet(axes)
    known: set[str] = set()
    for points, state, best in sorted(curves, key=lambda item: (item[2], item[1] == "finished")):
        label = "best" if best else state
        colour, width = (ORANGE, 2.8) if best else (_STATES.get(state, GREY), 1.4 if state == "finished" else 1.1)
        shown = None if label in known else label
        known.add(label)
        axes.plot(list(points), list(points.values()), color=colour, linewidth=width, label=shown, alpha=0.9)
        axes.plot(list(points)[-1:], list(points.values())[-1:], color=colour, marker="o", markersize=4)
    axes.set_xlim(0.7, epochs + 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.set_ylabel(score)
    legend(axes, 10, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def rankings(panels: Sequence[tuple[str, str, Sequence[tuple[float, float, bool]]]], against: str) -> Figure:
    """Scores that read no labels against one that does, one panel per score.

    Args:
        panels: name of the score, title, and per trial this score, the one that reads labels, and whether it is ranked;
            those that are have the scores of the same epoch.
        against: name of the score that reads labels.
    """
    figure = new_figure(4.2 * len(panels), 4.4)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (name, title, trials) in zip(grid.flat, panels, strict=True):
        quiet(axes)
        for ranked in (False, True):
            shown = [(x, y) for x, y, is_ranked in trials if is_ranked is ranked]
            xs, ys = [x for x, _ in shown], [y for _, y in shown]
            face, edge = (BLUE, "white") if ranked else ("white", GREY)
            label = "ranked" if ranked else "fewer epochs, not ranked"
            axes.scatter(xs, ys, s=56, facecolors=face, edgecolors=edge, linewidths=1.2, label=label)
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel(name)
    grid[0, 0].set_ylabel(against)
    if not all(ranked for _, _, trials in panels for _, _, ranked in trials):
        handles, labels = grid[0, 0].get_legend_handles_labels()
        legend(figure, 10, handles=handles, labels=labels, loc="outside lower center", ncols=2)
    return figure


def _points(record: SweepRecord, compared: Comparison) -> list[Point]:
    """The configurations at the epoch of the comparison; those without a trial in it at their own last epoch."""
    at, found = _by_number(record, compared), []
    for configuration in record.configurations:
        scores = [at[trial.number] for trial in configuration.trials if trial.number in at]
        mean, deviation = mean_and_deviation(scores) if scores else configuration.score(record.metric)
        if mean is not None:
            values = _with_variant(configuration.trials[0])
            found.append(Point(values, mean, deviation, bool(scores), configuration == record.best))
    return found


def _points_of_seeds(record: SweepRecord, compared: Comparison) -> list[Point]:
    at = _by_number(record, compared)
    scored = [(trial, at.get(trial.number, trial.score(record.metric))) for trial in record.trials]
    return [
        Point(_with_variant(trial), score, None, trial.number in at, trial == record.best_trial)
        for trial, score in scored
        if score is not None
    ]


def _by_number(record: SweepRecord, compared: Comparison) -> dict[int, float]:
    numbers = (trial.number for trial in compared.trials)
    return dict(zip(numbers, compared.scores[record.metric], strict=True))


def _with_variant(trial: TrialRecord) -> dict[str, Any]:
    return {**trial.values, "variant": trial.variant}


def _listed(axes: Sequence[ParameterAxis], but: ParameterAxis) -> str:
    return ", ".join(axis.name for axis in axes if axis is not but)


def _percent(curve: Mapping[int, float]) -> dict[int, float]:
    return {epoch: 100 * value for epoch, value in curve.items()}


def _panel(record: SweepRecord, name: str) -> tuple[str, str, list[tuple[float, float, bool]]] | None:
    found = ranking(record, name)
    if found is None:
        return None
    compared = found.compared
    where = "" if compared.full else f" at epoch {compared.epoch}"
    title = f"Spearman {correlation_text(found.spearman)}, {len(compared.trials)} trials{where}"
    panel = [(x, y, True) for x, y in zip(compared.scores[name], compared.scores["miou"], strict=True)]
    others = [(trial.score(name), trial.score("miou")) for trial in record.trials if trial not in compared.trials]
    panel += [(x, y, False) for x, y in others if x is not None and y is not None]
    return f"{score_name(name)} (%)", title, panel


def _distribution(axis: ParameterAxis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not axis.numeric:
        return CategoricalDistribution([_hashable(value, axis) for value in axis.listed])
    if axis.kind == "randint":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def _hashable(value: Any, axis: ParameterAxis) -> Any:
    """A list or a mapping as JSON, because Optuna takes neither."""
    return value if axis.numeric else json.dumps(value, sort_keys=True)
