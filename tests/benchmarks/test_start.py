import sys

import pytest

from benchmarks import start


def test_help_is_a_process_that_computes():
    assert 0.02 < start.help_seconds(start.cpu_seconds) < 2


@pytest.mark.slow
def test_the_command_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.start", "--quick"])
    start.main()
    shown = capsys.readouterr().out
    assert "| raydetr train, detr_tiny, 1 worker, until the first step begins" in shown
    assert "12 s" in shown
