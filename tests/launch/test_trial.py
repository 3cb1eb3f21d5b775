import copy
import dataclasses

import pytest

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.launch import trial
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Slots
from raydetr.launch.trial import EARLIER, Assignment, Gathered, TuneReporter, trial_resources, unpacked
from raydetr.training.metrics import LAST_EPOCH


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(trial.time, "monotonic", lambda: now[0])
    return now


def test_epochs_that_end_too_fast_are_reported_with_a_later_one(clock):
    gathered, reports = Gathered(interval_s=10, awaited={6}), {}
    for epoch in range(1, 10):
        clock[0] += 4
        reports[epoch] = gathered.add({"epoch": epoch, "AP": epoch / 10, **({LAST_EPOCH: True} if epoch == 9 else {})})
    assert [epoch for epoch, report in reports.items() if report] == [3, 6, 9]  # after 12 s, at a decision, at the end
    assert reports[3] == {"epoch": 3, "AP": 0.3, EARLIER: [{"epoch": 1, "AP": 0.1}, {"epoch": 2, "AP": 0.2}]}
    assert [each["epoch"] for each in reports[9][EARLIER]] == [7, 8]
    assert gathered.take() is None


def test_the_time_until_the_first_report_begins_with_the_trial(clock):
    packed = assignment(gathered=Gathered(interval_s=10)).packed()
    clock[0] = 5.0  # another machine
    gathered = unpacked(packed).gathered
    clock[0] += 9
    assert gathered.add({"epoch": 1}) is None
    clock[0] += 1
    assert gathered.add({"epoch": 2}) == {"epoch": 2, EARLIER: [{"epoch": 1}]}


def test_long_epochs_are_reported_one_by_one(clock):
    gathered = Gathered(interval_s=10)
    for epoch in range(1, 5):
        clock[0] += 11
        assert gathered.add({"epoch": epoch}) == {"epoch": epoch}


def assignment(workers=1, **changes):
    given = {"config": load_config({"run.workers": workers}), "objectives": ["AP"], "searched": {}, "slots": Slots(4, 2, 0.5)}
    return Assignment(**{**given, "gathered": Gathered(), **changes})


def test_an_assignment_comes_as_it_was_sent_and_says_what_the_trial_takes():
    sent = assignment(node="b", gathered=Gathered(2.0, {1, 3}))
    parameters = sent.packed()
    assert copy.deepcopy(parameters)[trial.PACKED] is parameters[trial.PACKED], "Ray Tune's copies cost nothing"
    come = unpacked(parameters)
    assert dataclasses.replace(come, gathered=sent.gathered) == sent
    assert (come.gathered.interval_s, come.gathered.awaited) == (2.0, {1, 3})
    assert trial_resources(parameters).bundles == [{"CPU": 2, "GPU": 0.5}]
    assert trial_resources(assignment(workers=2).packed()).bundles == [{DRIVER: 1}]


def test_epochs_that_wait_are_reported_before_an_error(clock, monkeypatch):
    told = []
    monkeypatch.setattr(trial.ray.tune, "report", told.append)
    monkeypatch.setattr(trial, "with_node", dict)
    monkeypatch.setattr(trial, "assigned_cores", lambda: 1)

    def fit(config, reporter):
        for epoch in (1, 2, 3):
            reporter.report({"epoch": epoch, "AP": 0.5})
        raise UserError("a broken image")

    monkeypatch.setattr("raydetr.training.fit.fit", fit)
    with pytest.raises(UserError, match="a broken image"):
        trial.fit_and_report(assignment(gathered=Gathered(interval_s=10)), ())
    assert [(report["epoch"], [each["epoch"] for each in report.get(EARLIER, ())]) for report in told] == [(3, [1, 2])]


def test_a_metric_that_the_validation_set_does_not_have_is_named(monkeypatch):
    monkeypatch.setattr(trial, "assigned_cores", lambda: 1)
    reporter = TuneReporter(["AP", "AP_small"], {})
    with pytest.raises(UserError, match="--also AP_small: the validation set has no object that it counts"):
        reporter.report({"epoch": 1, "AP": 0.5, "AP_small": None})
