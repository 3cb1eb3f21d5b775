import json
import re
from datetime import datetime, timedelta

import pytest

from raydetr.errors import UserError
from raydetr.report.page import POINTS
from raydetr.report.report import report
from raydetr.report.search import (
    chart_cards,
    cost_sentences,
    edge_sentences,
    front_cards,
    search_sentences,
    setting_axis,
)
from raydetr.search.study import Search
from raydetr.training.metrics import REPORTED
from tests.report.pages import make_search, marks, page_of


@pytest.fixture
def make(tmp_path):
    return lambda name="search", *args, **kwargs: make_search(tmp_path / name, *args, **kwargs)


def charts_of(search):
    return {str(one["heading"] or each["heading"]): str(one["svg"]) for each in chart_cards(search) for one in each["charts"]}


ENDS = [0.4, 0.5, ("pruned", 0.1), 0.3, "failed", 0.625, 0.2, "running"]


def test_a_search_is_told_with_all_its_charts(make):
    search = make(ends=ENDS)
    page = page_of(report([search.folder]))
    first = page.words.index("Not confirmed: trial 5 reaches AP 62.5 and the default settings 40.0")
    assert page.words.index("Search search", 20) < first < page.words.index("best AP")
    assert ", but the best of 6 trials owes part of these +22.5 AP to luck, so no gain is shown yet." in page.words
    assert f"raydetr confirm {search.folder}" in page.words
    assert page.charts[:3] == ["The objective of every trial", "The objective over the epochs", "When each trial ran"]
    assert page.charts[3:] == ["The settings of every trial", *(f"AP over {name}" for name in search.space.distributions)]
    assert "Nothing can be said about importances: 6 trials have a value, and 12 are needed." in page.words
    beside = {row[0]: row[1:] for row in page.tables[0]}
    assert beside[""] == ["trial 0 (default)", "trial 5 (best)"]
    assert beside["AP"] == ["40.0", "62.5"]
    assert beside["AP50"] == ["87.5", "87.5"]
    assert beside["optim.lr"][0] == "1e-4"
    assert page.table("trial")[0] == ["trial", "reason"]
    assert page.table("trial")[1] == ["4", "out of memory: lower <optim.batch_size>"]
    states = ["complete", "complete", "pruned", "complete", "failed", "complete", "complete", "running"]
    assert [row[:2] for row in page.tables[-1][1:]] == [[str(number), state] for number, state in enumerate(states)]
    assert "loguniform: [1.0e-05, 0.001]" in page.words
    assert "nan" not in page.words.lower()


def test_a_paused_trial_is_shown_with_each_of_its_turns(make):
    search = make(ends=[0.2], trials=4, pruner="promote")
    for number, value in enumerate((0.02, 0.01, 0.005), 1):
        search.ask()
        search.report(number, 1, value)
        assert search.pause(number, 1)
    assert search.ask()[0] == 1  # promoted
    search.report(1, 3, 0.03)
    assert search.pause(1, 3)
    written = report([search.folder])
    page = page_of(written)
    assert "1 complete, 3 paused" in page.words
    assert [row[:3] for row in page.tables[-1][1:3]] == [["0", "complete", "20.0"], ["1", "paused", "3.0"]]
    timeline = written.read_text().split('aria-label="When each trial ran')[1].split("</svg>")[0]
    assert timeline.count(f"{search.trial_name(1)}: paused after 3 epochs") == 2


def test_the_tables_hold_metrics_and_settings_and_nothing_else(make):
    """Studies of earlier versions also hold what Ray Tune adds to a result."""
    internals = {"trial_id": "a1", "pid": 7, "experiment_tag": "1_x=2", "config/number": 0, "timestamp": 1, "hostname": "h"}
    metrics = {**dict.fromkeys(REPORTED, 0.25), "node": "f00", "cards": "0", **internals}
    search = make(ends=[0.4, 0.5], metrics=metrics)
    beside, trials = page_of(report([search.folder])).tables
    reported = [name for name in REPORTED if name not in ("AP", "seconds")]
    varied = [name for name in search.space.dimensions if search.settings(1).get(name, search.base[name]) != search.base[name]]
    assert [row[0] for row in beside] == ["", "AP", "epochs", *varied, *reported]
    drawn = [name for name in search.space.names if name != "optim.lr_drop" or "optim.lr_drop" in trials[0]]
    assert trials[0] == ["trial", "state", "AP", "epochs", "seconds", *drawn, *reported]
    values = dict(zip(trials[0], trials[1], strict=True))
    assert all(values[name] == ("25.0" if name in POINTS else "0.25") for name in reported)


@pytest.mark.parametrize(
    ("ends", "charts", "words"),
    [
        ([], 0, "No trial has ended with a value of AP yet."),
        (["running"], 1, "No trial has ended with a value of AP yet."),
        ([0.25], 3, "No trial beats the default settings (trial 0), which reach AP 25.0."),
        (["failed", "failed", "failed"], 1, "No trial has ended with a value of AP yet."),
        (["failed", 0.5], 3, "Not confirmed: trial 1 reaches AP 50.0; the default settings (trial 0) have no value to compare it with."),
        ([("pruned", 0.1), ("pruned", 0.2)], 7, "Not confirmed: trial 1 reaches AP 20.0 and"),
        ([0.0] * 6, 8, "No trial beats the default settings"),
    ],
)
def test_a_search_with_little_to_show_is_told_all_the_same(make, ends, charts, words):
    page = page_of(report([make(ends=ends).folder]))
    assert len(page.charts) in (charts, charts + 1)  # a second trial may draw lr_drop or not
    assert words in page.words


def test_the_trade_offs_of_several_objectives_are_a_table_and_a_chart(make):
    ends = [(0.4, 0.020), (0.5, 0.030), (0.3, 0.010), (0.2, 0.015), (0.5, 0.031)]
    ends = [("complete", ap, {"latency": latency}) for ap, latency in ends]
    search = make(ends=[*ends, "failed", "running"], also=["latency"])
    page = page_of(report([search.folder]))
    assert "Trade-offs" in page.headings
    table = page.table("trial")
    assert table[0][:4] == ["trial", "AP", "latency", "epochs"]
    assert [row[1:3] for row in table[1:]] == [["50.0", "30.0 ms"], ["40.0", "20.0 ms"], ["30.0", "10.0 ms"]]
    assert table[2][0] == "000_default"
    assert "AP over latency" in page.charts
    (card,) = front_cards(search)
    svg = str(card["charts"][0]["svg"])
    assert len(marks(svg, "dot")) == 5
    assert len(marks(svg, "best")) == 3  # the line, and two dots; trial 0 has its own color
    beside = {row[0]: row[1:] for row in page.tables[0]}
    assert beside["latency"] == ["20.0 ms", "30.0 ms"]
    assert page.tables[-1][0][:4] == ["trial", "state", "AP", "latency"]


def test_three_objectives_have_a_chart_for_each_further_one_and_no_line(make):
    ends = [("complete", 0.4, {"latency": 0.02, "AP_small": 0.1}), ("complete", 0.3, {"latency": 0.01, "AP_small": 0.2})]
    (card,) = front_cards(make(ends=ends, also=["latency", "AP_small"]))
    assert len(card["charts"]) == 2
    assert all("line best" not in str(each["svg"]) for each in card["charts"])


def test_one_objective_has_no_trade_offs(make):
    assert front_cards(make(ends=[0.4, 0.5])) == []


def test_the_confirmed_trial_is_compared_with_the_defaults_also_where_these_are_the_best(make):
    folder = make(ends=[0.5, 0.4, 0.3]).folder
    words = {"sentence": "No difference can be shown.", "caveat": "", "chosen": 1, "judged_on": "test"}
    (folder / "verdict.json").write_text(json.dumps(words))
    page = page_of(report([folder]))
    assert "In the search itself, with one seed, trial 1 reaches AP 40.0; the default settings reach 50.0." in page.words
    assert "Confirmed trial beside the default settings" in page.headings
    assert page.tables[0][0] == ["", "trial 0 (default)", "trial 1 (confirmed)"]
    (folder / "verdict.json").write_text(json.dumps(words | {"chosen": 0}))
    page = page_of(report([folder]))
    assert "In the search itself, with one seed, no trial does better; the default settings reach 50.0." in page.words
    assert page.tables[0][0] == ["", "trial 0 (default)"]


def test_the_first_sentence_of_a_confirmed_search_is_the_verdict(make):
    folder = make(ends=[0.4, 0.5]).folder
    words = {"sentence": "No difference can be shown <here>.", "caveat": "Judged elsewhere.", "chosen": 0, "judged_on": "val"}
    (folder / "verdict.json").write_text(json.dumps(words))
    page = page_of(report([folder]))
    first, second = page.words.index(words["sentence"]), page.words.index(words["caveat"])
    assert page.words.index("Search ") < first < second < page.words.index("In the search itself, with one seed, trial 1 reaches AP 50.0")
    assert "Not confirmed" not in page.words
    assert page.tables[0][0] == ["", "trial 0 (default)", "trial 1 (best)"]
    (folder / "verdict.json").write_text("{}")
    with pytest.raises(UserError, match=r"verdict\.json: is damaged; write it again with raydetr confirm"):
        report([folder])


def test_stopped_trials_are_thinner_and_end_where_they_were_stopped_and_defaults_are_marked_everywhere(make):
    search = make(ends=[0.4, 0.5, ("pruned", 0.1), 0.3])
    charts = charts_of(search)
    curves = charts["Learning curves"]
    (stopped,) = re.findall(r'class="line stopped" d="([^"]*)"', curves)
    (best,) = re.findall(r'class="line best" d="([^"]*)"', curves)
    assert (stopped.count("L"), best.count("L")) == (1, 3)  # two epochs, four epochs
    assert len(marks(charts["Parallel coordinates"], "stopped")) == 1
    (ring,) = re.findall(r'class="dot stopped ring" [^>]*r="([\d.]+)"', charts["optim.lr"])
    (whole,) = re.findall(r'class="dot best" [^>]*r="([\d.]+)"', charts["optim.lr"])
    assert float(ring) < float(whole)
    for heading, svg in charts.items():
        assert "default" in " ".join(re.findall(r'class="([^"]*)"', svg)), heading
        assert "000_default" in svg, heading


def test_axes_are_logarithmic_where_the_space_is(make):
    search = make(ends=[0.4, 0.5])
    assert setting_axis(search, "optim.lr").log
    assert not setting_axis(search, "loss.eos_coef").log
    assert setting_axis(search, "optim.schedule").names == ("step", "cosine")
    # long enough for a default outside of the range, and for a category that is not drawn
    wide = make("wide", [0.4], space={"optim.lr": {"loguniform": [1e-3, 1e-2]}, "optim.batch_size": {"choice": [4, 8]}})
    assert setting_axis(wide, "optim.lr").low < 1e-4
    assert setting_axis(wide, "optim.batch_size").names == ("4", "8", "2")


def test_a_setting_at_the_edge_of_its_range_is_named_with_the_way_to_move_it(make):
    search = make(ends=[0.4], trials=4)

    def end(lr, eos, value):
        search.study.enqueue_trial({"optim.lr": lr, "loss.eos_coef": eos, "optim.schedule": "cosine"})
        number, _ = search.ask()
        search.report(number, 4, value)
        search.tell(number, "complete", value)

    end(9.9e-4, 0.2, 0.8)
    end(8e-4, 0.3, 0.7)
    end(1e-5, 0.2, 0.2)
    (words,) = edge_sentences(search)
    assert words == (
        "optim.lr is 9.9e-4 in trial 1, at the upper end of its range (1e-5 to 1e-3); 2 of the 3 best trials are in the third next to it: "
        "raise that end, for example to 0.01."
    )
    bounded = make("bounded", [0.4], trials=2, space={"loss.eos_coef": {"uniform": [0.5, 1.0]}})
    bounded.study.enqueue_trial({"loss.eos_coef": 1.0})
    bounded.tell(bounded.ask()[0], "complete", 0.9)
    assert edge_sentences(bounded)[0].endswith("The setting takes no larger values.")
    assert edge_sentences(make("none", [0.4, 0.3])) == []


def test_what_a_search_cost_counts_a_shared_card_once(make, monkeypatch):
    search = make(ends=[0.4, 0.5, ("pruned", 0.1)], metrics={"node": "a", "cards": "0"})
    begin = datetime(2026, 1, 1)
    trials = search.frozen()
    for trial, (start, end) in zip(trials, [(0, 3600), (1800, 7200), (7200, 10800)], strict=True):  # seconds; two of them share a card
        trial.datetime_start, trial.datetime_complete = begin + timedelta(seconds=start), begin + timedelta(seconds=end)
    monkeypatch.setattr(Search, "frozen", lambda self: trials)
    assert cost_sentences(search) == [
        "3 trials of 3 have started, and 10 epochs were trained.",
        "It took 3 h 00 min from the first start to the last end, and 3.0 hours on GPUs.",
        "Early stopping ended 1 trial and saved 2 epochs of 12 (17 %), about 1.0 hours.",
    ]


def test_equal_trials_are_no_gain(make):
    search = make(ends=["failed", 0.5])
    assert search_sentences(search, "runs/x")[0].endswith("have no value to compare it with.")


@pytest.mark.parametrize("reshuffle", [True, False])
def test_it_says_whether_validation_images_were_drawn_anew(make, reshuffle):
    page = page_of(report([make(ends=[0.4, 0.5], data__reshuffle=reshuffle).folder]))
    assert ("drawn anew for each trial" in page.words) == reshuffle
