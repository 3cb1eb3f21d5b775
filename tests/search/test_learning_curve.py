import numpy as np
import pytest

from raydetr.errors import UserError
from raydetr.search.learning_curve import check_plan, conclude, curve_table, fit_power_law, gain_of, growth, power_law

FRACTIONS = [0.25, 0.5, 0.75, 1.0]


def trainings(ceiling=0.7, factor=0.1, exponent=0.6, noise=0.0, seeds=3, random=None):
    """Fractions and APs of a curve that is known."""
    fractions = np.repeat(FRACTIONS, seeds)
    random = random or np.random.default_rng(0)
    return fractions, power_law(fractions, ceiling, factor, exponent) + random.normal(0, noise, len(fractions))


@pytest.mark.parametrize("law", [(0.7, 0.1, 0.6), (0.55, 0.2, 0.3), (0.9, 0.05, 1.5)])
def test_the_law_is_found_again(law):
    fractions, aps = trainings(*law)
    assert fit_power_law(fractions, aps) == pytest.approx(law, abs=2e-3)
    found = growth(fractions, aps)
    assert found.gain == pytest.approx(law[1] * (1 - 2 ** -law[2]), abs=1e-4)
    assert found.now == pytest.approx(law[0] - law[1], abs=1e-4)
    assert found.low == pytest.approx(found.gain, abs=1e-3)


def test_a_flat_curve_promises_nothing():
    found = growth(np.repeat(FRACTIONS, 3), [0.5] * 12)
    assert (found.gain, found.high) == pytest.approx((0, 0), abs=1e-3)


def test_the_interval_holds_the_truth():
    truth, random, held, widths = 0.1 * (1 - 2**-0.6), np.random.default_rng(5), 0, []
    for _ in range(20):
        found = growth(*trainings(noise=0.01, random=random))
        held += found.low <= truth <= found.high
        widths.append(found.high - found.low)
    assert held >= 17
    assert 0.01 < np.mean(widths) < 0.08
    assert gain_of(np.array([0.7, 0.1, 0.6])) == pytest.approx(truth)


def test_the_category_that_lacks_images_most():
    rows = []
    for fraction, ap in zip(*trainings(noise=0.002), strict=True):
        many, few = power_law(fraction, 0.8, 0.02, 0.5), power_law(fraction, 0.6, 0.2, 0.5)
        rows.append({"fraction": fraction, "AP": ap, "per_category": {"cat": many, "dog": few, "absent": None}})
    said = conclude(rows, {"cat": 60, "dog": 12, "absent": 1}, 64)
    assert said["lacking"]["category"] == "dog"
    assert said["gains"].keys() == {"cat", "dog"}
    assert said["sentence"].startswith("Twice the 64 training images would bring 3.")
    assert "Category 'dog' lacks images most: twice its 12 images would bring it 5.9 (95 % interval " in said["sentence"]
    assert curve_table(rows, 64).splitlines()[1].split()[0] == "16"
    for row in rows:
        row["per_category"] = {"cat": row["AP"]}
    assert "lacks" not in conclude(rows, {"cat": 60}, 64)["sentence"]
    with pytest.raises(UserError, match="AP is undefined"):
        conclude([*rows, {"fraction": 1.0, "AP": None, "per_category": {}}], {}, 64)


@pytest.mark.parametrize(
    ("fractions", "seeds", "message"),
    [
        ([0.25, 0.5, 1.5], 3, "--fractions: 1.5 is not above 0 and at most 1"),
        ([0.0, 0.5, 1.0], 3, "--fractions: 0 is not above 0"),
        ([0.5, 1.0], 3, "at least 3 different fractions"),
        ([0.5, 0.5, 0.25, 1.0], 3, "at least 3 different fractions"),
        (FRACTIONS, 1, "--seeds 1: at least 2 trainings"),
        ([0.01, 0.5, 1.0], 2, "the same number of images, or none, of 10 training images"),
        ([0.5, 0.51, 1.0], 2, "the same number of images"),
    ],
)
def test_plans_that_say_nothing(fractions, seeds, message):
    with pytest.raises(UserError, match=message):
        check_plan(fractions, seeds, 10)


def test_fractions_are_sorted():
    assert check_plan([1.0, 0.25, 0.5], 2, 100) == [0.25, 0.5, 1.0]
