"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846): a trial that has fallen behind goes on from a better one's
weights, with that one's settings a little changed. The population is all trials of a search; its memory is the search's study."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from raydetr.errors import UserError
from raydetr.search.space import Space

QUANTILE = 0.25  # the worst quarter copies from the best quarter (section 4.1.1: truncation selection, 20 %)
RESAMPLED = 0.25  # how often a setting is drawn anew instead of being moved
FACTORS = (0.8, 1.25)  # a number is moved by one of them
# What a training under way can change: every other setting goes over from the better trial as it is.
MOVABLE = ("optim.lr", "optim.lr_backbone", "optim.weight_decay", "optim.clip_max_norm", "model.dropout")
MOVABLE_ROOMS = ("loss", "matcher")


def check_population(space: Space) -> None:
    """Raises UserError where trials of ``space`` could not go on from each other's weights, or could change nothing if they did."""
    for name in space.dimensions:
        if name.startswith("model.") and name not in MOVABLE:
            raise UserError(f"--scheduler pbt: {name} makes another network of it, which cannot go on from the others' weights")
    if not movable(space):
        known = ", ".join([*MOVABLE, *(f"{room}.*" for room in MOVABLE_ROOMS)])
        raise UserError(f"--scheduler pbt: this space draws nothing that may change in mid-training; that may {known}")


def movable(space: Space) -> list[str]:
    """The drawn settings that a trial changes when it goes on from another; not those that others depend on."""
    parents = {parent for each in space.dimensions.values() for parent in each.when}
    return [name for name in space.distributions if name not in parents and (name in MOVABLE or name.split(".")[0] in MOVABLE_ROOMS)]


def better_trial(values: Mapping[int, float], number: int, candidates: set[int], random: np.random.Generator) -> int | None:
    """Whose weights trial ``number`` goes on from, None where it keeps its own.

    ``values`` are the objectives at one epoch by trial, its own among them; ``candidates`` those who still have what it takes.
    """
    ranked = sorted(values, key=lambda each: (values[each], -each))
    count = min(math.ceil(len(ranked) * QUANTILE), len(ranked) // 2)
    better = [each for each in ranked[len(ranked) - count :] if each in candidates and values[each] > values[number]]
    return int(random.choice(better)) if number in ranked[:count] and better else None


def moved(space: Space, drawn: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """The ``drawn`` settings of a trial, changed within ``space``: moved by a factor or to a neighbouring choice, or drawn anew.

    A value outside its range (trial 0 may have one) comes into it.
    """
    changed = {name: _within(space.distributions[name], value) for name, value in drawn.items()}
    for name in movable(space):
        if name in changed:
            distribution = space.distributions[name]
            resampled = random.random() < RESAMPLED
            changed[name] = _sampled(name, distribution, random) if resampled else _shifted(distribution, changed[name], random)
    return changed


def _sampled(name: str, distribution: optuna.distributions.BaseDistribution, random: np.random.Generator) -> Any:
    sampler = optuna.samplers.RandomSampler(seed=int(random.integers(2**31)))
    study = optuna.create_study(sampler=sampler)
    return study.ask({name: distribution}).params[name]


def _shifted(distribution: optuna.distributions.BaseDistribution, value: Any, random: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        place = distribution.choices.index(value) + int(random.choice([-1, 1]))
        return distribution.choices[min(max(place, 0), len(distribution.choices) - 1)]
    step = distribution.step or 0
    target = value * float(random.choice(FACTORS))
    if step and abs(target - value) < step:  # else a small number of steps would never be left
        target = value + (step if target >= value else -step)
    return _within(distribution, target)


def _within(distribution: optuna.distributions.BaseDistribution, value: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value
    value = min(max(value, distribution.low), distribution.high)
    if distribution.step:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    return round(float(value), 10) if isinstance(distribution, FloatDistribution) and distribution.step else value
