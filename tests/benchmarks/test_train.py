import sys

import pytest

from benchmarks import train


@pytest.mark.slow
def test_the_command_runs_all_contenders_in_turn_and_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.train", "--quick"])
    train.main()
    shown = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|") for line in shown.splitlines() if line.startswith("|")}
    assert [float(rows[name][4]) > 0 for name in (train.TORCH_TRAINER, train.TORCHRUN, train.ALONE)] == [True] * 3
    assert float(rows[train.TORCHRUN][4]) == 1
    assert "an efficiency of" in shown
