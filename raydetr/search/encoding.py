"""Settings as points of a cube, in which a model of the objective measures distances.

There are two forms. *Positions* have one number between 0 and 1 for each setting: the place of a number within its range, on a
logarithmic scale where the range is one, and the place of a choice in its list. *Coordinates* are what the model sees: a number has its
position, and a choice has one coordinate for each of its values, so that any two values are equally far apart. A setting that is not
drawn, because its condition does not hold, has the same coordinates in all trials.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution

from raydetr.search.space import Distribution, Space, as_drawn

ABSENT = 0.5  # the coordinate of a number that is not drawn
APART = math.sqrt(0.5)  # the coordinate of the chosen value, so that two choices are at a distance of 1


def to_unit(distribution: Distribution, value: Any) -> float:
    """Return the position of a value within its range or list; that of a number outside of its range is below 0 or above 1."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    low, high = distribution.low, distribution.high
    if distribution.log:
        low, high, value = math.log(low), math.log(high), math.log(value) if value > 0 else -math.inf
    return (value - low) / (high - low)


def from_unit(distribution: Distribution, position: float) -> Any:
    """Return the value at a position, rounded to the step of its range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[min(int(position * len(distribution.choices)), len(distribution.choices) - 1)]
    low, high = distribution.low, distribution.high
    value = low * (high / low) ** position if distribution.log else low + position * (high - low)
    if distribution.step:
        value = low + round((value - low) / distribution.step) * distribution.step
    return type(low)(min(max(value, low), high))


class Cube:
    """Positions and coordinates of the settings that a space draws.

    Attributes:
        distributions: Optuna's distribution of every drawn setting that has more than one value, by dotted name.
        is_choice: Whether each setting [settings] is a choice.
        owner: The index of the setting [coordinates] that each coordinate belongs to.
    """

    def __init__(self, space: Space) -> None:
        self.distributions = {name: each for name, each in space.distributions.items() if not each.single()}
        self.conditions = {name: space.dimensions[name].when for name in self.distributions}
        self.widths = [len(each.choices) if isinstance(each, CategoricalDistribution) else 1 for each in self.distributions.values()]
        self.is_choice = np.array([isinstance(each, CategoricalDistribution) for each in self.distributions.values()], bool)
        self.owner = np.repeat(np.arange(len(self.widths)), self.widths)

    def positions(self, points: Iterable[Mapping[str, Any]]) -> np.ndarray:
        """Return the positions [n, settings] of drawn settings, within the ranges; NaN for a setting that was not drawn."""
        rows = [
            [min(max(to_unit(each, point[name]), 0.0), 1.0) if name in point else math.nan for name, each in self.distributions.items()]
            for point in points
        ]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.distributions))

    def snap(self, positions: np.ndarray) -> np.ndarray:
        """Return the nearest positions [n, settings] that can be drawn: on the steps of a range, NaN where a condition does not hold."""
        snapped = positions.copy()
        for column, (name, each) in enumerate(self.distributions.items()):
            holds = np.ones(len(positions), bool)
            for parent, wanted in self.conditions[name].items():
                holds &= self._takes(parent, snapped, wanted)
            if isinstance(each, CategoricalDistribution):
                choices = len(each.choices)
                snapped[:, column] = (np.minimum(np.floor(snapped[:, column] * choices), choices - 1) + 0.5) / choices
            elif each.step:
                steps = (each.high - each.low) / each.step
                snapped[:, column] = np.round(snapped[:, column] * steps) / steps
            snapped[~holds, column] = math.nan
        return snapped

    def _takes(self, name: str, positions: np.ndarray, wanted: Iterable[Any]) -> np.ndarray:
        """Return in which rows [n] a choice or an integer has one of the wanted values."""
        if name not in self.distributions:  # it has a single value, which the condition names
            return np.ones(len(positions), bool)
        each, values = self.distributions[name], [as_drawn(value) for value in wanted]
        column = positions[:, list(self.distributions).index(name)]
        return np.array([not math.isnan(position) and from_unit(each, position) in values for position in column], bool)

    def coordinates(self, positions: np.ndarray) -> np.ndarray:
        """Return the coordinates [n, coordinates] of positions [n, settings]."""
        parts = []
        for column, each in zip(positions.T, self.distributions.values(), strict=True):
            if isinstance(each, CategoricalDistribution):
                chosen = np.minimum(np.nan_to_num(column, nan=-1) * len(each.choices), len(each.choices) - 1)[:, None]
                parts.append(APART * (np.floor(chosen) == np.arange(len(each.choices))))
            else:
                parts.append(np.nan_to_num(column, nan=ABSENT)[:, None])
        return np.hstack(parts)

    def values(self, positions: np.ndarray) -> dict[str, Any]:
        """Return the settings at positions [settings], without those that are not drawn."""
        settings = zip(self.distributions.items(), positions, strict=True)
        return {name: from_unit(each, float(position)) for (name, each), position in settings if not math.isnan(position)}
