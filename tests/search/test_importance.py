import math

import numpy as np
import pytest

from raydetr.config import load_config
from raydetr.search.importance import importances, position
from raydetr.search.space import read_space
from raydetr.search.study import create_search

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.eos_coef": {"loguniform": [0.02, 0.5]},
    "loss.giou_loss_coef": {"uniform": [1, 5]},
    "optim.schedule": {"choice": ["step", "cosine"]},
}
EPOCHS = 9


def play(folder, trials, objective, stop=0.0, space=SPACE):
    """A search of random trials whose objective is a function of their settings; a share of them is stopped at a third of the epochs."""
    config = load_config({"optim.epochs": EPOCHS})
    search = create_search(folder, read_space(space), config, trials=trials, sampler="random", seed=1)
    random = np.random.default_rng(0)
    while (asked := search.ask()) is not None:
        number, settings = asked
        value, stopped = objective(settings, random), random.random() < stop and number
        for epoch in range(1, EPOCHS // 3 + 1 if stopped else EPOCHS + 1):
            search.report(number, epoch, value * (1 - math.exp(-epoch / 3)))
        search.tell(number, "pruned" if stopped else "complete", None if stopped else value * (1 - math.exp(-EPOCHS / 3)))
    return search


def by_rate(settings, random):
    return 0.5 - 0.1 * abs(math.log10(settings["optim.lr"] / 5e-4)) + random.normal(0, 0.01)


def test_the_setting_that_matters_is_told_from_the_others_though_most_trials_are_stopped(tmp_path):
    found, sentence = importances(play(tmp_path / "search", 24, by_rate, stop=0.7))
    assert [each.name for each in found if each.matters] == ["optim.lr"]
    assert found[0].share > 0.6
    assert all(0 <= each.low <= each.high <= 1 for each in found)
    assert sum(each.share for each in found) == pytest.approx(1)
    assert sentence == "optim.lr matters; the others cannot be told from chance with 24 trials."


def test_noise_is_not_taken_for_importance(tmp_path):
    """By its rule a setting is named by chance in a twentieth of searches; this is one of the others."""
    found, sentence = importances(play(tmp_path / "search", 24, lambda settings, random: 0.5 + random.normal(0, 0.02)))
    assert not any(each.matters for each in found)
    assert sentence == "No setting can be told from chance with 24 trials."


def test_two_settings_that_matter_alike_are_both_named(tmp_path):
    def objective(settings, random):
        return by_rate(settings, random) - 0.14 * abs(math.log10(settings["loss.eos_coef"] / 0.5))

    found, sentence = importances(play(tmp_path / "search", 40, objective))
    assert {each.name for each in found if each.matters} == {"optim.lr", "loss.eos_coef"}
    assert "matter; the others cannot be told from chance with 40 trials. " in sentence


@pytest.mark.parametrize(
    ("trials", "objective", "why"),
    [(5, by_rate, "5 trials have a value, and 12 are needed"), (14, lambda *_: 0.5, "all trials have the same objective")],
)
def test_where_nothing_can_be_told_it_says_why(tmp_path, trials, objective, why):
    assert importances(play(tmp_path / "search", trials, objective)) == ([], f"Nothing can be said about importances: {why}.")


def test_positions_are_on_the_scale_of_the_range():
    ranges = read_space(SPACE).distributions
    assert position(ranges["optim.lr"], 1e-4) == pytest.approx(0.5)
    assert position(ranges["loss.giou_loss_coef"], 2) == pytest.approx(0.25)
    assert position(ranges["optim.schedule"], "cosine") == 1
    assert position(ranges["optim.lr"], 1.0) == 1.2  # a default far outside of the range
    assert position(ranges["optim.lr"], 0.0) == -0.2
