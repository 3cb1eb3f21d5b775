import numpy as np
import pytest

from raydetr.errors import UserError
from raydetr.search.population import better_trial, check_population, movable, moved
from raydetr.search.space import read_space

SPACE = read_space(
    {
        "optim.lr": {"loguniform": [1e-5, 1e-3]},
        "optim.schedule": {"choice": ["step", "cosine"]},
        "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
        "optim.batch_size": {"choice": [2, 4]},
        "loss.eos_coef": {"uniform": [0.05, 0.5], "step": 0.05},
        "matcher.set_cost_class": {"choice": [1.0, 2.0, 4.0]},
    }
)
DRAWN = {"optim.lr": 1e-4, "optim.schedule": "step", "optim.lr_drop": 0.5, "optim.batch_size": 2, "loss.eos_coef": 0.1}
DRAWN["matcher.set_cost_class"] = 2.0


def generator(seed=0):
    return np.random.default_rng(seed)


def test_the_worst_quarter_goes_on_from_the_best_quarter():
    values = {number: number / 10 for number in range(8)}
    taken = {number: {better_trial(values, number, set(range(8)), generator(seed)) for seed in range(20)} for number in values}
    assert taken[0] == taken[1] == {6, 7}
    assert all(taken[number] == {None} for number in range(2, 8))


def test_only_a_trial_that_still_has_its_optimizer_is_gone_on_from():
    values = {number: number / 10 for number in range(8)}
    assert {better_trial(values, 0, {6}, generator(seed)) for seed in range(10)} == {6}
    assert better_trial(values, 0, set(), generator()) is None


def test_equal_trials_and_a_lonely_one_keep_their_weights():
    assert better_trial(dict.fromkeys(range(4), 0.5), 3, {0, 1, 2, 3}, generator()) is None
    assert better_trial({3: 0.5}, 3, {3}, generator()) is None


def test_what_may_change_in_mid_training():
    assert set(movable(SPACE)) == {"optim.lr", "loss.eos_coef", "matcher.set_cost_class"}


def test_settings_move_by_a_factor_or_are_drawn_anew_and_stay_in_the_space():
    rates, weights, costs = set(), set(), set()
    for seed in range(200):
        changed = moved(SPACE, DRAWN, generator(seed))
        assert {name: changed[name] for name in ("optim.schedule", "optim.lr_drop", "optim.batch_size")} == {
            "optim.schedule": "step",
            "optim.lr_drop": 0.5,
            "optim.batch_size": 2,
        }
        assert SPACE.contains(changed)
        rates.add(changed["optim.lr"])
        weights.add(changed["loss.eos_coef"])
        costs.add(changed["matcher.set_cost_class"])
    assert {8e-5, 1.25e-4} < {float(f"{rate:.6g}") for rate in rates}
    assert len(rates) > 20  # some are drawn anew
    assert {0.05, 0.15} < weights
    assert costs == {1.0, 2.0, 4.0}


def test_the_same_seed_moves_the_same_way():
    assert moved(SPACE, DRAWN, generator(5)) == moved(SPACE, DRAWN, generator(5))


def test_a_default_outside_the_range_comes_into_it():
    assert 1e-5 <= moved(SPACE, {"optim.lr": 1.0}, generator())["optim.lr"] <= 1e-3


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"model.dec_layers": {"integer": [2, 6]}, "optim.lr": {"loguniform": [1e-5, 1e-3]}}, "model.dec_layers changes the network"),
        ({"optim.batch_size": {"choice": [2, 4]}}, "draws no setting that can change during training"),
    ],
)
def test_spaces_without_a_population_are_refused(space, says):
    with pytest.raises(UserError, match=says):
        check_population(read_space(space))
