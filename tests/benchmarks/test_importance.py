import sys

import pytest

from benchmarks import importance
from benchmarks.surfaces import Surface


def test_true_shares_tell_settings_without_effect():
    surface = Surface("D", 1)
    shares = importance.true_shares(surface)
    assert sum(shares.values()) == pytest.approx(1)
    without = {name for name, weight in zip(shares, surface.weight, strict=True) if weight < 0.02}
    assert without
    assert max(shares[name] for name in without) < importance.NO_EFFECT < max(shares.values())


def test_a_permutation_of_importances_agrees_less():
    truth = {"a": 0.6, "b": 0.3, "c": 0.1}
    assert importance.agreement({"a": 0.5, "b": 0.3, "c": 0.2}, truth) == (pytest.approx(1), True)
    assert importance.agreement({"c": 0.5, "b": 0.3, "a": 0.2}, truth) == (pytest.approx(-1), False)


def test_the_command_plays_searches_that_stop_trials_and_prints_both(tmp_path, monkeypatch, capsys):
    search = importance.play_search(tmp_path / "search", Surface("C", 0), 10)
    assert {trial.state.name for trial in search.frozen()} == {"COMPLETE", "PRUNED"}
    monkeypatch.setattr(sys, "argv", ["benchmarks.importance", "--quick", "--surfaces", "C", "--trials", "12"])
    importance.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[3].strip() for row in rows] == ["raydetr", "PED-ANOVA"]
    assert rows[0].split("|")[4].strip() == "2 of 2"
