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
from clip2scene.tracking.sweep.axes import ParameterAxis, axes_of
from clip2scene.tracking.sweep.charts import Point, curve, parallel, strip, surface
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
    points, axes, score = _points(record), axes_of(record), f"{score_name(record.metric)} (%)"
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
        caption = "Colour between points: linear interpolation inside the hull of six or more that ran all epochs."
        caption = caption if alone else ""
        yield "surface", caption, surface(points, numeric[0], numeric[1], score, smooth=alone)
    for axis in axes:
        about = f"{axis.key}; the points differ in {_listed(axes, axis)} too." if len(axes) > 1 else f"{axis.key}."
        if axis.numeric:
            figure = curve(points, axis, score)
        else:
            bars = axis.key == "variant"
            about = f"{about} Bars and whiskers: mean and standard deviation over trials." if bars else about
            figure = strip(_points_of_seeds(record) if bars else points, axis, score, bars)
        yield f"curve_{axis.key}", about, figure
    if len(axes) > 1:
        caption = "One line per configuration; dashed: stopped earlier. Thick: the best."
        yield "parallel", caption, parallel(points, axes, score)
        trials, shares = importances(record, axes)
        if shares:
            which = "that ran all epochs" if all(map(record.is_full, trials)) else "with a score, some of fewer epochs"
            caption = f"Functional ANOVA (a random forest, by Optuna) over the {len(trials)} trials {which}."
            yield "importance", caption, importance(shares)
    yield "learning", "One line per trial.", learning(curves, record.about["epochs"], score)
    panels = [panel for name in _LABEL_FREE if (panel := _panel(record, name))]
    if panels:
        yield "ranking", "One point per trial.", rankings(panels, f"{score_name('miou')} (%)")


def importances(record: SweepRecord, axes: Sequence[ParameterAxis]) -> tuple[tuple[TrialRecord, ...], dict[str, float]]:
    """How much of the objective's variance each parameter explains, by functional ANOVA over the comparable trials.

    Returns:
        The trials, and the share of every parameter by its short name; no shares for fewer than four trials, for a
        single parameter, and where all trials have the same score.
    """
    chosen = record.comparable(record.metric)
    scores = [trial.finals[record.metric] for trial in chosen]
    if len(chosen) < _EXPLAINED_TRIALS or len(axes) < 2 or len(set(scores)) == 1:
        return chosen, {}
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs the study
    study = optuna.create_study(direction="maximize")
    optuna.logging.set_verbosity(before)
    distributions = {axis.name: _distribution(axis) for axis in axes}
    for trial, score in zip(chosen, scores, strict=True):
        params = {axis.name: _hashable(_with_variant(trial)[axis.key], axis) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return chosen, dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


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
        panels: name of the score, title, and per trial this score, the one that reads labels, and whether it is ranked.
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


def _points(record: SweepRecord) -> list[Point]:
    found = []
    for configuration in record.configurations:
        mean, deviation = configuration.score(record.metric)
        if mean is not None:
            full = record.is_full(configuration.compared[0])
            values = _with_variant(configuration.compared[0])
            found.append(Point(values, mean, deviation, full, configuration == record.best))
    return found


def _points_of_seeds(record: SweepRecord) -> list[Point]:
    scored = [(trial, trial.score(record.metric)) for trial in record.trials]
    return [
        Point(_with_variant(trial), score, None, record.is_full(trial), trial == record.best_trial)
        for trial, score in scored
        if score is not None
    ]


def _with_variant(trial: TrialRecord) -> dict[str, Any]:
    return {**trial.values, "variant": trial.variant}


def _listed(axes: Sequence[ParameterAxis], but: ParameterAxis) -> str:
    return ", ".join(axis.name for axis in axes if axis is not but)


def _percent(curve: Mapping[int, float]) -> dict[int, float]:
    return {epoch: 100 * value for epoch, value in curve.items()}


def _panel(record: SweepRecord, name: str) -> tuple[str, str, list[tuple[float, float, bool]]] | None:
    ranking = record.ranking(name)
    if ranking is None:
        return None
    pairs = [(trial.score(name), trial.score("miou"), trial in ranking.trials) for trial in record.trials]
    title = f"Spearman {correlation_text(ranking.spearman)}, {len(ranking.trials)} trials"
    known = [(x, y, ranked) for x, y, ranked in pairs if x is not None and y is not None]
    return f"{score_name(name)} (%)", title, known


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
