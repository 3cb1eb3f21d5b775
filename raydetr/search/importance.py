"""Which settings matter in a search, and how far that can be told.

A Gaussian process models the objective over the search space. It learns from all trials, also from those that were stopped early: their
value is carried forward by what trials that went further still gained, and counts for less. (An analysis of the complete trials alone,
such as PED-ANOVA's, has too little to go by: with ASHA a tenth of the trials are complete.) The importance of a setting is the variance
of its main effect, the modeled objective as a function of that setting averaged over all others, as a share of the sum over all settings.

Chance is taken into account twice. Intervals come from a bootstrap over trials. A setting *matters* if its effect is larger than the
largest effect of any setting where the objectives are shuffled among the trials, in 95 % of shuffles.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from raydetr.search.gaussian import GaussianProcess
from raydetr.search.record import epochs_of, objective
from raydetr.search.space import Distribution, as_drawn
from raydetr.search.study import Search

RESAMPLES = 60  # bootstrap samples, and as many shuffles
LEAST_TRIALS, LEAST_PER_SETTING = 8, 3  # below them nothing is said
POINTS, STEPS = 64, 9  # of the space that an effect is averaged over, and of the effect
EARLY_NOISE = 3.0  # how much more noise a trial has that was stopped at once
BOUNDS = (-0.2, 1.2)  # of the position of a default that lies outside the search space


@dataclasses.dataclass(frozen=True)
class Importance:
    """The importance of a setting.

    Attributes:
        name: Its dotted name.
        share: Its share in the effects of all settings.
        low: Lower end of the share's 95 % interval over trials.
        high: Upper end.
        matters: Whether its effect is larger than chance explains.
    """

    name: str
    share: float
    low: float
    high: float
    matters: bool


def importances(search: Search, seed: int = 0) -> tuple[list[Importance], str]:
    """Return the importance of each drawn setting, the largest first, and a sentence that says what can be told from them.

    The list is empty where nothing can be told: there are too few trials, or all have the same objective.

    Args:
        search: The search, which may still be running.
        seed: Seed of the resamples.
    """
    names = [name for name, each in search.space.distributions.items() if not _is_constant(each)]
    points, values, noise = _observations(search, names)
    trials = len(values)
    least = max(LEAST_TRIALS, LEAST_PER_SETTING * len(names))
    if not names or trials < least or np.ptp(values) == 0:
        why = "all trials have the same objective" if trials >= least else f"{trials} trials have a value, and {least} are needed"
        return [], f"Nothing can be said about importances: {why}."
    random = np.random.default_rng(seed)
    owner = np.arange(len(names))  # a coordinate for each setting
    model = GaussianProcess(points, values, noise, owner)
    effects, sampled, shuffled = _effects(model), [], []
    for _ in range(RESAMPLES):
        chosen = random.integers(trials, size=trials)
        sampled.append(_effects(GaussianProcess(points[chosen], values[chosen], noise[chosen], owner, model)))
        order = random.permutation(trials)
        shuffled.append(_effects(GaussianProcess(points, values[order], noise[order], owner, model)).max())
    shares, threshold = _shares(np.array(sampled)), float(np.quantile(shuffled, 0.95))
    low, high = np.quantile(shares, (0.025, 0.975), axis=0)
    share = _shares(effects[None])[0]
    order = np.argsort(-share, kind="stable")
    found = [Importance(names[at], float(share[at]), float(low[at]), float(high[at]), bool(effects[at] > threshold)) for at in order]
    return found, _sentence(found, shares[:, order], trials)


def _sentence(found: Sequence[Importance], shares: np.ndarray, trials: int) -> str:
    """Return what can be told from importances; ``shares`` [resamples, settings] are those of the bootstrap, in the same order."""
    matter = [at for at, each in enumerate(found) if each.matters]
    names = _listed([found[at].name for at in matter])
    if not matter:
        return f"No setting can be told from chance with {trials} trials."
    verb = "matters" if len(matter) == 1 else "matter"
    if len(matter) == len(found):
        words = f"{names} {verb}"
    else:
        others = "the other" if len(found) - len(matter) == 1 else "the others"
        words = f"{names} {verb}; {others} cannot be told from chance with {trials} trials"
    if len(matter) > 1:
        first, second = matter[:2]
        surely = (shares[:, first] > shares[:, second]).mean() >= 0.95
        words += f". {found[first].name} matters most" if surely else ". Which of them matters most cannot be told"
    return f"{words}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _shares(effects: np.ndarray) -> np.ndarray:
    total = effects.sum(-1, keepdims=True)
    return np.divide(effects, total, out=np.full_like(effects, 1 / effects.shape[-1]), where=total > 0)


def _is_constant(distribution: Distribution) -> bool:
    return distribution.single()


def _observations(search: Search, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the position [N, settings], the objective [N] and the relative noise [N] of every trial that has an objective."""
    ranked = search.ranked()
    complete = [trial for trial in ranked if trial.state == TrialState.COMPLETE]
    rows = []
    for trial in ranked:
        values = {name: as_drawn(value) for name, value in {**search.base, **search.settings(trial.number)}.items()}
        planned, epochs = search.config(trial.number).optim.epochs, epochs_of(trial)
        reached = 1.0 if trial.state == TrialState.COMPLETE else min(1.0, epochs / max(planned, 1))
        value = (objective(trial) or 0.0) + (0.0 if reached == 1 else _still_gained(complete, epochs))
        rows.append((positions(search.space.distributions, names, values), value, 1 + EARLY_NOISE * (1 - reached)))
    points, objectives, noise = zip(*rows, strict=True) if rows else ([], [], [])
    return np.array(points).reshape(len(rows), len(names)), np.array(objectives), np.array(noise)


def _still_gained(complete: Sequence[FrozenTrial], epoch: int) -> float:
    """Return by how much the objective of complete trials rose after an epoch, on average."""
    gains = [
        (objective(trial) or 0.0) - max(before)
        for trial in complete
        if (before := [value for step, value in trial.intermediate_values.items() if step <= epoch])
    ]
    return float(np.mean(gains)) if gains else 0.0


def positions(distributions: Mapping[str, Distribution], names: Sequence[str], values: Mapping[str, Any]) -> list[float]:
    """Return where values lie in their ranges: 0 at the lower end, 1 at the upper, on the scale of each range."""
    return [position(distributions[name], values[name]) for name in names]


def position(distribution: Distribution, value: Any) -> float:
    """Return where a value lies in its range: 0 at the lower end, 1 at the upper end, on the scale of the range.

    A value outside lies at most a fifth of the range away from it, and one that is not among the choices in their middle.
    """
    if isinstance(distribution, CategoricalDistribution):
        choices = list(distribution.choices)
        return choices.index(value) / max(1, len(choices) - 1) if value in choices else 0.5
    if distribution.log and value <= 0:
        return BOUNDS[0]
    scale = math.log if distribution.log else float
    low, high = scale(distribution.low), scale(distribution.high)
    return min(max((scale(value) - low) / ((high - low) or 1.0), BOUNDS[0]), BOUNDS[1])


def _effects(model: GaussianProcess) -> np.ndarray:
    """Return the variance of each setting's main effect over its range, [settings]."""
    settings = len(model.lengths)
    points = np.random.default_rng(0).random((POINTS, settings))
    grid = np.linspace(0, 1, STEPS)
    variances = []
    for index in range(settings):
        moved = np.repeat(points[None], STEPS, 0)  # [steps, points, settings]
        moved[:, :, index] = grid[:, None]
        variances.append(model.predict_mean(moved.reshape(-1, settings)).reshape(STEPS, POINTS).mean(1).var())
    return np.array(variances)
