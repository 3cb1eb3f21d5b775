"""The report of a search, or of several beside each other: one HTML file that needs no network."""

import html
import itertools
import warnings
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import plotly.io
import yaml
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from raydetr.errors import UserError
from raydetr.search.space import as_drawn
from raydetr.search.study import STATE_NAMES, Search, epochs_of, importance_evaluator, importances, trials_frame
from raydetr.storage import fetched, is_uri

DEFAULT, BEST, OTHER = "#1b2a41", "#d1495b", "#b8c4d0"  # trial 0, the best trial, the rest
SEARCHES = ("#2e6f95", "#d1495b", "#3a7d44", "#e09f3e", "#7b5ea7", "#2a9d8f", "#8d5b4c", "#5c6b73")

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: #1b2a41; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 2px; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 4px 0 12px; }
.lead { font-size: 17px; }
.quiet { color: #5c6b73; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { flex: 1 1 130px; background: #fff; border: 1px solid #dde3e9; border-radius: 10px; padding: 10px 14px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-variant-numeric: tabular-nums; }
section { background: #fff; border: 1px solid #dde3e9; border-radius: 10px; padding: 16px 18px; margin: 14px 0; overflow-x: auto; }
hr { border: 0; border-top: 2px solid #dde3e9; margin: 40px 0 24px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 14px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #edf0f3; }
th:first-child, td:first-child, .text { text-align: left; }
th { color: #5c6b73; font-weight: 600; }
tr.best td { font-weight: 600; color: #d1495b; }
tr.default td { font-weight: 600; }
details { margin: 6px 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: #f4f6f8; border-radius: 6px; padding: 10px 12px; overflow-x: auto; font-size: 13px; }
"""


def report(run_folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of the searches in ``run_folders`` and return its path.

    One search goes to ``report.html`` in its folder, one in an object store and several compared in ``./report.html``, where ``out``
    names no other file. A search may still be running. Raises UserError for a folder without a search and for searches with different
    objectives.
    """
    if not run_folders:
        raise UserError("report: name the folder of at least one search")
    searches = [Search(fetched(folder, recursive=False)) for folder in run_folders]
    metrics = {search.metric: search.folder for search in searches}
    if len(metrics) > 1:
        raise UserError("report: " + ", ".join(f"{folder} maximizes {metric}" for metric, folder in metrics.items()) + "; not comparable")
    alone = len(searches) == 1
    out = Path(out) if out else (searches[0].folder if alone and not is_uri(run_folders[0]) else Path()) / "report.html"
    title = f"Search {_label(searches[0].folder)}" if alone else f"{len(searches)} searches compared"
    body = [_one(search, f"s{index}") for index, search in enumerate(searches)]
    if not alone:
        body.insert(0, _comparison(searches))
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f"<body><main>{'<hr>'.join(body)}</main></body></html>\n"
    )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot write the report ({error.strerror or error})") from None
    return out


def _one(search: Search, anchor: str) -> str:
    """All about one search."""
    trials = search.frozen()
    parts = [f"<h1>Search {html.escape(_label(search.folder))}</h1>", _verdict(search), _tiles(search)]
    parts.append(_section("Best trial beside the default settings", _best_beside_default(search)))
    for name, (heading, explanation, figure) in _figures(search).items():
        parts.append(_section(heading, _picture(figure, f"{anchor}-{name}"), explanation))
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    if failed:
        rows = [([trial.number, trial.user_attrs.get("reason", "unknown")], "") for trial in failed]
        parts.append(_section("Failed trials", _table(["trial", "reason"], rows, text={1})))
    parts.append(_section("Trials", f"<details><summary>All {len(trials)} trials</summary>{_all_trials(search)}</details>"))
    settings = {name: as_drawn(value) for name, value in search.base.items()}
    parts.append(
        _section(
            "Settings",
            f"<details open><summary>Search space</summary><pre>{_yaml(search.space.to_dict())}</pre></details>"
            f"<details><summary>Base settings, which are trial 0's</summary><pre>{_yaml(settings)}</pre></details>",
        )
    )
    return "\n".join(parts)


def _verdict(search: Search) -> str:
    """In words, whether the search found better than the default settings."""
    default, best, metric = search.frozen()[0], search.best(), html.escape(search.metric)
    if best is None:
        return f'<p class="lead">No trial has ended with a value of {metric} yet.</p>'
    if best.number == 0:
        return f'<p class="lead">No trial beats the default settings (trial 0), which reach {metric} <b>{best.value:.4f}</b>.</p>'
    text = f"Trial {best.number} reaches {metric} <b>{best.value:.4f}</b>; the default settings (trial 0) "
    text += "have no value." if default.value is None else f"reach <b>{default.value:.4f}</b>: <b>{best.value - default.value:+.4f}</b>."
    count = len(search.ranked())
    return (
        f'<p class="lead">{text}</p><p class="quiet">It is the best of {count} on the very photographs that measured it, so expect less on '
        "others. Before trusting a small difference, train both settings (best.yaml, config.yaml) with several seeds.</p>"
    )


def _tiles(search: Search) -> str:
    trials, best = search.frozen(), search.best()
    states = [f"{count} {name}" for state, name in STATE_NAMES.items() if (count := sum(trial.state == state for trial in trials))]
    tiles = {
        f"best {search.metric}": f"{best.value:.4f}" if best else "-",
        "trials handed out": f"{sum(trial.state != TrialState.WAITING for trial in trials)} of {search.trials}",
        ", ".join(states): f"{sum(trial.state.is_finished() for trial in trials)} ended",
        "epochs trained": str(sum(epochs_of(trial) for trial in trials)),
        "from first start to last end": _span(trials),
        "settings drawn": str(len(search.space.distributions)),
    }
    cells = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span class="quiet">{html.escape(name)}</span></div>'
        for name, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _span(trials: Iterable[FrozenTrial]) -> str:
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    if not starts or not ends:
        return "-"
    minutes, seconds = divmod(round((max(ends) - min(starts)).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _best_beside_default(search: Search) -> str:
    """Objective, metrics and the settings that differ, of trial 0 and of the best trial."""
    best, trials = search.best(), search.frozen()
    if trials[0].state == TrialState.WAITING:
        return '<p class="quiet">Trial 0 has not started.</p>'
    columns = [trials[0]] + ([best] if best and best.number else [])
    headings = ["", *("trial 0 (default)" if trial.number == 0 else f"trial {trial.number} (best)" for trial in columns)]
    rows = [
        ([search.metric, *(trial.value for trial in columns)], "best"),
        (["epochs", *(epochs_of(trial) for trial in columns)], ""),
    ]
    metrics = [trial.user_attrs.get("metrics", {}) for trial in columns]
    names = dict.fromkeys(name for each in metrics for name in each if name not in ("epochs", search.metric))
    rows += [([name, *(each.get(name) for each in metrics)], "") for name in names]
    settings = [{**search.base, **search.settings(trial.number)} for trial in columns]
    varied = [name for name in search.space.dimensions if len(columns) == 1 or settings[0][name] != settings[1][name]]
    rows += [([name, *(as_drawn(each[name]) for each in settings)], "") for name in varied]
    return _table(headings, rows)


def _all_trials(search: Search) -> str:
    frame = trials_frame(search)
    best = search.best()
    hidden = [name for name in frame.columns if name in ("started", "ended", "name", "reason") or frame[name].isna().all()]
    frame = frame.drop(columns=[name for name in hidden if name != search.metric])
    rows = []
    for row in frame.itertuples(index=False):
        mark = "best" if best and row[0] == best.number else "default" if row[0] == 0 else ""
        rows.append(([None if value != value else value for value in row], mark))  # NaN stands for nothing in a frame
    return _table(list(frame.columns), rows)


def _figures(search: Search) -> dict[str, tuple[str, str, go.Figure]]:
    """The pictures that the trials so far allow: by name, heading, explanation and figure."""
    study, trials, metric = search.study, search.frozen(), search.metric
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    drawn = {name for trial in complete for name in trial.params}
    plots = optuna.visualization
    figures: dict[str, tuple[str, str, go.Figure]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials; the page says so
        if complete:
            figures["history"] = ("History", "Every trial's objective, and the best so far.", _history(search))
        if any(trial.intermediate_values for trial in trials):
            figures["curves"] = ("Learning curves", f"The best {metric} so far after every epoch, trial by trial.", _curves(search))
        if importances(study):
            explanation = "Which settings tell the better trials from the rest (PED-ANOVA). Rough below some thirty complete trials."
            chart = plots.plot_param_importances(study, evaluator=importance_evaluator(len(complete)), target_name=metric)
            chart.update_traces(marker_color=SEARCHES[0])
            figures["importances"] = ("Importances", explanation, chart)
        if len(complete) > 1 and drawn:
            explanation = "A line a complete trial, through its settings; the darker, the better. None: not drawn in that trial."
            figures["parallel"] = ("Parallel coordinates", explanation, plots.plot_parallel_coordinate(study, target_name=metric))
            explanation = "The objective over each setting; later trials are darker."
            figures["slices"] = ("Slices", explanation, plots.plot_slice(study, target_name=metric))
        if any(trial.datetime_start for trial in trials):
            figures["timeline"] = ("Timeline", "When each trial ran, and how it ended.", plots.plot_timeline(study))
            if len(trials) < 15:
                figures["timeline"][2].update_yaxes(dtick=1)
    return figures


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
    # The best and trial 0 last, on top of the others.
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


def _comparison(searches: Sequence[Search]) -> str:
    """Several searches beside each other: what each reached, and at what cost."""
    metric = searches[0].metric
    by_trial, by_epoch, rows = go.Figure(), go.Figure(), []
    for index, (search, label) in enumerate(zip(searches, _labels(searches), strict=True)):
        ended = sorted((trial for trial in search.frozen() if trial.state.is_finished()), key=lambda trial: trial.datetime_complete)
        epochs = list(itertools.accumulate(epochs_of(trial) for trial in ended))
        so_far = _running_maximum(trial.value for trial in ended)
        style = {"name": label, "mode": "lines", "line": {"shape": "hv", "width": 2.5, "color": SEARCHES[index % len(SEARCHES)]}}
        by_trial.add_scatter(x=list(range(1, len(ended) + 1)), y=so_far, **style)
        by_epoch.add_scatter(x=epochs, y=so_far, **style)
        best, default = search.best(), search.frozen()[0].value
        gain = f"{best.value - default:+.4f}" if best and default is not None else None
        failed = sum(trial.state == TrialState.FAIL for trial in ended)
        reached = [best and best.value, best and best.number, default, gain]
        rows.append([label, *reached, len(ended), failed, sum(epochs[-1:]), _span(ended)])
    highest = max((row[1] for row in rows if row[1] is not None), default=None)
    headings = ["search", f"best {metric}", "in trial", f"default {metric}", "gain", "trials ended", "failed", "epochs", "time"]
    by_trial.update_layout(xaxis_title="Trials ended", yaxis_title=f"Best {metric} so far", showlegend=True)
    by_epoch.update_layout(xaxis_title="Epochs spent by ended trials", yaxis_title=f"Best {metric} so far", showlegend=True)
    return (
        f"<h1>{len(searches)} searches compared</h1>"
        + _section(
            "What each reached", _table(headings, [(row, "best" if row[1] is not None and row[1] == highest else "") for row in rows])
        )
        + _section("Best so far, by trials", _picture(by_trial, "compared-trials"))
        + _section("Best so far, by epochs", _picture(by_epoch, "compared-epochs"), "The fair comparison where trials are stopped early.")
    )


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


def _picture(figure: go.Figure, name: str) -> str:
    figure.update_layout(
        template="plotly_white", title=None, margin={"l": 60, "r": 30, "t": 40, "b": 50}, font={"size": 13, "color": DEFAULT}, height=420
    )
    return plotly.io.to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": figure.layout.width is None},
    )


def _section(heading: str, content: str, explanation: str = "") -> str:
    below = f'<p class="quiet">{html.escape(explanation)}</p>' if explanation else ""
    return f"<section><h2>{html.escape(heading)}</h2>{below}{content}</section>"


def _table(headings: Sequence[str], rows: Iterable[tuple[Sequence[Any], str]], text: Collection[int] = ()) -> str:
    """``rows``: cells and the row's class; the columns ``text`` are set to the left."""
    classes = [" class=text" if index in text else "" for index in range(len(headings))]
    head = "".join(f"<th{style}>{html.escape(str(heading))}</th>" for heading, style in zip(headings, classes, strict=True))
    body = ""
    for cells, mark in rows:
        body += (
            f'<tr class="{mark}">' + "".join(f"<td{style}>{_cell(cell)}</td>" for cell, style in zip(cells, classes, strict=True)) + "</tr>"
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))


def _yaml(plain: dict[str, Any]) -> str:
    return html.escape(yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120))
