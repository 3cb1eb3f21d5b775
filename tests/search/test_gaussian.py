import numpy as np
import pytest

from raydetr.search import gaussian
from raydetr.search.gaussian import GaussianProcess, squared_distances


def learned(count=40, noise=0.05, settings=3, seed=0):
    """A process that has learned a parabola along its first setting; the others have no effect."""
    random = np.random.default_rng(seed)
    points = random.uniform(size=(count, settings))
    values = 0.5 - (points[:, 0] - 0.3) ** 2 + noise * random.normal(size=count)
    return GaussianProcess(points, values, np.ones(count), np.arange(settings)), points, values


def test_the_function_is_found_through_noise():
    model, *_ = learned(noise=0.02)
    line = np.column_stack([np.linspace(0, 1, 21), np.full((21, 2), 0.5)])
    mean, sd = model.predict(line)
    assert np.abs(mean - 0.5 + (line[:, 0] - 0.3) ** 2).max() < 0.04
    assert np.allclose(mean, model.predict_mean(line))
    assert (sd < 0.1).all()
    assert model.lengths[0] < min(model.lengths[1:])


def test_mean_and_deviation_are_those_of_the_textbook():
    """Equations 2.25 and 2.26 of Rasmussen and Williams, with explicit inverses."""
    model, points, values = learned(count=12)
    new = np.random.default_rng(1).uniform(size=(5, 3))

    def kernel(one, other):
        r = np.sqrt(5 * (((one[:, None] - other[None]) / model.lengths) ** 2).sum(2))
        return (1 + r + r**2 / 3) * np.exp(-r)

    inverse = np.linalg.inv(kernel(points, points) + np.diag(np.full(12, model.noise + 1e-8)))
    mean = values.mean() + kernel(new, points) @ inverse @ (values - values.mean())
    variance = values.var() * (1 - np.diag(kernel(new, points) @ inverse @ kernel(points, new)))
    found_mean, found_sd = model.predict(new)
    assert found_mean == pytest.approx(mean)
    assert found_sd**2 == pytest.approx(variance)


def test_a_noisy_value_counts_less():
    points, values = np.array([[0.2], [0.5], [0.8]]), np.array([0.0, 1.0, 0.0])
    sure, unsure = (GaussianProcess(points, values, np.array([1.0, noise, 1.0]), np.array([0])) for noise in (1.0, 50.0))
    assert unsure.predict_mean(points)[1] < sure.predict_mean(points)[1]


def test_believing_a_point_changes_the_deviation_there_and_not_the_mean():
    model, *_ = learned()
    point = np.array([[0.95, 0.02, 0.98]])
    believing = model.believing(point, 0.1)
    assert believing.predict(point)[0] == pytest.approx(model.predict(point)[0], abs=1e-6)
    assert believing.predict(point)[1] < 0.8 * model.predict(point)[1]
    assert model.believing(np.zeros((0, 3)), 0.1) is model


def test_equal_values_and_a_single_point_are_no_obstacle():
    for count in (1, 5):
        model = GaussianProcess(np.random.default_rng(0).uniform(size=(count, 2)), np.full(count, 0.4), np.ones(count), np.arange(2))
        assert model.predict_mean(np.array([[0.5, 0.5]])) == pytest.approx(0.4)


def test_coordinates_of_a_choice_share_a_distance():
    points = np.array([[0.0, 1.0, 0.0, 0.2], [0.0, 0.0, 1.0, 0.6], [0.0, 0.0, 1.0, 0.9]])
    apart = squared_distances(points, np.array([0, 0, 0, 1]))
    assert apart == pytest.approx(np.array([[2.0, 2.0, 0.0], [0.16, 0.49, 0.09]]))  # of points 1 and 0, 2 and 0, 2 and 1


def test_length_scales_and_noise_are_the_most_probable_of_all_around_them():
    """The density of Rasmussen and Williams' equation 2.30 with the priors, from numpy's determinant and inverse."""
    model, points, values = learned(count=30, noise=0.2)
    values = (values - values.mean()) / values.std()

    def log_posterior(lengths, noise):
        r = np.sqrt(5 * (((points[:, None] - points[None]) / lengths) ** 2).sum(2))
        covariance = (1 + r + r**2 / 3) * np.exp(-r) + noise * np.eye(30)
        prior = (np.log(np.array(lengths) / 0.8) ** 2).sum() + np.log(noise / 0.25) ** 2
        return -0.5 * values @ np.linalg.inv(covariance) @ values - 0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * prior

    found = log_posterior(model.lengths, model.noise)
    for noise in gaussian.NOISES:
        assert log_posterior(model.lengths, noise) <= found + 1e-6
    for setting in range(3):
        for length in gaussian.LENGTHS:
            others = model.lengths.copy()
            others[setting] = length
            assert log_posterior(others, model.noise) <= found + 1e-6


def test_the_factor_of_a_process_that_believes_is_that_of_all_its_points():
    model, *_ = learned(count=20)
    more = model.believing(np.array([[0.1, 0.2, 0.3], [0.9, 0.2, 0.3]]), 0.1)
    r = np.sqrt(5 * (((more.points[:, None] - more.points[None]) / model.lengths) ** 2).sum(2))
    noise = np.diag(model.noise * more.relative_noise + gaussian.JITTER)
    assert more.factor @ more.factor.T == pytest.approx((1 + r + r**2 / 3) * np.exp(-r) + noise, abs=1e-9)
    assert more.relative_noise[-2:] == pytest.approx([0.1, 0.1])
