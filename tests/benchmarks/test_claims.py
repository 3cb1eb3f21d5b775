import sys

import numpy as np
import pytest

from benchmarks import claims


def test_no_setting_of_a_flat_surface_is_better_and_none_beats_the_best():
    flat, at, mid = (claims.Surface(name, 3, 0.02) for name in ("flat", "at", "mid"))
    points = np.random.default_rng(0).uniform(size=(50, claims.SETTINGS))
    assert {flat.true(point) for point in points} == {0.6}
    assert max(at.true(point) for point in points) < at.true(np.full(claims.SETTINGS, 0.5)) == 0.6
    assert mid.true(mid.best) == 0.6 > mid.true(np.full(claims.SETTINGS, 0.5))


def test_the_jackknife_of_a_mean_image_is_exact():
    shares = np.random.default_rng(1).normal(size=(3, 10))
    runs = claims.runs_of(list(shares))
    np.testing.assert_allclose(runs.left_out[1, 4], np.delete(shares[1], 4).mean())


def test_better_detectors_have_a_higher_ap():
    low, high = claims.make_sets(np.random.default_rng(0), 500, [0.0, 1.0])
    assert 0.1 < claims.ap_of(low) < claims.ap_of(high) < 0.95
    assert claims.left_out(low).std() > 0


@pytest.mark.parametrize("what", ["claims", "coverage"])
def test_the_command_prints_its_table(monkeypatch, capsys, what):
    monkeypatch.setattr(claims, "SURFACES", {"mid": claims.SURFACES["mid"]})
    monkeypatch.setattr(sys, "argv", ["benchmarks.claims", what, "--quick"])
    if what == "coverage":
        sys.argv += ["--images", "13"]
    else:
        sys.argv += ["--surfaces", "mid"]
    claims.main()
    assert "| 13 " in capsys.readouterr().out if what == "coverage" else "| mid " in capsys.readouterr().out


def test_the_searchs_own_images_favor_its_settings(monkeypatch):
    monkeypatch.setattr(claims, "RUN_SD", 0.0)
    surface = claims.Surface("mid", 3, 0.0)
    one, other = np.random.default_rng(0).uniform(size=(2, claims.SETTINGS))
    judges = claims.Judges(surface, 64, new=False)
    difference = judges.train(1, one).mean() - judges.train(2, other).mean()
    favored = surface.favor(one) - surface.favor(other)
    assert difference == pytest.approx(surface.true(one) - surface.true(other) + favored)
    assert abs(favored) > 1e-4


def test_what_the_table_of_coverage_says():
    found = claims.Coverage(0.5)
    found.add(0.5, np.array([0.5, 0.5, 0.5]), np.linspace(0.0, 0.4, 1001))
    found.add(0.5, np.array([0.4, np.nan, 0.5]), np.array([np.nan, 0.4]))  # all objects are in one image
    assert found.cells() == ["1 of 2", "100.0 % (0.0)", "0.0 % (38.0)"]


def test_rare_categories_have_fewer_objects():
    matches = claims.make_categories(np.random.default_rng(0), 400)
    np.testing.assert_allclose(matches.objects[0].mean(0), [3.5, 1.0, 0.4], atol=0.2)
    assert (np.diff(matches.category) >= 0).all()
    assert matches.matched.shape[2] == len(matches.image)
