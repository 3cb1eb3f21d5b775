"""Population-based training (Jaderberg et al. 2017, arXiv:1711.09846).

A trial that has fallen behind continues from the weights of a better one, with perturbed settings of that one. The population is all
trials of a search, and the study of the search records what happened.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution

from raydetr.errors import UserError
from raydetr.search.space import Distribution, Space

QUANTILE = 0.25  # the worst quarter copies from the best quarter (section 4.1.1: truncation selection, 20 %)
RESAMPLED = 0.25  # the probability that a setting is drawn anew instead of being multiplied
FACTORS = (0.8, 1.25)  # a number is multiplied by one of them
# Settings that can change during training, beside those of MOVABLE_ROOMS; all others are copied from the better trial.
MOVABLE = ("optim.lr", "optim.lr_backbone", "optim.weight_decay", "optim.clip_max_norm", "model.dropout")
MOVABLE_ROOMS = ("loss", "matcher")


def check_population(space: Space) -> None:
    """Check that population-based training can search a space.

    Raises:
        UserError: The trials would have different networks, or the space draws no setting that can change during training.
    """
    for name in space.dimensions:
        if name.startswith("model.") and name not in MOVABLE:
            raise UserError(f"--scheduler pbt: {name} changes the network, and trials must be able to continue from each other's weights")
    if not movable(space):
        known = ", ".join([*MOVABLE, *(f"{room}.*" for room in MOVABLE_ROOMS)])
        raise UserError(f"--scheduler pbt: the space draws no setting that can change during training; these can: {known}")


def movable(space: Space) -> list[str]:
    """Return the drawn settings that a trial perturbs when it continues from another; conditions of other settings are not among them."""
    parents = {parent for each in space.dimensions.values() for parent in each.when}
    return [name for name in space.distributions if name not in parents and (name in MOVABLE or name.split(".")[0] in MOVABLE_ROOMS)]


def better_trial(values: Mapping[int, float], number: int, candidates: set[int], random: np.random.Generator) -> int | None:
    """Choose the trial whose weights a trial continues from: a random one of the best quarter if it is in the worst quarter.

    Args:
        values: The objectives of all trials at one epoch, by trial.
        number: The trial.
        candidates: The trials that it can continue from.
        random: The generator of the choice.

    Returns:
        The number of the other trial, or None if the trial keeps its own weights.
    """
    ranked = sorted(values, key=lambda each: (values[each], -each))
    count = min(math.ceil(len(ranked) * QUANTILE), len(ranked) // 2)
    better = [each for each in ranked[len(ranked) - count :] if each in candidates and values[each] > values[number]]
    return int(random.choice(better)) if number in ranked[:count] and better else None


def moved(space: Space, drawn: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """Perturb the drawn settings of a trial: multiply a number, go to a neighboring choice, or draw a setting anew.

    Args:
        space: The search space, which the result is within. A value outside of its range, as trial 0 may have, is clipped to it.
        drawn: The drawn settings by dotted name.
        random: The generator of the changes.

    Returns:
        The changed settings by dotted name.
    """
    changed = {name: _within(space.distributions[name], value) for name, value in drawn.items()}
    for name in movable(space):
        if name in changed:
            distribution = space.distributions[name]
            resampled = random.random() < RESAMPLED
            changed[name] = _sampled(name, distribution, random) if resampled else _shifted(distribution, changed[name], random)
    return changed


def _sampled(name: str, distribution: Distribution, random: np.random.Generator) -> Any:
    sampler = optuna.samplers.RandomSampler(seed=int(random.integers(2**31)))
    study = optuna.create_study(sampler=sampler)
    return study.ask({name: distribution}).params[name]


def _shifted(distribution: Distribution, value: Any, random: np.random.Generator) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        position = distribution.choices.index(value) + int(random.choice([-1, 1]))
        return distribution.choices[min(max(position, 0), len(distribution.choices) - 1)]
    step = distribution.step or 0
    target = value * float(random.choice(FACTORS))
    if step and abs(target - value) < step:  # otherwise rounding would return the same value
        target = value + (step if target >= value else -step)
    return _within(distribution, target)


def _within(distribution: Distribution, value: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value
    value = min(max(value, distribution.low), distribution.high)
    if distribution.step:
        value = distribution.low + round((value - distribution.low) / distribution.step) * distribution.step
    return round(float(value), 10) if isinstance(distribution, FloatDistribution) and distribution.step else value
