import io

import pytest
from rich.console import Console

from raydetr.config import load_config
from raydetr.search import trials
from raydetr.search.space import read_space
from raydetr.search.study import create_search, open_search
from raydetr.search.trials import TrialsDisplay

SPACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}}


@pytest.fixture
def search(tmp_path):
    return create_search(tmp_path / "search", read_space(SPACE), load_config({}), trials=4)


def end_a_trial(search, value):
    number, _ = search.ask()
    search.report(number, 1, value)
    search.tell(number, "complete", value)


def test_every_trial_that_ended_gets_one_line_without_a_terminal(search):
    out = io.StringIO()
    with TrialsDisplay(search, Console(file=out)) as display:
        end_a_trial(search, 0.25)
        display.refresh()
        end_a_trial(search, 0.5)
        display.refresh()  # too soon: told at the end
        assert [line.split()[0] for line in out.getvalue().splitlines()] == ["1/4"]
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("1/4 000_default complete: AP 0.25 in 1 epoch; best so far 0.25 in trial 0, ")
    assert lines[1].startswith("2/4 001_lr=")
    assert "AP 0.5 in 1 epoch; best so far 0.5 in trial 1" in lines[1]


def test_every_objective_is_in_the_line_of_a_trial(tmp_path):
    search, out = create_search(tmp_path / "search", read_space(SPACE), load_config({}), trials=1, also=["latency"]), io.StringIO()
    with TrialsDisplay(search, Console(file=out)):
        number, _ = search.ask()
        search.report(number, 1, 0.25)
        search.tell(number, "complete", 0.25, latency=0.0125)
    assert "AP 0.25, latency 12.5 ms in 1 epoch" in out.getvalue()


def test_the_study_is_looked_at_again_after_the_interval(search, monkeypatch):
    monkeypatch.setattr(trials, "SHOW_INTERVAL_S", 0.0)
    out = io.StringIO()
    with TrialsDisplay(search, Console(file=out)) as display:
        for value in (0.25, 0.5):
            end_a_trial(search, value)
            display.refresh()
        assert len(out.getvalue().splitlines()) == 2


def test_a_terminal_shows_one_table_the_running_trials_first(search):
    end_a_trial(search, 0.25)
    number, _ = search.ask()
    with TrialsDisplay(search, Console(file=io.StringIO(), force_terminal=True, width=120)) as display:
        display.epoch(number, {"epoch": 1, "AP": 0.5})
        table = display.table()
    assert table.title == "1 of 4 trials ended, ? left"
    assert [list(column.cells)[:2] for column in table.columns[:2]] == [["1", "0"], ["running", "complete"]]
    assert next(iter(table.columns[3].cells)) == "0.5"


def test_a_paused_trial_is_told_where_it_waits_and_again_after_its_promotion(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "SHOW_INTERVAL_S", 0.0)
    options = {"trials": 4, "sampler": "random", "pruner": "promote", "grace": 1}
    search = create_search(tmp_path / "search", read_space(SPACE), load_config({"optim.epochs": 9}), **options)
    out = io.StringIO()
    with TrialsDisplay(search, Console(file=out, width=200)) as display:
        end_a_trial(search, 0.5)
        display.refresh()
        for value in (0.25, 0.125, 0.0625):
            number, _ = search.ask()
            search.report(number, 1, value)
            search.pause(number, 1)
            display.refresh()
        assert search.ask()[0] == 1
        display.refresh()
        search.report(1, 3, 0.375)
        search.pause(1, 3)
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4", "4/4"]
    assert f"{search.trial_name(1)} paused: AP 0.25 in 1 epoch; best so far 0.5 in trial 0" in lines[1]
    assert f"{search.trial_name(1)} paused: AP 0.375 in 3 epochs" in lines[4]
    with TrialsDisplay(search, Console(file=io.StringIO(), force_terminal=True, width=120)) as display:
        table = display.table()
    assert table.title.startswith("4 of 4 trials ended or paused")
    assert [list(column.cells) for column in table.columns[:2]] == [["0", "1", "2", "3"], ["complete", "paused", "paused", "paused"]]


def test_fewer_trials_than_have_ended_are_counted_as_they_are(search):
    """As after ``raydetr tune --resume SEARCH --trials 1`` of a search that ran two."""
    for value in (0.25, 0.5):
        end_a_trial(search, value)
    number, _ = search.ask()  # was under way when the search was interrupted
    search = open_search(search.folder, trials=1)
    out = io.StringIO()
    with TrialsDisplay(search, Console(file=out)) as display:
        assert display.table().title == "2 of 3 trials ended, ? left"
        search.report(number, 1, 0.1)
        search.tell(number, "complete", 0.1)
    assert out.getvalue().startswith("3/3 002_lr=")
    assert out.getvalue().endswith("best so far 0.5 in trial 1, 0:00 left\n")
    assert display.table().title == "3 of 3 trials ended, 0:00 left"
