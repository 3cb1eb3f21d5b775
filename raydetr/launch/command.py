"""Run a search for the command line and for Python programs: turn flags or settings into what each part of a search needs."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import optuna

from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.launch import confirm as confirmer
from raydetr.launch import tune as launcher
from raydetr.launch.confirm import confirmed_text
from raydetr.launch.signals import Interrupted
from raydetr.launch.slots import Demands
from raydetr.launch.tune import summary
from raydetr.search.points import read_points, warm_start_from
from raydetr.search.results import best_config, trials_frame
from raydetr.search.space import Space, read_space
from raydetr.search.study import Search

if TYPE_CHECKING:
    import pandas

UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Found(NamedTuple):
    """What a search found.

    Attributes:
        best: The best trial's complete settings, as ``raydetr.train`` takes them.
        trials: A table with a row for each trial.
        study: Optuna's study.
    """

    best: settings.Config
    trials: "pandas.DataFrame"
    study: optuna.Study


def tune(config: settings.Config, space: Space | str | Path | Mapping[str, Any], **options) -> Found:
    """Search ``space`` around ``config``.

    Args:
        config: The settings of trial 0, and the values of all settings that are not in the space.
        space: A search space, a file of one, the name of a ready one, or a mapping.
        **options (Any): Those of :func:`raydetr.launch.tune.tune`.

    Returns:
        The best settings, a table of all trials, and the study.

    Raises:
        UserError: Bad settings or data, an impossible request, or all trials failed.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP ended the search, which is kept: the message says how to resume it, and the
            exception's attribute ``search`` is the :class:`raydetr.search.study.Search`, or None if it had not begun. ``best.yaml``,
            ``best.pth`` and the tables in its folder are those of the trials so far.
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
    scheduler: str | None,
    sampler: str | None,
    metric: str,
    also: Sequence[str],
    time_budget: str | None,
    points: str | None,
    warm_start: Sequence[str],
    resume: str | None,
    confirm: bool = False,
) -> str:
    """Run or resume a search for ``raydetr tune``, and return its summary.

    Args:
        layers: Settings by dotted name, parsed: those of ``--config``, then those of flags, which override them. All must be empty with
            ``resume``.
        space: File or name of the search space (``--space``); with ``resume`` it may be None, otherwise it is required.
        trials: Number of trials in all; None: 32, or with ``resume`` as many as before.
        concurrent: Number of trials at a time; None: as many as fit.
        workers_per_trial: Number of training workers of each trial.
        gpus_per_trial: GPUs of a trial of one worker; below 1, trials share a GPU.
        placement: ``"pack"`` or ``"spread"``, as in :class:`raydetr.launch.slots.Demands`.
        scheduler: What stops trials early, as for :func:`raydetr.launch.tune.tune`. Ignored with ``resume``.
        sampler: How settings are drawn, as for :func:`raydetr.launch.tune.tune`. Ignored with ``resume``.
        metric: The COCO metric to maximize, one of ``METRICS``. Ignored with ``resume``.
        also: Further objectives, as for :func:`raydetr.launch.tune.tune`. Ignored with ``resume``.
        time_budget: When to stop, as :func:`seconds` reads it; None: no limit.
        points: File of settings to try after trial 0, or None. Ignored with ``resume``.
        warm_start: Path or URI of an earlier search whose best settings are tried as well, or None. Ignored with ``resume``.
        resume: Path or URI of the search to resume, or None.
        confirm: Whether to confirm the search when it has ended. The summary is then printed, and the verdict returned.

    Raises:
        UserError: As :func:`raydetr.launch.tune.tune`, and for flags that do not fit together.
        KeyboardInterrupt: A signal ended the search; its summary is printed before.
    """
    demands = Demands(workers_per_trial, gpus_per_trial, concurrent, placement)
    budget = seconds(time_budget)
    known = read_space(space) if space else None
    if resume:
        if any(layers):
            given = ", ".join(sorted(name for layer in layers for name in settings.flatten(layer)))
            raise UserError(f"--resume: a search keeps its settings; {given} may not be given")
        with printing_summary():
            search = launcher.resume(resume, known, trials=trials, demands=demands, time_budget_s=budget)
        return _summary_and_verdict(search, confirm, demands)
    if known is None:
        raise UserError("--space: say what to search, a file or a ready space such as loss or learning_rates")
    config = settings.load_config(*layers)
    first = read_points(points, known, config) if points else []
    earlier, prior = warm_start_from(warm_start, known, config)
    with printing_summary():
        search = launcher.tune(
            config,
            known,
            trials=32 if trials is None else trials,
            demands=demands,
            metric=metric,
            also=also,
            sampler=sampler,
            scheduler=scheduler,
            points=[*first, *earlier],
            prior=prior,
            time_budget_s=budget,
        )
    return _summary_and_verdict(search, confirm, demands)


def _summary_and_verdict(search: Search, confirmed: bool, demands: Demands) -> str:
    if not confirmed:
        return summary(search)
    print(summary(search), flush=True)
    return confirmed_text(confirmer.confirm(search.path, demands=demands), search.path)


def confirm_command(
    search: str,
    *,
    top: int,
    seeds: int,
    budget: int | None,
    concurrent: int | None,
    workers_per_trial: int,
    gpus_per_trial: float,
) -> str:
    """Confirm a search for ``raydetr confirm``, and return the verdict as text.

    Args:
        search: Path or URI of the search.
        top: Number of its best trials to train afresh, besides trial 0.
        seeds: Number of seeds of each.
        budget: Number of trainings in all, which replaces ``top`` and ``seeds``, or None.
        concurrent: Number of trainings at a time; None: as many as fit.
        workers_per_trial: Number of training workers of each training.
        gpus_per_trial: GPUs of a training of one worker; below 1, trainings share a GPU.

    Raises:
        UserError: As :func:`raydetr.launch.confirm.confirm`.
        KeyboardInterrupt: A signal ended it; the message says how to resume.
    """
    demands = Demands(workers_per_trial, gpus_per_trial, concurrent)
    return confirmed_text(confirmer.confirm(search, top=top, seeds=seeds, budget=budget, demands=demands), search)


@contextlib.contextmanager
def printing_summary() -> Iterator[None]:
    """Print the summary of a search that a signal ends."""
    try:
        yield
    except Interrupted as error:
        if error.search:
            print(summary(error.search), flush=True)
        raise


def seconds(text: str | None) -> float | None:
    """Convert a time such as ``90s``, ``30m``, ``2h`` or ``1d`` to seconds.

    Args:
        text: A positive number with one of these units, or without one for seconds; None: no time.

    Returns:
        The time in seconds; None for None.

    Raises:
        UserError: The text is not such a time.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match or not float(match[1]):
        raise UserError(f"--time-budget: {text!r} is no time such as 90s, 30m or 2h")
    return float(match[1]) * UNITS_S[match[2]]
