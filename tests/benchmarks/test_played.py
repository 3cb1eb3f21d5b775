import math
import sys

import pytest

from benchmarks import played, search
from benchmarks.played import ARMS, POPULATION, Outcome, Played, measure_played, play, play_population
from benchmarks.surfaces import EPOCHS, Surface


@pytest.fixture(scope="module")
def surface():
    return Surface("C", 1)


def test_epochs_are_counted_until_a_drawn_trial_has_the_target():
    seen = Played([0.5, 0.4, 0.6], [(0, 0.9), (1, 0.1), (2, 0.2), (1, 0.3), (2, 0.5)])
    assert seen.epochs_until(0.3) == 3
    assert seen.epochs_until(0.5) == 4
    assert seen.epochs_until(0.9) == float("inf")  # only trial 0 has it
    assert seen.gain() == 0.0  # trial 0 is the best
    assert Played([0.5, 0.4, 0.6], [(0, 0.1), (1, 0.3), (2, 0.5)]).gain() == pytest.approx(0.1)
    assert Played([0.5, 0.4, 0.6], [(0, 0.1), (1, 0.3), (2, 0.5)]).gain(epochs=1) == pytest.approx(-0.1)


def test_random_search_trains_every_trial_to_its_end(surface):
    seen = play(surface, ARMS["random, none"], trials=6, concurrent=2)
    assert [sum(number == each for each, _ in seen.reports) for number in range(6)] == [EPOCHS] * 6
    running = {number for number, _ in seen.reports[: EPOCHS // 2]}
    assert running == {0, 1}


def test_random_search_does_not_find_its_own_target_again(surface):
    """With the same draws and luck it would in every search, and so would samplers that begin with random draws."""
    own, again, other = (play(surface, ARMS["random, none"], trials=4, concurrent=1, stream=stream) for stream in (0, 0, 1))
    assert own == again
    assert own.true[0] == other.true[0]  # the default settings
    assert not set(own.true[1:]) & set(other.true[1:])
    assert own.reports[EPOCHS - 1] != other.reports[EPOCHS - 1]  # their trainings are not equally lucky
    missed = measure_played(["A"], [1], ["random, none"], range(6)).splitlines()[-1].split("|")[5]
    assert int(missed.replace("%", "")) > 0


def test_a_budget_ends_a_search(surface):
    seen = play(surface, ARMS["random, none"], trials=6, concurrent=2, epochs=40)
    assert sum(number > 0 for number, _ in seen.reports) == 40


@pytest.mark.parametrize("name", [name for name in ARMS if name != "random, none"])
def test_every_arm_plays_and_stops_trials_early(surface, name):
    pytest.importorskip("cmaes")
    seen = play(surface, ARMS[name], trials=12, concurrent=3)
    lengths = [sum(number == each for each, _ in seen.reports) for number in range(12)]
    assert lengths[0] == EPOCHS
    assert name.endswith("Wilcoxon") or sum(lengths) < 12 * EPOCHS  # whose steps are instances of a problem, not epochs
    again = play(surface, ARMS[name], trials=12, concurrent=3)
    assert again.reports == seen.reports


def test_a_population_takes_over_better_weights(surface):
    seen = play_population(surface, 8)
    assert len(seen.reports) == 8 * EPOCHS
    by_trial = {number: [value for each, value in seen.reports if each == number] for number in range(8)}
    jumps = [values[epoch] - values[epoch - 1] for values in by_trial.values() for epoch in (7, 14, 21)]
    assert max(jumps) > 0.05


def test_the_command_prints_a_row_for_each_arm_and_surface_and_for_all_surfaces(monkeypatch, capsys):
    monkeypatch.setattr(played, "RANDOM_TRIALS", {1: 4, 8: 4})
    arms = ["tpe, asha", "gp, evidence", POPULATION]
    command = ["reach", "--played", "--repeats", "2", "--surfaces", "A", "C", "--concurrent", "1", "--arms", *arms]
    monkeypatch.setattr(sys, "argv", ["benchmarks.search", *command])
    search.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-9:]]
    assert [(row[0][:3], row[2]) for row in rows] == [(where, arm) for where in ("A (", "C (", "all") for arm in arms]
    one, two, both = (float(rows[number][6].split()[0]) for number in (0, 3, 6))
    assert both == pytest.approx((one + two) / 2, abs=0.11)


def test_arms_are_paired_with_the_first(monkeypatch):
    found = [(0.2, 0.5, 3.0, 1.0), (math.inf, 1.0, 1.0, 0.0)], [(0.1, 0.5, 4.0, 1.0), (0.4, 0.5, 2.0, 2.0)]
    searches = [{"one": Outcome(*one), "two": Outcome(*two)} for one, two in zip(*found, strict=True)]
    monkeypatch.setattr(played, "play_against_random", lambda kind, seed, arms, concurrent: searches[seed])
    first, second = (
        [cell.strip() for cell in row.split("|")[3:-1]] for row in measure_played(["A"], [8], ["one", "two"], [0, 1]).splitlines()[2:]
    )
    assert first == ["one", "-", "50 %", "0.75", "+2.0 +- 1.0", "+0.5 +- 0.5", "", ""]
    assert second == ["two", "0.25", "0 %", "0.50", "+3.0 +- 1.0", "+1.5 +- 0.5", "+1.0 +- 0.0", "2, 0"]
