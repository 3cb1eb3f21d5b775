import json
import math
import sys
import types
from typing import Any, cast

import optuna
import pytest

from benchmarks import reach, search
from benchmarks.reach import Budget, best_of, measure_reach, summarize


def line(seed, name, used, reached, test, best=0.5):
    return {"seed": seed, "search": name, "used": used, "reached": reached, "AP": best, "test": test, "default": 0.4}


def test_a_search_is_compared_with_the_random_one_of_its_seed():
    rows = summarize(
        [
            line(0, "random, none", 100, None, 0.42),
            line(0, "gp, promote", 90, 20, 0.46),
            line(1, "random, none", 200, None, 0.40),
            line(1, "gp, promote", 200, None, 0.41),
        ]
    ).splitlines()[2:]
    random, model = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows)
    assert random[:5] == ["random, none", "2", "", "", "1.00"]
    assert model[:5] == ["gp, promote", "2", "- (0.20, -)", "1 of 2", "0.95"]
    assert model[6].startswith("+3.5 (")  # 6 and 1 points over the defaults
    assert model[7].startswith("+2.5 (")


def test_a_search_ends_with_its_budget_and_notes_when_it_had_the_target(monkeypatch):
    study = optuna.create_study(direction="maximize")
    for values in ([0.9, 0.9], [0.1, 0.4]):  # trial 0 does not count
        trial = study.ask()
        for epoch, value in enumerate(values, 1):
            trial.report(value, epoch)
    for name, value in (("target", 0.4), ("budget", 3), ("reached", None)):
        monkeypatch.setattr(Budget, name, value)
    budget = Budget(cast(Any, types.SimpleNamespace(frozen=lambda: study.trials)))  # reads nothing of a search but its trials
    assert best_of(study.trials[1]) == 0.4
    assert not budget.stop_all()
    assert Budget.reached == 2
    study.ask().report(0.3, 1)
    assert budget.stop_all()
    assert Budget.reached == 2


def test_an_interrupted_measurement_continues(tmp_path, monkeypatch):
    asked = []

    def search_once(config, method, trials, seed, concurrent, target, budget):
        asked.append((method[0], trials, seed, target, budget))
        return line(0, "", 50, 10, 0.5, best=0.6)

    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "custom_train.json").write_text(json.dumps({"images": [{}] * 8}))
    monkeypatch.setattr(reach, "search_once", search_once)
    monkeypatch.setattr(reach.launcher, "Hopeless", reach.launcher.Hopeless)
    plan = (tmp_path, tmp_path / "out.jsonl", tmp_path, 5, 9, 4)
    measure_reach(*plan, repeats=1, concurrent=1)
    assert asked == [("random", 5, 1000, math.inf, math.inf), ("tpe", 10, 0, 0.6, 50), ("gp", 10, 0, 0.6, 50)]
    measure_reach(*plan, repeats=2, concurrent=1)
    assert [(name, seed) for name, _, seed, *_ in asked[3:]] == [("random", 1001), ("tpe", 1), ("gp", 1)]


@pytest.mark.slow
def test_the_command_trains_and_prints_a_row_for_each_search(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.search", "reach", "--quick"])
    monkeypatch.setattr(reach.launcher, "Hopeless", reach.launcher.Hopeless)
    search.main()
    rows = [[cell.strip() for cell in each.split("|")[1:-1]] for each in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["random, none", "tpe, asha", "gp, promote"]
    assert {row[1] for row in rows} == {"1"}
    assert all(0 <= float(row[5]) <= 100 for row in rows)
