import pytest

from raydetr.config import load_config
from raydetr.search import study
from raydetr.search.record import seconds_of, turns_of
from raydetr.search.results import trials_frame


def test_the_time_of_a_pause_is_none_of_the_trials(make, monkeypatch):
    search = make(trials=4, pruner="promote", grace=1, sampler="random", config=load_config({"optim.epochs": 9}))
    search.ask()
    search.report(0, 1, 0.6)
    search.ask()
    begin = search.frozen()[1].datetime_start.timestamp()
    clock = iter([begin + 10, begin + 100, begin + 105])
    monkeypatch.setattr(study.time, "time", lambda: next(clock))
    search.report(1, 1, 0.5)
    assert seconds_of(search.frozen()[1]) is None
    assert search.pause(1, 1, {"node": "n", "cards": "1", "AP50": 0.5})
    assert seconds_of(search.frozen()[1]) == pytest.approx(10)
    for number in (2, 3):
        search.ask()
        search.report(number, 1, 0.05)
    assert search.ask("promoted")[0] == 1
    there = {"node": "n", "cards": "1"}
    assert turns_of(search.frozen()[1]) == [
        (pytest.approx(begin), pytest.approx(begin + 10), there),
        (pytest.approx(begin + 100), None, {}),
    ]
    search.report(0, 3, 0.8)
    search.report(1, 3, 0.5)
    assert search.pause(1, 3, {"node": "m"})
    search.end_paused()
    assert seconds_of(search.frozen()[1]) == pytest.approx(15)
    assert trials_frame(search)["seconds"][1] == pytest.approx(15)
