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

    The length scales and the noise are the most probable ones of a grid, found by coordinate search.

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
        self.lengths, self.noise = self._fit(start)
        self._factorize()

    def _fit(self, start: "GaussianProcess | None") -> tuple[np.ndarray, float]:
        some = np.linspace(0, len(self.points) - 1, min(len(self.points), FIT_POINTS)).round().astype(int)
        values, relative = self.values[some], self.relative_noise[some]
        apart = squared_distances(self.points[some], self.owner)
        lengths, noise = (start.lengths, start.noise) if start else (np.full(len(apart), USUAL_LENGTH), USUAL_NOISE)
        squares = np.tensordot(lengths**-2.0, apart, 1)
        seen: dict[tuple[float, ...], float] = {}  # the search comes back to the same length scales and noise

        def log_posterior(squares: np.ndarray, lengths: np.ndarray, noise: float) -> float:
            key = (*lengths, noise)
            if key not in seen:
                seen[key] = _log_posterior(squares, values, relative, lengths, noise)
            return seen[key]

        best = log_posterior(squares, lengths, noise)
        for _ in range(1 if start else ROUNDS):
            for index, each in enumerate(apart):
                rest = squares - each / lengths[index] ** 2
                for length in LENGTHS:
                    tried = np.where(np.arange(len(lengths)) == index, length, lengths)
                    found = log_posterior(rest + each / length**2, tried, noise)
                    if found > best:
                        best, lengths, squares = found, tried, rest + each / length**2
            for tried_noise in NOISES:
                found = log_posterior(squares, lengths, tried_noise)
                if found > best:
                    best, noise = found, tried_noise
        return lengths, noise

    def _factorize(self) -> None:
        covariance = self._kernel(self.points)
        covariance[np.diag_indices_from(covariance)] += self.noise * self.relative_noise + JITTER
        self.factor = cholesky(covariance, lower=True, check_finite=False)
        self.weights = cho_solve((self.factor, True), self.values, check_finite=False)

    def _kernel(self, points: np.ndarray) -> np.ndarray:
        """The covariance [n, points of this process], in units of the scale."""
        one, other = points / self.lengths[self.owner], self.points / self.lengths[self.owner]
        return _matern((one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T)

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
        more.values = np.concatenate([self.values, (self.predict_mean(points) - self.mean) / self.scale])
        more.points = np.concatenate([self.points, points])
        more.relative_noise = np.concatenate([self.relative_noise, np.full(len(points), noise)])
        more._factorize()
        return more


def squared_distances(points: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Return the squared distances [settings, n, n] of points [n, coordinates] along each setting."""
    apart = np.zeros((owner[-1] + 1, len(points), len(points)))
    for coordinate, setting in enumerate(owner):
        apart[setting] += (points[:, None, coordinate] - points[None, :, coordinate]) ** 2
    return apart


def _matern(squares: np.ndarray) -> np.ndarray:
    """The Matern 5/2 kernel (equation 4.17) of squared distances in units of the length scale."""
    distance = np.sqrt(5 * np.maximum(squares, 0))
    return (1 + distance + distance * distance / 3) * np.exp(-distance)


def _log_posterior(squares: np.ndarray, values: np.ndarray, relative: np.ndarray, lengths: np.ndarray, noise: float) -> float:
    """Log marginal likelihood (equation 2.30) and log prior of length scales and noise, without constants."""
    covariance = _matern(squares)
    covariance.flat[:: len(covariance) + 1] += noise * relative + JITTER
    factor, failed = FACTORIZE(covariance, lower=1, clean=0)
    if failed:
        return -math.inf
    whitened = SOLVE(factor, values, lower=1)[0]
    prior = (np.log(lengths / USUAL_LENGTH) ** 2).sum() + math.log(noise / USUAL_NOISE) ** 2
    return float(-0.5 * whitened @ whitened - np.log(factor.diagonal()).sum() - 0.5 * prior)
