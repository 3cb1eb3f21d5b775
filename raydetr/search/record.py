"""What the study of a search records of a trial: its state, objectives, epochs, turns and metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from raydetr.search.halving import is_paused
from raydetr.training.metrics import LATENCY, REPORTED, WHERE

TURNS = "turns"  # the user attribute of a trial that was paused: what turns_of returns
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
STATE_NAMES = {**{state: name for name, state in STATES.items()}, TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
ALL_STATES = (*STATES, "running", "paused", "waiting")  # what state_of returns


def is_better_lower(name: str) -> bool:
    """Return whether a search minimizes an objective; it maximizes all others."""
    return name == LATENCY


def objective(trial: FrozenTrial | None) -> float | None:
    """Return the first objective of a trial, for a paused one that of its last report; None if it has none, or for None."""
    if trial and is_paused(trial):
        return max(trial.intermediate_values.values(), default=None)
    return trial.values[0] if trial and trial.values else None


def objective_text(name: str, value: float | None) -> str:
    """Return an objective as tables of the terminal show it: a latency in milliseconds, an AP with four digits."""
    return "-" if value is None else f"{1000 * value:.1f} ms" if name == LATENCY else f"{value:.4f}"


def state_of(trial: FrozenTrial) -> str:
    """Return the state of a trial as users know it: ``complete``, ``pruned``, ``failed``, ``running``, ``paused`` or ``waiting``.

    Args:
        trial: The trial. It is paused where it waits at a rung, and waiting before it begins.
    """
    return "paused" if is_paused(trial) else STATE_NAMES[trial.state]


def epochs_of(trial: FrozenTrial) -> int:
    """Return the number of epochs that a trial was trained, which is the last one reported."""
    return trial.last_step or 0


def seconds_of(trial: FrozenTrial) -> float | None:
    """Return for how long a trial ran, without the time in which it was paused; None while it runs.

    Args:
        trial: The trial.
    """
    spans = [(start, end) for start, end, _ in turns_of(trial) if end is not None] if trial.datetime_start else []
    running = not trial.state.is_finished() and not is_paused(trial)
    return None if running or not spans else sum(end - start for start, end in spans)


def turns_of(trial: FrozenTrial) -> list[tuple[float, float | None, dict[str, Any]]]:
    """Return when and where a trial ran.

    Args:
        trial: A trial that has begun. One that was paused has several turns.

    Returns:
        For each turn its start and its end in seconds since 1970, None while it runs, and the ``node`` and ``cards`` that it ran on, as
        far as they are known.
    """
    begin = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    turns = [(start, end, where) for start, end, where in trial.user_attrs.get(TURNS, [[begin, None, {}]])]
    ended = trial.datetime_complete
    return with_end(turns, ended.timestamp(), where_of(reported_metrics(trial))) if ended else turns


def with_end(turns: Sequence[tuple[float, float | None, dict[str, Any]]], end: float, where: dict[str, Any]) -> list[Any]:
    """Return turns whose last one ends then and there, unless it has ended before.

    Args:
        turns: The turns of a trial, as :func:`turns_of` returns them.
        end: When the trial ended to run, in seconds since 1970.
        where: The ``node`` and the ``cards`` that it ran on.
    """
    start, known, _ = turns[-1]
    return [*turns[:-1], (start, end, where)] if known is None else list(turns)


def where_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``node`` and the ``cards`` that a trial ran on, as far as its metrics hold them.

    Args:
        metrics: The metrics of a trial by name.
    """
    return {name: metrics[name] for name in WHERE if name in metrics}


def reported_metrics(trial: FrozenTrial) -> dict[str, Any]:
    """Return the metrics of a trial's last epoch by name, and where it ran; studies of version 0.1 also hold values of Ray's own."""
    kept = trial.user_attrs.get("metrics", {})
    return {name: kept[name] for name in (*REPORTED, *WHERE) if name in kept}
