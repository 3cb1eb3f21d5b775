import sys

import pytest

from benchmarks import scale


def test_sizes_are_readable():
    assert [scale.size(number) for number in (12, 1234, 5e6, 6.5e11)] == ["12 B", "1.23 kB", "5 MB", "650 GB"]


@pytest.mark.slow
def test_the_command_plays_a_search_and_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.scale", "--quick"])
    monkeypatch.setattr(scale.PlacementGroupAcquiredResources, "_annotate_remote_entity", None)  # put back afterwards
    scale.main()
    shown = capsys.readouterr().out
    row = next(line.split("|") for line in shown.splitlines() if line.startswith("| 4 "))
    assert int(row[2]) == 12
    assert row[3].strip() == "gp, promote"
    busy = float(row[6].split()[0])
    assert 5 < busy <= 100
    assert "last.pth" in shown
