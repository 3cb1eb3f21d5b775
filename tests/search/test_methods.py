import importlib.util
import math

import pytest

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.search.study import open_search
from tests.search.searches import hill, run


def test_seeds_decide_the_draws(make):
    first, same, other = (run(make(name=name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [trial.params for trial in first.frozen()] == [trial.params for trial in same.frozen()]
    assert [trial.params for trial in first.frozen()][1:] != [trial.params for trial in other.frozen()][1:]


def test_tpe_learns_even_in_a_short_search(make):
    """Optuna's own ten random draws would leave it no trial to use what it learned."""
    off = {}
    for sampler in ("tpe", "random"):
        late = [
            trial for seed in range(3) for trial in run(make(name=f"{sampler}{seed}", sampler=sampler, seed=seed, trials=24)).frozen()[12:]
        ]
        off[sampler] = sum(1 - trial.value for trial in late) / len(late)
    assert off["tpe"] < 0.6 * off["random"]


def test_draws_that_run_at_the_same_time_are_spread(make):
    search = make(trials=24, space={"optim.lr": {"loguniform": [1e-5, 1e-3]}})
    for _ in range(16):
        number, settings = search.ask()
        search.tell(number, "complete", hill(settings))
    rates = sorted(math.log10(search.ask()[1]["optim.lr"]) for _ in range(8))
    assert rates[-1] - rates[0] > 0.2


# Early stopping


def test_asha_stops_the_worse_trials_at_its_rungs_and_never_trial_0(make):
    search = make(trials=30, pruner="asha", grace=2, sampler="random")
    stopped = {}
    for number in range(30):
        search.ask()
        value = 0.0 if number == 0 else number % 10 / 10
        for epoch in range(1, 9):
            search.report(number, epoch, value)
            if search.should_stop(number):
                search.tell(number, "pruned")
                stopped[number] = epoch
                break
        else:
            search.tell(number, "complete", value)
    assert set(stopped.values()) == {2, 6}  # the grace, and three times that
    assert 0 not in stopped
    late = range(10, 30)
    assert all(number in stopped for number in late if number % 10 < 5)
    assert not any(number in stopped for number in late if number % 10 == 9)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_trial_0_is_not_stopped_where_any_other_would_be(make, pruner):
    search = make(trials=12, pruner=pruner, grace=1, sampler="random")
    numbers = [search.ask()[0] for _ in range(8)]
    for epoch in (1, 2):
        for number in numbers[1:7]:
            search.report(number, epoch, 0.9)
            search.should_stop(number)  # ASHA notes who came to a rung when it is asked
    for number in numbers[1:7]:
        search.tell(number, "complete", 0.9)
    stopped = []
    for number in (0, 7):
        for epoch in (1, 2):
            search.report(number, epoch, 0.0)
            stopped += [number] if search.should_stop(number) else []
    assert set(stopped) == {7}


def test_what_asha_knows_survives_a_restart(make):
    search = make(trials=12, pruner="asha", grace=1, sampler="random")
    for number in range(9):
        search.ask()
        search.report(number, 1, 0.5 + number / 100)
        search.tell(number, "complete", 0.5 + number / 100) if number == 0 or not search.should_stop(number) else search.tell(
            number, "pruned"
        )
    search = open_search(search.folder)
    search.ask()
    search.report(9, 1, 0.1)
    assert search.should_stop(9)


def test_a_trial_after_its_last_epoch_is_not_given_up(make):
    search = make(trials=12, pruner="asha", grace=2, sampler="random", config=load_config({"optim.epochs": 6}))
    for number in range(6):
        search.ask()
        for epoch in (2, 6):
            search.report(number, epoch, 0.9 - number / 10)
    assert not any(map(search.should_stop, range(6)))
    search.ask()
    search.report(6, 2, 0.1)
    assert search.should_stop(6)


def test_promote_is_refused_beside_a_sampler_that_does_not_know_paused_trials(make):
    with pytest.raises(UserError, match="--scheduler promote: --sampler tpe does not know paused trials"):
        make(pruner="promote", sampler="tpe")


def test_the_median_rule_spares_the_first_epochs(make):
    search = make(trials=12, pruner="median", grace=3)
    for number in range(10):
        search.ask()
        for epoch in range(1, 9):
            search.report(number, epoch, 0.5)
        search.tell(number, "complete", 0.5)
    search.ask()
    decisions = []
    for epoch in range(1, 5):
        search.report(10, epoch, 0.1)
        decisions.append(search.should_stop(10))
    assert decisions == [False, False, True, True]


def test_without_a_pruner_nothing_is_stopped(make):
    search = make(pruner="none")
    for number in range(8):
        search.ask()
        search.report(number, 1, -number)
        assert not search.should_stop(number)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"trials": 0}, "--trials 0: a search needs at least one trial"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean 'tpe'?"),
        ({"sampler": "grid"}, "unknown sampler 'grid'; there are tpe, gp, random, cmaes"),
        ({"pruner": "ascha"}, "unknown scheduler 'ascha'; did you mean 'asha'?"),
        ({"pruner": "asha", "grace": 0}, "a grace of 0 epochs"),
        ({"points": [{"optim.lr": 2e-4}, {"optim.lr": 3e-4}], "trials": 2}, "2 points to start from and trial 0 need 3 trials; 2 were"),
        ({"points": [{"optim.lr": 2}]}, "out of bounds"),
        ({"also": ["latency"], "pruner": "asha"}, "--also latency: --scheduler asha judges trials by AP alone"),
        ({"also": ["latency"], "pruner": "pbt"}, "--also latency: --scheduler pbt judges trials by AP alone"),
        ({"also": ["latency"], "sampler": "gp"}, "--also latency: --sampler gp knows one objective; tpe and random take several"),
        ({"also": ["AP"]}, "--also AP: is an objective of the search already"),
        ({"also": ["latency", "latency"]}, "--also latency: is an objective of the search already"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(make, tmp_path, given, expected):
    with pytest.raises(UserError) as caught:
        make(**given)
    assert expected in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_a_missing_package_is_named(make, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cmaes" else found(name, *rest))
    with pytest.raises(UserError, match="pip install cmaes"):
        make(sampler="cmaes")
