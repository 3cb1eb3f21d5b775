"""A sampler that learns from every trial of a search: complete, stopped and running ones.

A Gaussian process models the objective over the settings and the share of the epochs that are left. A report of a trial enters carried
forward by what other trials gained from there on. What this neglects, such as that small learning rates gain more at the end, is alike for
similar settings: the model learns it from trials that went on, and stays unsure of settings with which all trials were stopped early. The
first draws, before there is a model, are spread over the space. A running trial also enters with what the model expects of it at the last
epoch, as if that were known already, so that draws at the same time spread. The next settings are the candidate with the largest expected
improvement at the last epoch.

Where few trials run at a time, every second draw comes from Optuna's TPE. It knows less, but does not stay where the model is sure, and
counts how far a trial has come, not only its values.
"""

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from raydetr.search.curves import carried_forward, curve_table
from raydetr.search.encoding import Cube
from raydetr.search.gaussian import GaussianProcess
from raydetr.search.halving import is_paused
from raydetr.search.space import Space

CANDIDATES = {None: 200, 0.1: 150, 0.03: 50}  # how many are drawn around the best point, by standard deviation; None: everywhere
OTHER_CHOICE = 0.1  # the probability that a candidate near the best point has another choice of a setting
MODELED = 300  # the model has at most so many reports: the best of those that are the last of their trial, and a sample of the others
BELIEVED_NOISE = 0.1
STRATA = 8  # so many first draws are one in each part of every range
TAIL = 1.5  # an objective counts as no lower than so many times the distance of the best from the median, below the median
PRIOR_SD, PRIOR_SHARE = 0.2, 0.5  # the width of a prior, in parts of a range; the share of the first draws that come from it
PRIOR_WEIGHT = 5.0  # trials after which the model counts as much as the prior
FEW = 4  # with fewer running trials every second draw comes from TPE; more are different enough from one another
THREADS = ThreadpoolController()  # of the linear algebra of NumPy and SciPy


class CurveSampler(optuna.samplers.BaseSampler):
    """Optuna sampler that draws the settings of a trial from a model of all trials with a report.

    Args:
        seed: Seed of the draw. Together with the trials of the study it decides the next one.
        space: The search space.
        startup: The number of trials with a report that the model needs; before, settings are drawn from Latin hypercubes.
        search_seed: Seed of the Latin hypercubes, the same for all draws of a search.
        density: Optuna's TPE, for every second draw where few trials run at a time.
        prior: Settings that are believed to be good, by dotted name. The first draws are often near them, and the model prefers
            candidates near them, less so the more trials there are (Hvarfner et al. 2022, arXiv:2204.11051).
    """

    def __init__(
        self,
        seed: int,
        space: Space,
        startup: int,
        search_seed: int,
        density: optuna.samplers.TPESampler,
        prior: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.cube, self.startup, self.search_seed, self.density = Cube(space), startup, search_seed, density
        self.random = np.random.default_rng(seed)
        self.independent = optuna.samplers.RandomSampler(seed=seed)
        self.prior = self.cube.positions(prior)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the distributions of the settings that are drawn together."""
        return dict(self.cube.distributions)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Return a random value for a setting that is not drawn together with the others."""
        return self.independent.sample_independent(study, trial, param_name, param_distribution)

    @THREADS.wrap(limits=1, user_api="blas")  # several threads take three times as much CPU time for so few points, and no less time
    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Return the settings of the next trial."""
        if not self.cube.distributions:
            return {}
        others = [each for each in study.get_trials(deepcopy=False) if each.number != trial.number and each.params]
        trials = sum(bool(each.intermediate_values) or each.state == TrialState.FAIL for each in others)
        running = [each for each in others if each.state == TrialState.RUNNING and not is_paused(each)]
        if trials > self.startup and trial.number % 2 == 0 and len(running) < FEW and (drawn := self._from_density(study, trial)):
            return drawn
        points, values, left = observations(others, self.cube)
        if trials <= self.startup or not len(points):
            near = len(self.prior) and self.random.random() < PRIOR_SHARE
            start = self.prior[self.random.integers(len(self.prior))] if near else None
            return self.cube.values(self._around(start, PRIOR_SD, 1)[0] if near else self._spread(trial.number))
        owner = np.append(self.cube.owner, len(self.cube.distributions))
        model = GaussianProcess(self._coordinates(points, left), values, np.ones(len(values)), owner)
        expected = model.predict_mean(self._coordinates(points))
        model = model.believing(self._coordinates(self.cube.positions(each.params for each in running)), BELIEVED_NOISE)
        best = points[expected.argmax()]
        candidates = np.vstack([self._around(best, sd, count) for sd, count in CANDIDATES.items()])
        mean, sd = model.predict(self._coordinates(candidates))
        merit = log_expected_improvement(mean - expected.max(), sd)
        if len(self.prior):
            merit += PRIOR_WEIGHT / trials * self._log_prior(candidates)
        return self.cube.values(candidates[merit.argmax()])

    def _from_density(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return the settings that TPE draws, for which a paused trial is a stopped one; none before it has enough trials."""
        trials = [ended(each) if is_paused(each) else each for each in study.get_trials(deepcopy=False)]

        def get_trials(deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False) -> list[FrozenTrial]:
            return [each for each in trials if states is None or each.state in states]

        seen: Any = copy.copy(study)
        seen.get_trials = seen._get_trials = get_trials  # TPE reads the trials through both
        return self.density.sample_relative(seen, trial, self.density.infer_relative_search_space(seen, trial))

    def _coordinates(self, positions: np.ndarray, left: np.ndarray | float = 0.0) -> np.ndarray:
        """Return the coordinates [n, coordinates] of positions [n, settings] with a share [n] of the epochs left."""
        return np.column_stack([self.cube.coordinates(positions), np.broadcast_to(left, len(positions))])

    def _spread(self, number: int) -> np.ndarray:
        """Return the position [settings] of a trial in a Latin hypercube (McKay et al. 1979) of ``STRATA`` trials."""
        block, own = divmod(max(number - 1, 0), STRATA)  # trial 0 has the default settings
        random = np.random.default_rng([self.search_seed, block])
        strata = random.permuted(np.tile(np.arange(STRATA), (len(self.cube.distributions), 1)), axis=1)
        positions = (strata + random.uniform(size=strata.shape)) / STRATA
        return self.cube.snap(positions[:, own][None])[0]

    def _around(self, point: np.ndarray | None, sd: float | None, count: int) -> np.ndarray:
        """Draw ``count`` positions near ``point``, or everywhere if there is none or ``sd`` is None."""
        drawn = self.random.uniform(size=(count, len(self.cube.distributions)))
        if point is None or sd is None:
            return self.cube.snap(drawn)
        kept = np.where(self.random.uniform(size=drawn.shape) < OTHER_CHOICE, drawn, point)
        moved = np.clip(point + self.random.normal(0, sd, drawn.shape), 0, 1)
        near = np.where(self.cube.is_choice, kept, moved)
        return self.cube.snap(np.where(np.isnan(near), drawn, near))

    def _log_prior(self, positions: np.ndarray) -> np.ndarray:
        """Log density [n] of a mixture of normal distributions around the points of the prior, and of a uniform distribution."""
        apart = np.nan_to_num(positions[:, None] - self.prior[None])
        apart = np.where(self.cube.is_choice, PRIOR_SD * (np.abs(apart) > 0), apart)
        near = np.exp(-0.5 * (apart / PRIOR_SD) ** 2).prod(2).mean(1)
        return np.log(0.01 + near)


def ended(paused: FrozenTrial) -> FrozenTrial:
    """Return a paused trial as if it had been stopped where it waits.

    Args:
        paused: The trial, which does not change.
    """
    stopped = copy.copy(paused)
    stopped.state, stopped.value = TrialState.PRUNED, max(paused.intermediate_values.values())
    return stopped


def observations(trials: Sequence[FrozenTrial], cube: Cube) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the trials of a search say about the objective at the last epoch.

    The last report of each trial counts, and those after 2, 4, 8, ... epochs. Trials that failed count as the worst one.

    Returns:
        Positions [n, settings], values [n], and the share [n] of the epochs that were left.
    """
    reported = [each for each in trials if each.intermediate_values and each.state != TrialState.FAIL]
    if not reported:
        return cube.positions([]), np.zeros(0), np.zeros(0)
    failed = [each for each in trials if each.state == TrialState.FAIL]
    table = curve_table(reported)
    epochs = np.arange(1, table.shape[1] + 1)
    values, left = carried_forward(table), np.tile(1 - epochs / len(epochs), (len(table), 1))
    is_last = epochs == np.array([[each.last_step] for each in reported])
    for index, each in enumerate(reported):
        if each.state == TrialState.COMPLETE and each.value is not None:  # also where the number of epochs is searched
            values[index, is_last[index]], left[index, is_last[index]] = each.value, 0.0
    counts = np.isfinite(table) & (is_last | (epochs > 1) & (epochs & (epochs - 1) == 0))
    rows, values, left, is_last = counts.nonzero()[0], values[counts], left[counts], is_last[counts]
    if len(values) > MODELED:
        order = np.lexsort((-values, ~is_last))
        rest = np.linspace(MODELED // 2, len(order) - 1, MODELED - MODELED // 2).round().astype(int)
        kept = np.sort(np.concatenate([order[: MODELED // 2], order[rest]]))
        rows, values, left = rows[kept], values[kept], left[kept]
    middle = np.median(values)
    values = np.maximum(values, middle - TAIL * (values.max() - middle))
    values = np.concatenate([values, np.full(len(failed), values.min())])
    left = np.concatenate([left, np.zeros(len(failed))])
    positions = cube.positions(each.params for each in [*reported, *failed])
    return np.vstack([positions[rows], positions[len(reported) :]]), values, left


def log_expected_improvement(gain: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the logarithm of the expected improvement of normally distributed values.

    Args:
        gain: Their means, less the value to improve on.
        sd: Their standard deviations.
    """
    score = np.maximum(gain / sd, -30)  # below, the density underflows
    density = np.exp(-0.5 * score**2) / np.sqrt(2 * np.pi)
    return np.log(sd) + np.log(np.maximum(score * ndtr(score) + density, 1e-300))
