import sys

import pytest

from benchmarks import start


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.start", "--quick"])
    start.main()
    shown = capsys.readouterr().out
    assert "raydetr --help" in shown
    assert "raydetr train, detr_tiny" in shown
