import math
import re
import sys
import time
import types

import pytest

from benchmarks import search
from benchmarks.search import EPOCH, EVENTS, REPORT, Reached, Watch, surface_ap
from raydetr.config import load_config, to_dict
from raydetr.search.space import read_space
from raydetr.search.study import create_search, open_search


def trial(*values):
    return types.SimpleNamespace(intermediate_values=dict(enumerate(values, 1)))


def test_an_ap_is_reached_by_any_trial_but_the_first(monkeypatch):
    monkeypatch.setattr(Reached, "target", 0.5)
    assert not Reached.has([trial(0.9, 0.9), trial(0.1, 0.4)])
    assert Reached.has([trial(0.9, 0.9), trial(0.1, 0.4), trial(0.5)])


def test_the_surface_has_its_optimum_inside():
    def ap(lr, eos, epoch=9):
        return surface_ap({"optim": {"lr": lr}, "loss": {"eos_coef": eos}}, epoch)

    assert ap(5e-4, 0.2) > max(ap(1e-5, 0.2), ap(1e-2, 0.2), ap(5e-4, 0.01), ap(5e-4, 1.0))
    assert ap(5e-4, 0.2, 9) > ap(5e-4, 0.2, 1)


@pytest.mark.slow
def test_the_controller_is_measured_beside_ray_tune_alone(monkeypatch, capsys):
    rows = [[cell.strip() for cell in line.split("|")] for line in run("controller", monkeypatch, capsys).splitlines()[-4:]]
    assert [row[1].partition(":")[0] for row in rows] == ["raydetr", "raydetr", "Ray Tune", "Ray Tune"]
    assert {row[2] for row in rows} == {"6"}
    reports = [int(row[3]) for row in rows]
    assert all(6 <= number <= reports[-1] for number in reports)
    assert reports[-1] == 6 * search.CONTROLLER_EPOCHS
    assert all(0 < float(row[4].split()[0]) < 1000 for row in rows)


def test_a_watch_tells_waiting_from_work():
    watch = Watch()
    watch.over(REPORT, time.sleep)(0.05)
    sum(range(10**6))
    spent = watch.restart()
    assert spent[REPORT][0] >= 0.05 > spent[REPORT][1]
    assert spent[EVENTS] == [0, 0]
    assert spent[EPOCH][0] > spent[REPORT][0]
    assert watch.restart()[REPORT] == [0, 0]


@pytest.mark.slow
def test_what_a_search_adds_is_a_part_of_the_epoch(monkeypatch, capsys):
    rows = [[cell.strip() for cell in line.split("|")] for line in run("overhead", monkeypatch, capsys).splitlines()[-4:]]
    assert [row[1] for row in rows[:3]] == [EVENTS, REPORT, EPOCH]
    times = [float(row[2].split()[0]) for row in rows[:3]]
    assert times[0] > 0
    assert times[1] > 0
    assert times[0] + times[1] < times[2]
    assert rows[2][4] == "100.0 %"


def test_a_search_ends_where_it_has_the_ap_of_random_search(tmp_path, monkeypatch, capsys):
    """The arms are played on the surface of the controller instead of trained."""
    monkeypatch.setattr(search.launcher, "Hopeless", search.launcher.Hopeless)
    monkeypatch.setattr(search, "train_arm", play_arm)
    search.measure_reach(tmp_path, trials=6, epochs=5, repeats=1)
    (first, _, last) = capsys.readouterr().out.splitlines()
    target, budget, used = map(float, re.match(r"seed 0: AP ([\d.]+) .* in (\d+) epochs; .* in (\d+), ", first).groups())
    assert budget == 25  # without trial 0
    found = open_search(tmp_path / f"{search.SAMPLER}-0").frozen()
    reached = [value for trial in found[1:] for value in trial.intermediate_values.values() if value >= target - 0.0005]
    assert len(reached) == 1
    assert used == sum(trial.last_step for trial in found[1:])
    assert last.startswith(f"share of random search's epochs: {used / budget:.2f}")
    assert Reached.target == math.inf


def play_arm(folder, sampler, scheduler, trials, epochs, seed):
    """A search on the response surface, one trial after the other, until it has reached the target."""
    found = create_search(
        folder / f"{sampler}-{seed}",
        read_space(search.SURFACE),
        load_config({"optim.epochs": epochs}),
        trials=trials,
        sampler=sampler,
        pruner=scheduler,
        seed=seed,
    )
    while not Reached.has(found.frozen()) and (asked := found.ask()):
        play_trial(found, asked[0], epochs)
    return found.frozen()


def play_trial(found, number, epochs):
    settings, best = to_dict(found.config(number)), 0.0
    for epoch in range(1, epochs + 1):
        best = max(best, surface_ap(settings, epoch))
        found.report(number, epoch, best)
        if found.should_stop(number):
            found.tell(number, "pruned")
            return
        if Reached.has(found.frozen()):
            return
    found.tell(number, "complete", best)


def run(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.search", what, "--quick"])
    for name in ("run_trial", "Hopeless"):  # what is put in the place of the product's own is taken back
        monkeypatch.setattr(search.launcher, name, getattr(search.launcher, name))
    search.main()
    return capsys.readouterr().out
