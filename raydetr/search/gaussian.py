"""Gaussian process regression (Rasmussen and Williams 2006, chapters 2 and 5) that is fitted in milliseconds to some hundred points."""

import copy
import math

import numpy as np
from scipy.linalg import cho_solve, cholesky, get_lapack_funcs, solve_triangular

LENGTHS = (0.2, 0.4, 0.8, 1.6, 4.0)  # length scales that are tried, as parts of a range; at 4 a setting hardly matters
NOISES = (0.03, 0.1, 0.25, 0.5, 1.0)  # variances of the noise that are tried, as parts of the variance of the values
USUAL_LENGTH, USUAL_NOISE = 0.8, 0.25  # the medians of log-normal priors with a standard deviation of 1
ROUNDS = 2  # of the coordinate search
FIT_POINTS = 100  # length scales and noise are fitted to at most so many points
JITTER = 1e-8
# LAPACK itself, because the checks of scipy's functions around it take longer than its work on so few points.
FACTORIZE, SOLVE = get_lapack_funcs(("potrf", "trtrs"))


class GaussianProcess:
    """A function of points in a cube, learned from noisy values: Matern 5/2 kernel, one length scale for each setting.

    The length scales and the noise are the most probable ones of a grid, found by coordinate search: each goes from one value to the next
    as long as that is more probable.

    Args:
        points: Coordinates [n, coordinates], between 0 and 1.
        values: Values [n].
        noise: The variance [n] of the noise of each value, relative to the other values.
        owner: The index of the setting [coordinates] that each coordinate belongs to; a setting has one length scale.
        start: A process of similar points, from whose length scales and noise the search starts; it then takes one round.
    """

    def __init__(
        self, points: np.ndarray, values: np.ndarray, noise: np.ndarray, owner: np.ndarray, start: "GaussianProcess | None" = None
    ) -> None:
        self.points, self.relative_noise, self.owner = points, noise, owner
        self.mean, self.scale = float(values.mean()), float(values.std()) or 1.0
        self.values = (values - self.mean) / self.scale
        self.place = self._fit(start)
        self.lengths, self.noise = _settings_at(self.place)
        self._factorize()

    def _fit(self, start: "GaussianProcess | None") -> tuple[int, ...]:
        """Return the most probable place in the grid: indices into ``LENGTHS`` [settings], and one into ``NOISES``."""
        some = np.linspace(0, len(self.points) - 1, min(len(self.points), FIT_POINTS)).round().astype(int)
        values, relative = self.values[some], self.relative_noise[some]
        apart = squared_distances(self.points[some], self.owner)
        place = start.place if start else (*[LENGTHS.index(USUAL_LENGTH)] * len(apart), NOISES.index(USUAL_NOISE))
        seen: dict[tuple[int, ...], float] = {}  # the search comes back to the same places

        def log_posterior(place: tuple[int, ...]) -> float:
            if place not in seen:
                seen[place] = _log_posterior(apart, values, relative, *_settings_at(place))
            return seen[place]

        for _ in range(1 if start else ROUNDS):
            for index in range(len(place)):
                for step in (-1, 1):
                    while 0 <= place[index] + step < len(LENGTHS if index < len(apart) else NOISES):
                        tried = (*place[:index], place[index] + step, *place[index + 1 :])
                        if log_posterior(tried) <= log_posterior(place):
                            break
                        place = tried
        return place

    def _factorize(self) -> None:
        covariance = self._kernel(self.points)
        covariance[np.diag_indices_from(covariance)] += self.noise * self.relative_noise + JITTER
        self.factor = cholesky(covariance, lower=True, check_finite=False)
        self.weights = cho_solve((self.factor, True), self.values, check_finite=False)

    def _kernel(self, points: np.ndarray) -> np.ndarray:
        """The covariance [n, points of this process], in units of the scale."""
        return _matern(_squares(points / self.lengths[self.owner], self.points / self.lengths[self.owner]))

    def predict_mean(self, points: np.ndarray) -> np.ndarray:
        """Return the mean [n] of the function at points [n, coordinates]."""
        return self._kernel(points) @ self.weights * self.scale + self.mean

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean [n] and standard deviation [n] of the function, without noise, at points [n, coordinates]."""
        kernel = self._kernel(points)
        explained = (solve_triangular(self.factor, kernel.T, lower=True, check_finite=False) ** 2).sum(0)
        return kernel @ self.weights * self.scale + self.mean, np.sqrt(np.maximum(1 - explained, JITTER)) * self.scale

    def believing(self, points: np.ndarray, noise: float) -> "GaussianProcess":
        """Return this process after it has seen its own predictions at more points ("kriging believer", Ginsbourger et al. 2010).

        Args:
            points: Coordinates [n, coordinates].
            noise: The variance of the noise of these values, relative to the others.
        """
        if not len(points):
            return self
        more = copy.copy(self)
        more.points = np.concatenate([self.points, points])
        more.values = np.concatenate([self.values, (self.predict_mean(points) - self.mean) / self.scale])
        more.relative_noise = np.concatenate([self.relative_noise, np.full(len(points), noise)])
        # The factor grows by rows, because the points before have the same covariance.
        across = solve_triangular(self.factor, self._kernel(points).T, lower=True, check_finite=False)
        own = _matern(_squares(points / self.lengths[self.owner], points / self.lengths[self.owner])) - across.T @ across
        own[np.diag_indices_from(own)] += self.noise * noise + JITTER
        corner = cholesky(own, lower=True, check_finite=False)
        more.factor = np.block([[self.factor, np.zeros_like(across)], [across.T, corner]])
        more.weights = cho_solve((more.factor, True), more.values, check_finite=False)
        return more


def squared_distances(points: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the squared distances [settings, pairs] of points [n, coordinates] along each setting, in the order of ``np.tril_indices``."""
    rows, columns = np.tril_indices(len(points), -1)
    apart = np.zeros((owner[-1] + 1, len(rows)))
    for coordinate, setting in enumerate(owner):
        apart[setting] += (points[rows, coordinate] - points[columns, coordinate]) ** 2
    return apart


def _squares(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Squared distances [n, m] between points [n, coordinates] and others [m, coordinates]."""
    return (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T


def _matern(squares: np.ndarray) -> np.ndarray:
    """The Matern 5/2 kernel (equation 4.17) of squared distances in units of the length scale."""
    distance = np.sqrt(5 * np.maximum(squares, 0))
    return (1 + distance + distance * distance / 3) * np.exp(-distance)


def _settings_at(place: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """The length scales [settings] and the noise at a place in the grid."""
    *lengths, noise = place
    return np.array(LENGTHS)[lengths], NOISES[noise]


def _log_posterior(apart: np.ndarray, values: np.ndarray, relative: np.ndarray, lengths: np.ndarray, noise: float) -> float:
    """Log marginal likelihood (equation 2.30) and log prior of length scales and noise, without constants."""
    covariance = np.diag(1 + (noise * relative + JITTER))
    covariance[np.tri(len(values), k=-1, dtype=bool)] = _matern(lengths**-2.0 @ apart)  # the other half is not read
    factor, failed = FACTORIZE(covariance, lower=1, clean=0)
    if failed:
        return -math.inf
    whitened = SOLVE(factor, values, lower=1)[0]
    prior = (np.log(lengths / USUAL_LENGTH) ** 2).sum() + math.log(noise / USUAL_NOISE) ** 2
    return float(-0.5 * whitened @ whitened - np.log(factor.diagonal()).sum() - 0.5 * prior)
