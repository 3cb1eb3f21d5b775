import sys
import types

import pytest

from benchmarks import epoch


@pytest.fixture
def clock(monkeypatch):
    """A clock that ``clock(seconds)`` moves on."""
    now = [0.0]
    monkeypatch.setattr(epoch, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_an_epoch_is_the_sum_of_its_parts(clock, monkeypatch):
    class Loader:
        def __iter__(self):
            clock(1.0)  # until the first batch is on its way
            for batch in range(3):
                clock(0.25)
                yield batch

    def train_one_epoch(_training, loader, _epoch, show):
        for _ in loader:
            clock(10.0)
            show({})

    parts = epoch.Parts()
    monkeypatch.setattr(epoch.engine, "train_one_epoch", train_one_epoch)

    def one_epoch(_run):
        parts.train(None, Loader(), 1, lambda _numbers: clock(0.5))
        parts.timed(epoch.CHECKPOINTS, clock)(2.0)
        clock(0.125)

    timed = parts.end_of_epoch(one_epoch)
    timed(None)
    timed(None)
    expected = {epoch.STEPS: 30.0, epoch.INPUT: 1.75, epoch.LOGGING: 1.5, epoch.CHECKPOINTS: 2.0, epoch.REST: 0.125, epoch.EPOCH: 35.375}
    assert parts.epochs == [expected, expected]


@pytest.mark.slow
def test_the_command_prints_its_table(coco_folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.epoch", "--quick", str(coco_folder(train=4, val=2))])
    epoch.main()
    rows = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("|")}
    for measured in (epoch.STEPS, epoch.INPUT, epoch.CHECKPOINTS, epoch.PICTURES, epoch.FORWARD, epoch.SCORING, epoch.EPOCH):
        assert " 0.000 s" not in rows[measured]
