"""The report of a search, or of several side by side: one HTML file that needs no network. The page itself is report.html."""

import itertools
import warnings
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import optuna
import plotly.graph_objects as go
import plotly.io
import yaml
from markupsafe import Markup
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from raydetr.errors import UserError
from raydetr.files import atomic_write_text
from raydetr.search.confirm import read_verdict
from raydetr.search.space import as_drawn
from raydetr.search.study import STATE_NAMES, Search, epochs_of, importance_evaluator, importances, reported_metrics, trials_frame
from raydetr.storage import fetched, is_uri
from raydetr.training.metrics import WHERE

DEFAULT, BEST, OTHER = "#1b2a41", "#d1495b", "#b8c4d0"  # trial 0, the best trial, the rest
SEARCHES = ("#2e6f95", "#d1495b", "#3a7d44", "#e09f3e", "#7b5ea7", "#2a9d8f", "#8d5b4c", "#5c6b73")
NOT_BESIDE = ("seconds", *WHERE)  # reported, but not to compare trials by


def report(run_folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of one search, or of several side by side.

    Args:
        run_folders: Paths or URIs of the searches, which may still be running.
        out: The file to write. By default it is ``report.html``, in the folder of a single local search, else in the current folder.

    Returns:
        The path of the report.

    Raises:
        UserError: There is no search in a folder, the searches have different objectives, or the file cannot be written.
    """
    if not run_folders:
        raise UserError("report: name the folder of at least one search")
    searches = [Search(fetched(folder, recursive=False)) for folder in run_folders]
    metrics = {search.metric: search.folder for search in searches}
    if len(metrics) > 1:
        raise UserError("report: " + ", ".join(f"{folder} maximizes {metric}" for metric, folder in metrics.items()) + "; not comparable")
    alone = len(searches) == 1
    out = Path(out) if out else (searches[0].folder if alone and not is_uri(run_folders[0]) else Path()) / "report.html"
    page = _template().render(
        title=f"Search {_label(searches[0].folder)}" if alone else f"{len(searches)} searches compared",
        plotly=Markup(get_plotlyjs()),
        comparison=None if alone else _comparison(searches),
        searches=[_one(search, f"s{index}") for index, search in enumerate(searches)],
    )
    try:
        atomic_write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot write the report ({error.strerror or error})") from None
    return out


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("raydetr.search", "."), autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html")


def _one(search: Search, anchor: str) -> dict[str, Any]:
    """Return what the page shows of one search; ``anchor`` begins the ids of its charts."""
    trials = search.frozen()
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    return {
        "name": _label(search.folder),
        "metric": search.metric,
        "best": search.best(),
        "default": trials[0],
        "ranked": len(search.ranked()),
        "verdict": read_verdict(search.folder),
        "tiles": _tiles(search),
        "beside": _best_beside_default(search),
        "charts": [_chart(f"{anchor}-{name}", *chart) for name, chart in _figures(search).items()],
        "failed": _table(["trial", "reason"], [([each.number, each.user_attrs.get("reason", "-")], "") for each in failed], left=(1,)),
        "all": _all_trials(search),
        "space": _yaml(search.space.to_dict()),
        "base": _yaml({name: as_drawn(value) for name, value in search.base.items()}),
    }


def _tiles(search: Search) -> list[tuple[str, str]]:
    trials, best = search.frozen(), search.best()
    counts = {state: sum(trial.state == state for trial in trials) for state in STATE_NAMES if state.is_finished()}
    states = [f"{number} {STATE_NAMES[state]}" for state, number in counts.items() if number]
    return [
        (f"best {search.metric}", f"{best.value:.4f}" if best else "-"),
        ("trials started", f"{sum(trial.state != TrialState.WAITING for trial in trials)} of {search.trials}"),
        (", ".join(states), f"{sum(trial.state.is_finished() for trial in trials)} ended"),
        ("epochs trained", str(sum(epochs_of(trial) for trial in trials))),
        ("from first start to last end", _span(trials)),
        ("settings drawn", str(len(search.space.distributions))),
        ("validation images", "drawn anew for each trial" if search.base.get("data.reshuffle") else "the same for all trials"),
    ]


def _span(trials: Iterable[FrozenTrial]) -> str:
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    if not starts or not ends:
        return "-"
    minutes, seconds = divmod(round((max(ends) - min(starts)).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _best_beside_default(search: Search) -> dict[str, Any] | None:
    """Return the table of objective, metrics and differing settings of trial 0 and the best trial; None before trial 0 has started."""
    best, trials = search.best(), search.frozen()
    if trials[0].state == TrialState.WAITING:
        return None
    columns = [trials[0]] + ([best] if best and best.number else [])
    headings = ["", *("trial 0 (default)" if trial.number == 0 else f"trial {trial.number} (best)" for trial in columns)]
    rows = [
        ([search.metric, *(trial.value for trial in columns)], "best"),
        (["epochs", *(epochs_of(trial) for trial in columns)], ""),
    ]
    metrics = [reported_metrics(trial) for trial in columns]
    names = dict.fromkeys(name for each in metrics for name in each if name not in (search.metric, *NOT_BESIDE))
    rows += [([name, *(each.get(name) for each in metrics)], "") for name in names]
    settings = [{**search.base, **search.settings(trial.number)} for trial in columns]
    varied = [name for name in search.space.dimensions if len(columns) == 1 or settings[0][name] != settings[1][name]]
    rows += [([name, *(as_drawn(each[name]) for each in settings)], "") for name in varied]
    return _table(headings, rows)


def _all_trials(search: Search) -> dict[str, Any]:
    frame = trials_frame(search)
    best = search.best()
    hidden = [name for name in frame.columns if name in ("started", "ended", "name", "reason", *WHERE) or bool(frame[name].isna().all())]
    frame = frame.drop(columns=[name for name in hidden if name != search.metric])
    rows = []
    for row in frame.astype(object).where(frame.notna(), None).to_numpy().tolist():
        rows.append((row, "best" if best and row[0] == best.number else "default" if row[0] == 0 else ""))
    return _table(list(frame.columns), rows)


def _figures(search: Search) -> dict[str, tuple[str, str, list[go.Figure]]]:
    """Return the charts that the trials so far allow: heading, explanation and figures by name."""
    study, trials, metric = search.study, search.frozen(), search.metric
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    drawn = {name for trial in complete for name in trial.params}
    plots = optuna.visualization
    figures: dict[str, tuple[str, str, list[go.Figure]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about few trials; the page says so
        if complete:
            figures["history"] = ("History", "The objective of every trial, and the best so far.", [_history(search)])
        if any(trial.intermediate_values for trial in trials):
            figures["curves"] = ("Learning curves", f"The best {metric} so far after every epoch, for each trial.", [_curves(search)])
        if importances(study):
            explanation = "Which settings distinguish the better trials from the rest (PED-ANOVA). Rough below thirty complete trials."
            chart = plots.plot_param_importances(study, evaluator=importance_evaluator(len(complete)), target_name=metric)
            chart.update_traces(marker_color=SEARCHES[0])
            chart.update_layout(xaxis_title="Importance", yaxis_title=None)
            figures["importances"] = ("Importances", explanation, [chart])
        if len(complete) > 1 and drawn:
            explanation = "One line per complete trial, through its settings; darker is better. None: not drawn in that trial."
            figures["parallel"] = ("Parallel coordinates", explanation, [_parallel(search)])
            explanation = "The objective over each setting; later trials are darker."
            figures["slices"] = ("Slices", explanation, [_slice(search, name) for name in search.space.distributions if name in drawn])
        if any(trial.datetime_start for trial in trials):
            chart = plots.plot_timeline(study)
            if len(trials) < 15:
                chart.update_yaxes(dtick=1)
            figures["timeline"] = ("Timeline", "When each trial ran, and how it ended.", [chart])
    return figures


def _parallel(search: Search) -> go.Figure:
    figure = optuna.visualization.plot_parallel_coordinate(search.study, target_name=search.metric)
    names = [name.split(".")[-1] for name in _axis_names(figure)]  # with their sections they overlap
    return figure.update_xaxes(ticktext=names)


def _axis_names(figure: go.Figure) -> list[str]:
    """Return the text of the ticks of the x axis, which in parallel coordinates are the names of settings."""
    return figure.to_dict()["layout"].get("xaxis", {}).get("ticktext", [])


def _slice(search: Search, name: str) -> go.Figure:
    figure = optuna.visualization.plot_slice(search.study, params=[name], target_name=search.metric)
    figure.update_traces(marker={"showscale": False})
    return figure.update_layout(height=300, xaxis_title=name, xaxis_exponentformat="e", yaxis_title=search.metric)


def _history(search: Search) -> go.Figure:
    figure = optuna.visualization.plot_optimization_history(search.study, target_name=search.metric)
    pruned = [trial for trial in search.ranked() if trial.state == TrialState.PRUNED]
    if pruned:
        numbers, values = [trial.number for trial in pruned], [trial.value for trial in pruned]
        figure.add_scatter(x=numbers, y=values, mode="markers", name="Stopped early", marker={"color": OTHER})
    default = search.frozen()[0]
    if default.value is not None:
        figure.add_hline(y=default.value, line={"color": DEFAULT, "dash": "dot", "width": 1.5}, annotation_text="default settings")
    return figure


def _curves(search: Search) -> go.Figure:
    best, figure = search.best(), go.Figure()
    # The best trial and trial 0 are drawn last, on top of the others.
    order = sorted(search.frozen(), key=lambda trial: (trial.number == 0, best is not None and trial.number == best.number))
    for trial in order:
        if not trial.intermediate_values:
            continue
        epochs, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        line, name = {"color": OTHER, "width": 1}, f"trial {trial.number} ({STATE_NAMES[trial.state]})"
        marked = trial.number == 0 or (best is not None and trial.number == best.number)
        if trial.number == 0:
            line, name = {"color": DEFAULT, "width": 2.5, "dash": "dot"}, "trial 0 (default)"
        elif marked:
            line, name = {"color": BEST, "width": 2.5}, f"trial {trial.number} (best)"
        figure.add_scatter(x=epochs, y=values, name=name, line=line, mode="lines+markers", marker={"size": 4}, showlegend=marked)
    return figure.update_layout(xaxis_title="Epoch", yaxis_title=search.metric)


def _comparison(searches: Sequence[Search]) -> dict[str, Any]:
    """Return the table and the charts of what each search reached, and at what cost."""
    metric = searches[0].metric
    by_trial, by_epoch, rows = go.Figure(), go.Figure(), []
    for index, (search, label) in enumerate(zip(searches, _labels(searches), strict=True)):
        ended = sorted(
            (trial for trial in search.frozen() if trial.state.is_finished()), key=lambda trial: trial.datetime_complete or datetime.min
        )
        epochs = list(itertools.accumulate(epochs_of(trial) for trial in ended))
        so_far = _running_maximum(trial.value for trial in ended)
        style = {"name": label, "mode": "lines", "line": {"shape": "hv", "width": 2.5, "color": SEARCHES[index % len(SEARCHES)]}}
        by_trial.add_scatter(x=list(range(1, len(ended) + 1)), y=so_far, **style)
        by_epoch.add_scatter(x=epochs, y=so_far, **style)
        best, default = search.best(), search.frozen()[0].value
        highest_value = best.value if best else None
        gain = None if highest_value is None or default is None else f"{highest_value - default:+.4f}"
        failed = sum(trial.state == TrialState.FAIL for trial in ended)
        reached = [best and best.value, best and best.number, default, gain]
        rows.append([label, *reached, len(ended), failed, sum(epochs[-1:]), _span(ended)])
    highest = max((row[1] for row in rows if row[1] is not None), default=None)
    headings = ["search", f"best {metric}", "in trial", f"default {metric}", "gain", "trials ended", "failed", "epochs", "time"]
    by_trial.update_layout(xaxis_title="Trials ended", yaxis_title=f"Best {metric} so far", showlegend=True)
    by_epoch.update_layout(xaxis_title="Epochs spent by ended trials", yaxis_title=f"Best {metric} so far", showlegend=True)
    explanation = "The fair comparison where trials are stopped early."
    return {
        "table": _table(headings, [(row, "best" if row[1] is not None and row[1] == highest else "") for row in rows]),
        "charts": [
            _chart("compared-trials", "Best so far, by trials", "", [by_trial]),
            _chart("compared-epochs", "Best so far, by epochs", explanation, [by_epoch]),
        ],
    }


def _running_maximum(values: Iterable[float | None]) -> list[float | None]:
    highest, maxima = None, []
    for value in values:
        highest = value if highest is None else highest if value is None else max(highest, value)
        maxima.append(highest)
    return maxima


def _labels(searches: Sequence[Search]) -> list[str]:
    names = [_label(search.folder) for search in searches]
    return names if len(set(names)) == len(names) else [str(search.folder) for search in searches]


def _label(folder: Path) -> str:
    return folder.resolve().name


def _chart(name: str, heading: str, explanation: str, figures: Sequence[go.Figure]) -> dict[str, Any]:
    """Return a card of charts: one, or several in a grid. A chart with many axes is scrolled rather than squeezed."""
    names = [name] if len(figures) == 1 else [f"{name}-{index}" for index in range(len(figures))]
    parts = [_drawn(figure, each) for figure, each in zip(figures, names, strict=True)]
    return {"heading": heading, "explanation": explanation, "parts": parts, "min_width": 85 * len(_axis_names(figures[0]))}


def _drawn(figure: go.Figure, name: str) -> Markup:
    figure.update_layout(
        template="plotly_white",
        title=None,
        width=None,
        autosize=True,
        margin={"l": 55, "r": 20, "t": 64, "b": 50},
        font={"size": 13, "color": DEFAULT},
        height=figure.to_dict()["layout"].get("height", 420),
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    )
    config = {"displaylogo": False, "responsive": True}
    return Markup(plotly.io.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config=config))


def _table(headings: Sequence[str], rows: Iterable[tuple[Sequence[Any], str]], left: Collection[int] = ()) -> dict[str, Any]:
    """Return a table for the page. ``rows`` are cells and the class of the row; ``left`` are columns of text."""
    return {"headings": headings, "rows": [{"cells": list(map(_cell, cells)), "mark": mark} for cells, mark in rows], "left": left}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _yaml(plain: dict[str, Any]) -> str:
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)
