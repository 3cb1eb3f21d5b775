import numpy as np
import pytest

from benchmarks.surfaces import EPOCHS, KINDS, SEED_SD, Surface


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_point_is_where_the_kind_says(kind):
    surface = Surface(kind, 3)
    assert surface.true(surface.best) == pytest.approx(surface.top)
    points = np.random.default_rng(0).uniform(size=(200, len(surface.distributions)))
    assert max(surface.true(point) for point in points) <= surface.top
    if kind == "O":
        assert surface.best == pytest.approx(surface.default)
    assert surface.point(surface.base).shape == surface.best.shape


def test_a_random_setting_loses_what_the_benchmark_says():
    points = np.random.default_rng(0).uniform(size=(300, 5))
    lost = [surface.top - surface.true(point) for surface in (Surface("B", seed) for seed in range(5)) for point in points[:60]]
    assert 0.06 < np.median(lost) < 0.2


def test_two_trainings_with_the_same_settings_differ_by_their_seeds():
    surface = Surface("B", 0)
    last = [surface.curve(surface.best, number)[-1] for number in range(200)]
    assert np.std(last) == pytest.approx(np.hypot(SEED_SD, 0.005), rel=0.15)
    assert np.mean(last) == pytest.approx(surface.on_validation(surface.best), abs=0.005)
    assert (surface.curve(surface.best, 7) == surface.curve(surface.best, 7)).all()


def test_learning_curves_cross():
    """A rate above the best one is ahead at first and behind at the end."""
    surface = next(each for each in (Surface("B", seed) for seed in range(20)) if each.best[0] < 0.4)
    high = surface.best + 0.4 * (np.arange(5) == 0)
    assert high[0] < surface.diverges
    assert surface.progress(high)[1] * surface.true(high) > surface.progress(surface.best)[1] * surface.true(surface.best)
    assert surface.true(high) < surface.true(surface.best)


def test_the_corner_of_high_rates_diverges():
    surface = Surface("B", 0)
    corner = np.where(np.arange(5) == 0, 0.99, surface.best)
    curves = [surface.curve(corner, number) for number in range(20)]
    assert 4 <= sum(np.isnan(curve[-1]) for curve in curves) <= 16
    assert all(np.isfinite(curve[0]) for curve in curves)
    assert surface.true(corner) < 0.3 * surface.true(surface.best)
    assert all(len(curve) == EPOCHS for curve in curves)
