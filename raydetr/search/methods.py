"""The methods of a search: the samplers that draw settings, and the schedulers that stop trials early."""

import difflib
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning

from raydetr.errors import UserError
from raydetr.search.halving import RungPruner
from raydetr.search.population import check_population
from raydetr.search.sampler import CurveSampler
from raydetr.search.space import Space

SAMPLERS = ("tpe", "gp", "random", "cmaes")
SCHEDULERS = ("asha", "half", "promote", "evidence", "median", "none", "pbt")
TAKE_SEVERAL = ("tpe", "random")  # the samplers that take several objectives
MODEL_STARTUP = 6  # draws before the model of the sampler gp
REDUCTION = 3  # each rung is at three times the epochs of the one before; asha and evidence let a third of the trials pass
HALF = 2  # half and promote let half of the trials pass


def check_request(space: Space, trials: int, sampler: str, pruner: str, grace: int = 1, objectives: Sequence[str] = ()) -> None:
    """Check what is asked of a new search.

    Args:
        space: The search space.
        trials: The number of trials, including trial 0.
        sampler: How settings are drawn, one of ``SAMPLERS``.
        pruner: What stops trials early, one of ``SCHEDULERS``.
        grace: The first epoch after which a trial may be stopped.
        objectives: The names of the objectives.

    Raises:
        UserError: There is no trial, a name is unknown, the scheduler cannot search the space, or sampler or scheduler do not take
            several objectives.
    """
    check_count(trials)
    make_sampler(sampler, 0, trials, space)
    make_pruner(pruner, grace, trials)
    if len(objectives) > 1:
        _check_several(objectives, sampler, pruner)
    if pruner == "promote" and sampler not in ("gp", "random"):
        raise UserError(f"--scheduler promote: --sampler {sampler} does not know paused trials; take --sampler gp, or --scheduler half")
    if pruner == "pbt":
        check_population(space)


def _check_several(objectives: Sequence[str], sampler: str, pruner: str) -> None:
    repeated = next((name for number, name in enumerate(objectives) if name in objectives[:number]), None)
    if repeated:
        raise UserError(f"--also {repeated}: is an objective of the search already; name another one, or leave it out")
    others = " ".join(f"--also {name}" for name in objectives[1:])
    if pruner != "none":
        raise UserError(
            f"{others}: --scheduler {pruner} judges trials by {objectives[0]} alone, before the others are known; "
            "several objectives need --scheduler none"
        )
    if sampler not in TAKE_SEVERAL:
        raise UserError(f"{others}: --sampler {sampler} knows one objective; {' and '.join(TAKE_SEVERAL)} take several")


def check_count(trials: int) -> None:
    """Check the number of trials of a search.

    Args:
        trials: The number of trials, including trial 0.

    Raises:
        UserError: There is none.
    """
    if trials < 1:
        raise UserError(f"--trials {trials}: a search needs at least one trial, which has the default settings")


def make_sampler(
    name: str, seed: int | Sequence[int], trials: int, space: Space, prior: Sequence[Mapping[str, Any]] = ()
) -> optuna.samplers.BaseSampler:
    """Return a seeded Optuna sampler for a search of so many trials.

    Args:
        name: One of ``SAMPLERS``.
        seed: One number that seeds it, or several: that of the search, then those of the draw.
        trials: The number of trials of the search.
        space: The search space.
        prior: Drawn settings that are believed to be good; only ``gp`` uses them.

    Raises:
        UserError: The name is unknown, or a package is missing.
    """
    _check_name("sampler", name, SAMPLERS)
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("--sampler cmaes needs the package cmaes: pip install cmaes")
    search_seed = seed if isinstance(seed, int) else seed[0]
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    startup = min(10, max(3, trials // 4))  # random draws first; Optuna's 10 would be all of a short search
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name in ("tpe", "gp"):
            # Grouping models conditional settings apart from the others.
            tpe = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)
            return tpe if name == "tpe" else CurveSampler(seed, space, min(startup, MODEL_STARTUP), search_seed, tpe, prior)
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, consider_pruned_trials=True, warn_independent_sampling=False)
        return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(name: str, grace: int, trials: int) -> optuna.pruners.BasePruner:
    """Return the Optuna pruner of a scheduler.

    Population-based training stops no trial: a trial that falls behind continues from a better one instead. Nor does ``promote``, which
    pauses them (:meth:`raydetr.search.study.Search.pause`).

    Args:
        name: One of ``SCHEDULERS``.
        grace: The first epoch after which a trial may be stopped.
        trials: The number of trials of the search.

    Raises:
        UserError: The name is unknown, or ``grace`` is less than 1.
    """
    _check_name("scheduler", name, SCHEDULERS)
    if grace < 1:
        raise UserError(f"a grace of {grace} epochs: a trial runs for at least one epoch")
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=grace, reduction_factor=REDUCTION)
    if name == "evidence":
        return RungPruner(grace, REDUCTION, REDUCTION, again=True)
    if name == "half":
        return RungPruner(grace, REDUCTION, HALF)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=min(5, max(1, trials // 4)), n_warmup_steps=grace)
    return optuna.pruners.NopPruner()


def _check_name(what: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(f"unknown {what} {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))
