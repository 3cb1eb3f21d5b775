import sys
import time

import pytest

from benchmarks import search
from benchmarks.search import EPOCH, EVENTS, REPORT, Watch, surface_ap


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


def run(what, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.search", what, "--quick"])
    monkeypatch.setattr(search.launcher, "run_trial", search.launcher.run_trial)  # what is put in its place is taken back
    search.main()
    return capsys.readouterr().out
