"""The results of a search: the settings of its best trial, and tables of all trials."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from raydetr.config import Config, with_settings, write_yaml
from raydetr.errors import UserError
from raydetr.search.record import epochs_of, objective, objective_text, reported_metrics, seconds_of, state_of
from raydetr.search.space import as_drawn, short_name
from raydetr.search.study import Search
from raydetr.text import compact

if TYPE_CHECKING:
    import pandas

# What a run of a trial's settings leaves out: it would collide with the search of its name, and train on other images.
AS_A_RUN = {"run.name": None, "data.folds": None, "data.fold": None, "data.reshuffle": False}


def best_config(search: Search) -> Config:
    """Return the complete settings of the best trial for a run of its own.

    Raises:
        UserError: No trial has an objective yet.
    """
    best = search.best()
    if best is None:
        raise UserError(f"{search.folder}: no trial has ended with a value of {search.metric} yet")
    return with_settings(search.config(best.number), AS_A_RUN)


def write_best(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write :func:`best_config` as YAML for ``raydetr train --config``, and return the path (default: ``best.yaml`` in the folder)."""
    search = Search(folder)
    out = Path(out) if out else search.folder / "best.yaml"
    write_yaml(best_config(search), out)
    return out


def objectives_of(search: Search, trial: FrozenTrial) -> dict[str, float | None]:
    """Return the objectives of a trial by name; None for those that it does not have."""
    values = trial.values or [objective(trial)]
    return {name: values[at] if at < len(values) else None for at, name in enumerate(search.objectives)}


def trials_frame(search: Search) -> "pandas.DataFrame":
    """Return the trials as a data frame with one row per trial.

    The columns are: ``trial``, ``state``, the objectives, ``epochs``, ``seconds``, ``started``, ``ended``; the settings that vary; the
    metrics of the last epoch; ``node`` and ``cards``, where the trial ran; its ``name``; and the ``reason`` why it failed.
    """
    import pandas

    rows = []
    for trial in search.frozen():
        settings = search.settings(trial.number) if _is_drawn(search, trial) else {}
        row = {
            "trial": trial.number,
            "state": state_of(trial),
            **objectives_of(search, trial),
            "epochs": epochs_of(trial),
        }
        row |= {"seconds": seconds_of(trial), "started": trial.datetime_start, "ended": trial.datetime_complete}
        row |= {name: as_drawn(settings.get(name)) for name in search.space.names}
        row |= {name: value for name, value in reported_metrics(trial).items() if name not in row}
        rows.append({**row, "name": search.trial_name(trial.number), "reason": trial.user_attrs.get("reason")})
    return pandas.DataFrame(rows)


def write_trials(folder: str | Path) -> list[Path]:
    """Write the trials as ``trials.csv`` and ``trials.parquet`` to the folder of the search, and return both paths."""
    search = Search(folder)
    frame = trials_frame(search)
    frame.to_csv(search.folder / "trials.csv", index=False)
    frame.to_parquet(search.folder / "trials.parquet", index=False)
    return [search.folder / "trials.csv", search.folder / "trials.parquet"]


def top_trials(search: Search, count: int = 5) -> str:
    """Return a plain text table of the best trials and of trial 0, which has the default settings.

    With several objectives, a table of the Pareto front follows.

    Args:
        search: The search.
        count: The number of trials to list; the front has at most twice as many.
    """
    ranked = search.ranked()[:count]
    best = _trials_table(search, [*ranked, *(trial for trial in search.frozen()[:1] if trial not in ranked)])
    front = search.front() if search.also else []
    if not front:
        return best
    heading = f"best trade-offs of {', '.join(search.objectives)} (no trial is better in one without being worse in another):"
    return f"{best}\n\n{heading}\n{_trials_table(search, front[: 2 * count])}"


def _trials_table(search: Search, shown: Sequence[FrozenTrial]) -> str:
    from rich.console import Console
    from rich.table import Table

    trials = search.frozen()
    varied = [name for name in search.space.names if name in search.space.distributions]
    table = Table(box=None, pad_edge=False)
    for heading in ("trial", "state", search.metric, "to trial 0", *search.also, "epochs", *map(short_name, varied)):
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for trial in shown:
        value, default = objective(trial), objective(trials[0])
        gain = "" if trial.number == 0 or value is None or default is None else f"{value - default:+.4f}"
        settings = search.settings(trial.number) if _is_drawn(search, trial) else {}
        first, *also = (objective_text(name, each) for name, each in objectives_of(search, trial).items())
        cells = ["0 (default)" if trial.number == 0 else str(trial.number), state_of(trial), first, gain, *also]
        cells.append(str(epochs_of(trial)))
        table.add_row(*cells, *(compact(settings[name]) if name in settings else "-" for name in varied))
    console = Console(width=40 + 30 * len(varied) + 15 * len(search.also), color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _is_drawn(search: Search, trial: FrozenTrial) -> bool:
    """Return whether a trial has all of its settings: it is not waiting, and no driver died in the middle of drawing it."""
    try:
        search.settings(trial.number)
    except ValueError:
        return False
    return trial.state != TrialState.WAITING
