"""A search from outside: from what the command line or a Python program gives, and back to what each can use."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna

from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS
from raydetr.launch import tune as launcher
from raydetr.launch.places import Demands
from raydetr.launch.tune import summary
from raydetr.search.space import Space, read_space
from raydetr.search.study import best_config, best_points, read_points, trials_frame

if TYPE_CHECKING:
    import pandas

UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Found(NamedTuple):
    """What a search found: the best trial's complete settings, as ``raydetr.train`` takes them; a row a trial; Optuna's study."""

    best: settings.Config
    trials: "pandas.DataFrame"
    study: optuna.Study


def tune(config: settings.Config, space: Space | str | Path | Mapping[str, Any], **options) -> Found:
    """Search ``space`` (a file, the name of a ready one, or a mapping) around ``config``; ``options`` are :func:`launch.tune.tune`'s.

    Raises UserError for bad settings, data or an impossible request, and where all trials failed.
    """
    search = launcher.tune(config, space, **options)
    return Found(best_config(search), trials_frame(search), search.study)


def tune_command(
    layers: Sequence[Mapping[str, Any]],
    *,
    space: str | None,
    trials: int | None,
    concurrent: int | None,
    workers_per_trial: int,
    gpus_per_trial: float,
    placement: str,
    scheduler: str,
    sampler: str,
    metric: str,
    time_budget: str | None,
    points: str | None,
    warm_start: str | None,
    resume: str | None,
) -> str:
    """Run the search and tell how it went; the arguments are the flags of ``raydetr tune``. Raises UserError."""
    demands = Demands(workers_per_trial, gpus_per_trial, concurrent, placement)
    budget = seconds(time_budget)
    known = read_space(space) if space else None
    if resume:
        if any(layers):
            given = ", ".join(sorted(name for layer in layers for name in settings.flatten(layer)))
            raise UserError(f"--resume: a search keeps its settings; {given} may not be given")
        return summary(launcher.resume(resume, known, trials=trials, demands=demands, time_budget_s=budget))
    if known is None:
        raise UserError("--space: say what to search, a file or a ready space such as loss or learning_rates")
    if metric not in METRICS:
        raise UserError(f"--metric: {metric!r} is not one of {', '.join(METRICS)}")
    config = settings.load_config(*layers)
    search = launcher.tune(
        config,
        known,
        trials=32 if trials is None else trials,
        demands=demands,
        metric=metric,
        sampler=sampler,
        scheduler=scheduler,
        points=first_points(known, config, points, warm_start),
        time_budget_s=budget,
    )
    return summary(search)


def first_points(space: Space, config: settings.Config, points: str | None, warm_start: str | None) -> list[dict[str, Any]]:
    """The settings to try after trial 0: those written by hand, then the best of an earlier search."""
    written = read_points(points, space, config) if points else []
    return written + (best_points(warm_start, space, config) if warm_start else [])


def seconds(text: str | None) -> float | None:
    """``90s``, ``30m``, ``2h`` or ``1d`` in seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match or not float(match[1]):
        raise UserError(f"--time-budget: {text!r} is no time such as 90s, 30m or 2h")
    return float(match[1]) * UNITS_S[match[2]]
