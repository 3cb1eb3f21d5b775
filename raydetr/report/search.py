"""The part of a report about a search: what it found, how sure that is, what it cost, and what to do next."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from raydetr.config import SETTINGS
from raydetr.errors import UserError
from raydetr.report.charts import Axis, Chart, axis, bars, parallel
from raydetr.report.page import SERIES, as_yaml, card, cell, chart, duration, gain, points, table
from raydetr.report.run import (
    BEST_FILE,
    RunErrors,
    RunRecord,
    ap_axis,
    epochs_axis,
    read_run,
    run_cards,
    shown_errors,
)
from raydetr.search.confirm import read_verdict
from raydetr.search.importance import importances, position
from raydetr.search.record import (
    STATES,
    epochs_of,
    is_better_lower,
    objective,
    objective_text,
    reported_metrics,
    seconds_of,
    state_of,
    turns_of,
)
from raydetr.search.results import objectives_of, trials_frame
from raydetr.search.space import Distribution, as_drawn
from raydetr.search.study import TRIALS_FOLDER, Search
from raydetr.storage import exists, join, split
from raydetr.text import compact, count
from raydetr.training.metrics import WHERE

NOT_BESIDE = ("seconds", *WHERE)  # reported, but not to compare trials by
NOT_LISTED = ("started", "ended", "name", "reason", *WHERE)  # columns of trials.csv that the table of all trials leaves out
EDGE = 0.05  # of a range: the part at each end that counts as its edge
TOP_SHARE = 0.25  # of the trials: those that are asked whether they agree with the best one
LEGEND = [("best", "best trial"), ("default", "default settings (trial 0)"), ("trial", "complete"), ("stopped", "stopped early")]


def search_part(search: Search, path: str, errors: RunErrors | str | None, run: RunRecord | None) -> dict[str, Any]:
    """Return what the page shows of a search.

    Args:
        search: The search.
        path: Its path or URI, as the user gave it.
        errors: The errors of its best trial, why they are unknown, or None if nobody wants them.
        run: The best trial's run; None if there is none, or it cannot be read.
    """
    failed = [([str(trial.number), trial.user_attrs.get("reason", "-")], "") for trial in search.frozen() if trial.state == TrialState.FAIL]
    cards = [*advice_cards(search), *front_cards(search), *chart_cards(search)]
    if failed:
        cards.append(card("Failed trials", table=table(["trial", "reason"], failed, left=(1,))))
    if run is not None:
        cards += [each | {"heading": f"{each['heading']} of trial {shown_trial(search)}"} for each in run_cards(run)]
    cards += [all_trials_card(search), _settings_card(search)]
    return {
        "title": f"Search {split(path)[1]}",
        **dict(zip(("lead", "quiet"), search_sentences(search, path), strict=True)),
        "tiles": _tiles(search),
        "cards": cards,
        "errors": None if errors is None or search.best() is None else shown_errors(errors, best_checkpoint(search, path)),
    }


def shown_trial(search: Search) -> int:
    """Return the trial that the report is about: the one that a confirmation chose, else the best one, else trial 0."""
    verdict, best = read_verdict(search.folder), search.best()
    return int(verdict["chosen"]) if verdict else best.number if best else 0


def compared_trial(search: Search) -> tuple[int, str]:
    """Return the trial to compare with the defaults, and why: the one that was ``confirmed``, else the ``best``; 0 if there is no other."""
    chosen, best = shown_trial(search) if read_verdict(search.folder) else 0, search.best()
    return (chosen, "confirmed") if chosen else (best.number if best else 0, "best")


def trial_path(search: Search, path: str, number: int) -> str:
    """Return the path or URI of a trial's run."""
    return join(path, TRIALS_FOLDER, search.trial_name(number))


def best_checkpoint(search: Search, path: str) -> str:
    """Return the path or URI of the weights that the report is about: those of a confirmation, else the best trial's."""
    confirmed = join(path, BEST_FILE)
    if read_verdict(search.folder) and exists(confirmed):
        return confirmed
    return join(trial_path(search, path, shown_trial(search)), BEST_FILE)


def best_run(search: Search, path: str) -> RunRecord | None:
    """Return the run of :func:`shown_trial`, None if there is none or it cannot be read."""
    try:
        return read_run(trial_path(search, path, shown_trial(search)))
    except UserError:
        return None


# ----------------------------------------------------------------------------------------------------------------------- words


def search_sentences(search: Search, path: str) -> tuple[str, list[str]]:
    """Return what a search found, in one honest sentence, and what to think of it and do next."""
    best, verdict, metric = search.best(), read_verdict(search.folder), search.metric
    value, default = objective(best), objective(search.frozen()[0])
    if best is None:
        return f"No trial has ended with a value of {metric} yet.", []
    reached = f"trial {best.number} reaches {metric} {points(value)}"
    if verdict:
        number, _ = compared_trial(search)
        found = f"trial {number} reaches {metric} {points(objective(search.frozen()[number]))}" if number else "no trial does better"
        beside = "" if default is None else f"; the default settings reach {points(default)}"
        own = f"In the search itself, with one seed, {found}{beside}."
        return verdict["sentence"], [*filter(None, [verdict["caveat"]]), own]
    if best.number == 0:
        return f"No trial beats the default settings (trial 0), which reach {metric} {points(value)}.", []
    if default is None:
        return f"Not confirmed: {reached}; the default settings (trial 0) have no value to compare it with.", []
    if default == value:
        return f"No trial beats the default settings (trial 0): {reached}, and so do they.", []
    ranked = len(search.ranked())
    lead = (
        f"Not confirmed: {reached} and the default settings {points(default)}, but the best of {count(ranked, 'trial')} owes part of "
        f"these {gain(value, default)} {metric} to luck, so no gain is shown yet."
    )
    return lead, [
        "Expect less on other images and with another seed. What is left of the difference, several trainings of both settings with new "
        f"seeds say: raydetr confirm {path}"
    ]


def advice_cards(search: Search) -> list[dict[str, Any]]:
    """Return the best trial beside the defaults, settings at the edge of their range, and what the search cost."""
    heading = f"{compared_trial(search)[1].capitalize()} trial beside the default settings"
    cards = [card(heading, table=beside) if (beside := compared_with_default(search)) else None]
    edges = edge_sentences(search)
    if edges:
        cards.append(card("At the edge of their range", words=edges))
    cards.append(card("What it cost", words=cost_sentences(search)))
    return [each for each in cards if each]


def edge_sentences(search: Search) -> list[str]:
    """Return which settings of the best trial are at the edge of their range, and which way to move it, a sentence each."""
    best = search.best()
    if best is None or best.number == 0:
        return []
    ranked, sentences = search.ranked(), []
    top = ranked[: max(3, math.ceil(TOP_SHARE * len(ranked)))]
    for name, distribution in search.space.distributions.items():
        if isinstance(distribution, CategoricalDistribution) or name not in search.settings(best.number):
            continue
        at = position(distribution, search.settings(best.number)[name])
        if EDGE < at < 1 - EDGE or distribution.single():
            continue
        upper = at >= 1 - EDGE
        places = [position(distribution, settings[name]) for trial in top if name in (settings := search.settings(trial.number))]
        near = sum(place > 2 / 3 if upper else place < 1 / 3 for place in places)
        sentences.append(_edge_sentence(search, best, name, distribution, upper, f"{near} of the {len(places)} best trials"))
    return sentences


def _edge_sentence(search: Search, best: FrozenTrial, name: str, distribution: Distribution, upper: bool, agree: str) -> str:
    value, setting = search.settings(best.number)[name], SETTINGS[name]
    assert not isinstance(distribution, CategoricalDistribution)
    low, high = float(distribution.low), float(distribution.high)
    end, wider = ("upper", "raise") if upper else ("lower", "lower")
    words = f"{name} is {compact(value)} in trial {best.number}, at the {end} end of its range ({compact(low)} to {compact(high)})"
    words += f"; {agree} are in the third next to it"
    if upper:
        further = high * math.sqrt(high / low) if distribution.log else high + (high - low) / 2
        further = min(further, math.inf if setting.high is None else setting.high)
        at_bound = further <= high
    else:
        further = low / math.sqrt(high / low) if distribution.log else low - (high - low) / 2
        further = max(further, -math.inf if setting.low is None else setting.low)
        at_bound = further >= low
    if at_bound:
        return f"{words}. The setting takes no {'larger' if upper else 'smaller'} values."
    if setting.type is int:
        further = math.floor(further) if upper else math.ceil(further)
    return f"{words}: {wider} that end, for example to {compact(further if setting.type is int else float(further))}."


def cost_sentences(search: Search) -> list[str]:
    """Return what a search cost: trials, epochs, time on GPUs, and what stopping trials early saved."""
    started = [trial for trial in search.frozen() if trial.datetime_start]
    ended = [trial for trial in started if trial.datetime_complete]
    epochs = sum(epochs_of(trial) for trial in started)
    pruned = [trial for trial in ended if trial.state == TrialState.PRUNED]
    busy = _card_seconds(ended)
    alone = sum(seconds_of(trial) or 0.0 for trial in ended)
    sentences = [
        f"{count(len(started), 'trial')} of {search.trials} {'has' if len(started) == 1 else 'have'} started, and "
        f"{count(epochs, 'epoch')} {'was' if epochs == 1 else 'were'} trained."
    ]
    if ended:
        on = f"{_hours(busy)} on GPUs" if busy else f"{_hours(alone)} of training time"
        sentences.append(f"It took {_span(started)} from the first start to the last end, and {on}.")
    if pruned:
        planned = {trial.number: search.config(trial.number).optim.epochs for trial in pruned}
        saved = sum(planned[trial.number] - epochs_of(trial) for trial in pruned)
        spared = [(seconds_of(trial) or 0.0) * (planned[trial.number] / epochs_of(trial) - 1) for trial in pruned if epochs_of(trial)]
        sentences.append(
            f"Early stopping ended {count(len(pruned), 'trial')} and saved {count(saved, 'epoch')} of {epochs + saved} "
            f"({100 * saved / (epochs + saved):.0f} %), about {_hours(sum(spared))}."
        )
    return sentences


def _hours(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    )


def _card_seconds(trials: Iterable[FrozenTrial]) -> float:
    """Return for how long GPUs were busy, each card counted once where several trials shared it; 0 without GPUs."""
    busy: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for trial in trials:
        for start, end, where in turns_of(trial):
            for number in filter(None, str(where.get("cards", "")).split(",")):
                busy.setdefault((str(where.get("node")), number), []).append((start, start if end is None else end))
    seconds = 0.0
    for spans in busy.values():
        until = 0.0
        for start, end in sorted(spans):
            seconds += max(0.0, end - max(start, until))
            until = max(until, end)
    return seconds


def _span(trials: Iterable[FrozenTrial]) -> str:
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    return duration((max(ends) - min(starts)).total_seconds()) if starts and ends else "-"


def _tiles(search: Search) -> list[tuple[str, str]]:
    trials, best, default = search.frozen(), search.best(), search.frozen()[0]
    counts = {state: sum(state_of(trial) == state for trial in trials) for state in (*STATES, "paused")}
    states = [f"{number} {state}" for state, number in counts.items() if number]
    metric = f"{search.metric} in the search" if read_verdict(search.folder) else search.metric  # what was confirmed is in the lead
    return [
        (f"best {metric}", points(objective(best))),
        (f"default {metric}", points(objective(default))),
        (", ".join(states), f"{sum(trial.state.is_finished() for trial in trials)} of {search.trials} ended"),
        ("epochs trained", str(sum(epochs_of(trial) for trial in trials))),
        ("from first start to last end", _span(trials)),
        ("settings drawn", str(len(search.space.distributions))),
        *([("validation images", "drawn anew for each trial")] if search.base.get("data.reshuffle") else []),
    ]


# ---------------------------------------------------------------------------------------------------------------------- tables


def compared_with_default(search: Search) -> dict[str, Any] | None:
    """Return the table of objective, metrics and differing settings of trial 0 and :func:`compared_trial`; None before trial 0 started."""
    trials, (number, why) = search.frozen(), compared_trial(search)
    if trials[0].state == TrialState.WAITING:
        return None
    columns = [trials[0]] + ([trials[number]] if number else [])
    headings = ["", *("trial 0 (default)" if trial.number == 0 else f"trial {trial.number} ({why})" for trial in columns)]
    metrics = [reported_metrics(trial) for trial in columns]
    rows: list[tuple[list[Any], str]] = [
        ([search.metric, *(objective(trial) for trial in columns)], "best"),
        *(([name, *(_shown_objective(name, objectives_of(search, trial)[name]) for trial in columns)], "") for name in search.also),
        (["epochs", *(epochs_of(trial) for trial in columns)], ""),
    ]
    names = dict.fromkeys(name for each in metrics for name in each if name not in (*search.objectives, *NOT_BESIDE))
    rows += [([name, *(each.get(name) for each in metrics)], "") for name in names]
    settings = [{**search.base, **search.settings(trial.number)} for trial in columns]
    varied = [name for name in search.space.dimensions if len(columns) == 1 or settings[0][name] != settings[1][name]]
    position = len(search.objectives) + 1
    rows[position:position] = [([name, *(as_drawn(each[name]) for each in settings)], "setting") for name in varied]
    same = f" ({', '.join(search.also)}: of the same epoch)" if search.also else ""
    note = f"{search.metric} is the highest of all epochs{same}, the other metrics are those of the last epoch. AP and AR are in points."
    return table(headings, rows, note=note)


def all_trials_card(search: Search) -> dict[str, Any]:
    """Return the table of all trials: their settings, and metrics of the last epoch."""
    frame, best = trials_frame(search), search.best()
    hidden = [name for name in frame.columns if name in NOT_LISTED or bool(frame[name].isna().all())]
    frame = frame.drop(columns=[name for name in hidden if name != search.metric])
    rows = []
    for row in frame.astype(object).where(frame.notna(), None).to_numpy().tolist():
        cells = [cell(value, name) for name, value in zip(frame.columns, row, strict=True)]
        rows.append((cells, "best" if best and row[0] == best.number else "default" if row[0] == 0 else ""))
    return card("Trials", details=[(f"All {count(len(rows), 'trial')}", table(list(frame.columns), rows))])


def _settings_card(search: Search) -> dict[str, Any]:
    base = as_yaml({name: as_drawn(value) for name, value in search.base.items()})
    return card("Settings", details=[("Search space", as_yaml(search.space.to_dict())), ("Base settings, those of trial 0", base)])


def _shown_objective(name: str, value: float | None) -> str:
    """Return an objective as tables of the page show it: an AP in points, a latency in milliseconds."""
    return objective_text(name, value) if is_better_lower(name) else points(value)


def front_cards(search: Search) -> list[dict[str, Any]]:
    """Return the card about the Pareto front of a search with several objectives; none with one objective, or without a front."""
    front = search.front() if search.also else []
    if not front:
        return []
    names = [name for name in search.space.names if name in search.space.distributions]
    rows = []
    for trial in front:
        settings = search.settings(trial.number)
        cells = [search.trial_name(trial.number), *(_shown_objective(*each) for each in objectives_of(search, trial).items())]
        cells += [str(epochs_of(trial)), *(cell(as_drawn(settings.get(name)), name) for name in names)]
        rows.append((cells, _kind(search, trial) if trial.number == 0 or trial == search.best() else ""))
    explanation = (
        f"No trial is better in one of {', '.join(search.objectives)} than one of these without being worse in another. best.yaml has the "
        f"settings of the one with the highest {search.metric}; the folder of each trial has its settings and weights."
    )
    found = table(["trial", *search.objectives, "epochs", *names], rows)
    charts = [chart("", _trade_off(search, front, name)) for name in search.also]
    legend = [("best", "the trade-offs"), ("trial", "other complete trials"), ("default", "default settings (trial 0)")]
    return [card("Trade-offs", explanation, table=found, charts=charts, legend=legend)]


# ---------------------------------------------------------------------------------------------------------------------- charts


def _trade_off(search: Search, front: Sequence[FrozenTrial], name: str) -> Markup:
    """Return the chart of the first objective over another one, in which a line joins the trials of the front."""
    scale = 1000 if is_better_lower(name) else 100

    def point(trial: FrozenTrial) -> tuple[float, float]:
        return scale * (objectives_of(search, trial)[name] or 0.0), 100 * (objective(trial) or 0.0)

    complete = [trial for trial in search.ranked() if trial.state == TrialState.COMPLETE]
    across = axis(f"{name} (ms)" if is_better_lower(name) else name, [point(trial)[0] for trial in complete])
    figure = Chart(f"{search.metric} over {name}", across, _objective_axis(search))
    if len(search.objectives) == 2:  # of more, the front has no such order
        figure.line([point(trial) for trial in front], "best", "the trade-offs")
    on_front = {trial.number for trial in front}
    for trial in sorted(complete, key=lambda trial: (trial.number in on_front, trial.number == 0)):
        css = "default" if trial.number == 0 else "best" if trial.number in on_front else "trial"
        values = (f"{each} {_shown_objective(each, value)}" for each, value in objectives_of(search, trial).items())
        figure.dot(point(trial), css, f"{search.trial_name(trial.number)}: {', '.join(values)}")
    return figure.svg()


def chart_cards(search: Search) -> list[dict[str, Any]]:
    """Return the charts that the trials so far allow."""
    trials, cards = search.frozen(), []
    ranked, curves = search.ranked(), [trial for trial in trials if trial.intermediate_values]
    figures = []
    if ranked:
        figures.append(chart("Each trial, and the best so far", _history(search)))
    if curves:
        figures.append(chart("Learning curves", _curves(search)))
    if any(trial.datetime_start for trial in trials):
        figures.append(chart("When each trial ran", _timeline(search)))
    if figures:
        cards.append(card("Trials and epochs", f"{search.metric} in points, the best of each trial so far.", charts=figures, legend=LEGEND))
    names = [name for name in search.space.distributions if any(name in trial.params for trial in ranked)]
    if len(ranked) > 1 and names:
        found, sentence = importances(search)
        charts = []
        if found:
            rows = [(each.name, each.share, each.low, each.high) for each in found]
            charts = [chart("Importance, with 95 % intervals", bars("Importance of each setting", rows, "share of the effects"))]
        explanation = (
            "A model of all trials, also of stopped ones, says how much of the objective's variation each setting explains by itself."
        )
        cards.append(card("Which settings matter", explanation, words=[sentence], charts=charts))
        explanation = "A line for each trial, through its settings; a line that passes below an axis has no such setting."
        cards.append(card("Parallel coordinates", explanation, charts=[chart("", _parallel(search, names))], wide=True, legend=LEGEND))
        explanation = (
            f"{search.metric} over each setting. A stopped trial is a ring, the smaller the earlier it was stopped, at the "
            f"{search.metric} that it had reached; the dotted line is the default."
        )
        slices = [chart(name, _slice(search, name)) for name in names]
        cards.append(card("Slices", explanation, charts=slices, legend=LEGEND))
    return cards


def _kind(search: Search, trial: FrozenTrial) -> str:
    """Return the CSS class of a trial."""
    best = search.best()
    if trial.number == 0:
        return "default"
    if best and trial.number == best.number:
        return "best"
    return {"pruned": "stopped", "paused": "stopped", "complete": "trial"}.get(state_of(trial), state_of(trial))


def _title(search: Search, trial: FrozenTrial) -> str:
    value = f", {search.metric} {points(objective(trial))}" if objective(trial) is not None else ""
    return f"{search.trial_name(trial.number)}: {state_of(trial)} after {count(epochs_of(trial), 'epoch')}{value}"


def _on_top(search: Search, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return trials in the order of drawing: stopped ones below, the best one and trial 0 on top."""
    order = ("failed", "running", "stopped", "trial", "best", "default")
    return sorted(trials, key=lambda trial: order.index(_kind(search, trial)) if trial.state != TrialState.WAITING else -1)


def _objective_axis(search: Search) -> Axis:
    return ap_axis([100 * (objective(trial) or 0.0) for trial in search.ranked()], search.metric)


def _reached(search: Search, trial: FrozenTrial) -> float:
    """Return which share of its epochs a trial was trained."""
    return min(1.0, epochs_of(trial) / max(1, search.config(trial.number).optim.epochs))


def _history(search: Search) -> Markup:
    ranked = search.ranked()
    last = max(trial.number for trial in search.frozen())
    figure = Chart("The objective of every trial", Axis("trial", -0.5, last + 0.5, whole=True), _objective_axis(search))
    steps, best = [], -math.inf
    for trial in sorted(ranked, key=lambda trial: trial.number):
        value = 100 * (objective(trial) or 0.0)
        steps += [(trial.number, best), (trial.number, max(best, value))] if math.isfinite(best) else [(trial.number, value)]
        best = max(best, value)
    figure.line([*steps, (last + 0.5, best)], "thin s0", "best so far")
    default = objective(search.frozen()[0])
    if default is not None:
        figure.across(100 * default, "default dotted", f"default settings: {points(default)}")
    for trial in _on_top(search, ranked):
        kind = _kind(search, trial)
        figure.dot((trial.number, 100 * (objective(trial) or 0.0)), kind, _title(search, trial), 2.5 if kind == "stopped" else 3.5)
    return figure.svg()


def _curves(search: Search) -> Markup:
    trials = [trial for trial in search.frozen() if trial.intermediate_values]
    values = [100 * value for trial in trials for value in trial.intermediate_values.values()]
    figure = Chart("The objective over the epochs", epochs_axis(max(epochs_of(trial) for trial in trials)), ap_axis(values, search.metric))
    for trial in _on_top(search, trials):
        steps = [(epoch, 100 * value) for epoch, value in sorted(trial.intermediate_values.items())]
        kind = _kind(search, trial)
        figure.line(steps, f"{kind} dotted" if kind == "default" else kind, _title(search, trial))
        figure.dot(steps[-1], kind, _title(search, trial), 2.0)
    return figure.svg()


def _timeline(search: Search) -> Markup:
    turns = {trial.number: turns_of(trial) for trial in search.frozen() if trial.datetime_start}
    known = [moment for spans in turns.values() for start, end, _ in spans for moment in (start, end) if moment is not None]
    begin, latest = min(known), max(known)
    total = max(latest - begin, 1.0)
    unit, name = (3600.0, "hours") if total > 7200 else (60.0, "minutes") if total > 180 else (1.0, "seconds")
    last = max(trial.number for trial in search.frozen())
    figure = Chart("When each trial ran", Axis(f"{name} since the start", 0, total / unit), Axis("trial", last + 0.8, -0.8, whole=True))
    thickness = min(8.0, 150 / (last + 1))
    for number, spans in turns.items():
        trial = search.frozen()[number]
        for start, end, _ in spans:
            until = latest if end is None else end
            figure.bar((start - begin) / unit, (until - begin) / unit, number, _kind(search, trial), _title(search, trial), thickness)
    return figure.svg()


def setting_axis(search: Search, name: str, label: str = "") -> Axis:
    """Return the axis of a setting: logarithmic where its range is, and long enough for the default."""
    distribution, own = search.space.distributions[name], as_drawn(search.base[name])
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        choices += [] if own in choices else [own]
        return Axis(label or name, -0.4, len(choices) - 0.6, names=tuple(compact(each) for each in choices))
    log = distribution.log and own > 0
    return axis(label or name, [distribution.low, distribution.high, own], log=log, whole=SETTINGS[name].type is int)


def _on_axis(search: Search, name: str, value: Any) -> float:
    distribution = search.space.distributions[name]
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        return float(choices.index(value)) if value in choices else float(len(choices))  # the default, at the end
    return float(value)


def _drawn(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    """Return the settings that a trial drew, or, of trial 0, that it would have drawn."""
    settings = {name: as_drawn(value) for name, value in search.settings(trial.number).items()}
    if trial.number == 0:
        return {name: value for name, value in settings.items() if name in search.space.drawn(search.base) or name in trial.params}
    return settings


def _slice(search: Search, name: str) -> Markup:
    across = setting_axis(search, name)
    figure = Chart(f"{search.metric} over {name}", across, _objective_axis(search))
    default = as_drawn(search.base[name])
    if not across.log or default > 0:
        figure.upright(_on_axis(search, name, default), "default dotted", f"default: {compact(default)}")
    for trial in _on_top(search, search.ranked()):
        settings, kind = _drawn(search, trial), _kind(search, trial)
        value = default if trial.number == 0 else settings.get(name)
        if value is None or (across.log and value <= 0):
            continue
        radius = 1.5 + 2 * _reached(search, trial) if trial.state == TrialState.PRUNED else 3.5
        css = f"{kind} ring" if trial.state == TrialState.PRUNED else kind
        figure.dot((_on_axis(search, name, value), 100 * (objective(trial) or 0.0)), css, _title(search, trial), radius)
    return figure.svg()


def _parallel(search: Search, names: Sequence[str]) -> Markup:
    ranked = search.ranked()
    axes = [setting_axis(search, name, name.split(".")[1]) for name in names]
    axes.append(Axis("epochs", 0, max(1, *(epochs_of(trial) for trial in ranked)), whole=True))
    axes.append(_objective_axis(search))
    lines = []
    for trial in _on_top(search, ranked):
        settings, kind = _drawn(search, trial), _kind(search, trial)
        values: list[float | None] = []
        for name, each in zip(names, axes, strict=False):
            value = as_drawn(search.base[name]) if trial.number == 0 else settings.get(name)
            known = name in settings and value is not None and not (each.log and value <= 0)
            values.append(_on_axis(search, name, value) if known else None)
        css = f"{kind} dotted" if trial.number == 0 else kind
        lines.append(([*values, epochs_of(trial), 100 * (objective(trial) or 0.0)], css, _title(search, trial)))
    return parallel("The settings of every trial", axes, lines)


# ------------------------------------------------------------------------------------------------------------- several searches


def compared_searches(searches: Mapping[str, Search]) -> list[dict[str, Any]]:
    """Return the cards that compare searches: what each reached, and at what cost.

    Args:
        searches: The searches by their labels.
    """
    metric = next(iter(searches.values())).metric
    by_trial, by_epoch, rows, legend = {}, {}, [], []
    for index, (label, search) in enumerate(searches.items()):
        ended = sorted(
            (trial for trial in search.frozen() if trial.state.is_finished()), key=lambda trial: trial.datetime_complete or datetime.min
        )
        epochs = list(itertools.accumulate(epochs_of(trial) for trial in ended))
        so_far = _running_maximum(objective(trial) for trial in ended)
        css = f"s{index % SERIES}"
        by_trial[label] = css, [(number, 100 * best) for number, best in enumerate(so_far, 1) if best is not None]
        by_epoch[label] = css, [(spent, 100 * best) for spent, best in zip(epochs, so_far, strict=True) if best is not None]
        best, default = search.best(), objective(search.frozen()[0])
        failed = sum(trial.state == TrialState.FAIL for trial in ended)
        verdict = read_verdict(search.folder)
        cells = [label, points(objective(best)), str(best.number) if best else "-", points(default)]
        cells += [gain(objective(best), default), "yes" if verdict else "no"]
        cells += [str(len(ended)), str(failed), str(sum(epochs[-1:])), _span(ended)]
        rows.append((objective(best), cells))
        legend.append((css, label))
    highest = max((value for value, _ in rows if value is not None), default=None)
    headings = [
        "search",
        f"best {metric}",
        "in trial",
        f"default {metric}",
        "gain",
        "confirmed",
        "trials ended",
        "failed",
        "epochs",
        "time",
    ]
    found = table(headings, [(cells, "best" if value is not None and value == highest else "") for value, cells in rows])
    charts = [
        chart("By trials that have ended", _so_far(by_trial, "trials ended", metric)),
        chart("By epochs that they took", _so_far(by_epoch, "epochs of ended trials", metric)),
    ]
    explanation = "Epochs are the fair comparison where trials are stopped early."
    return [card("Searches side by side", table=found), card("Best so far", explanation, charts=charts, legend=legend)]


def _so_far(lines: Mapping[str, tuple[str, Sequence[tuple[float, float]]]], label: str, metric: str) -> Markup:
    every = [point for _, steps in lines.values() for point in steps]
    across = Axis(label, 0, max([x for x, _ in every], default=1), whole=True)
    figure = Chart(f"Best {metric} so far", across, ap_axis([y for _, y in every], metric))
    for name, (css, bests) in lines.items():
        steps = [step for before, after in itertools.pairwise(bests) for step in (before, (after[0], before[1]))]
        figure.line([*steps, *bests[-1:]], f"thick {css}", name)
        if bests:
            figure.dot(bests[-1], css, name)
    return figure.svg()


def _running_maximum(values: Iterable[float | None]) -> list[float | None]:
    highest, maxima = None, []
    for value in values:
        highest = value if highest is None else highest if value is None else max(highest, value)
        maxima.append(highest)
    return maxima
