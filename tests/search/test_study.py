import importlib.util
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import optuna
import pandas
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raydetr.config import flatten, load_config, read_yaml, to_dict
from raydetr.errors import UserError
from raydetr.search import study
from raydetr.search.space import read_space
from raydetr.search.study import (
    SAMPLERS,
    Search,
    best_points,
    create_search,
    epochs_of,
    open_search,
    read_points,
    read_study,
    seconds_of,
    state_of,
    top_trials,
    trials_frame,
    turns_of,
    warm_start_from,
    write_best,
    write_trials,
)
from raydetr.training.metrics import REPORTED

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.bbox_loss_coef": {"uniform": [2, 8]},
    "matcher.set_cost_bbox": {"same_as": "loss.bbox_loss_coef"},
    "optim.schedule": {"choice": ["step", "cosine"]},
    "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
}


@pytest.fixture
def make(tmp_path):
    def make(space=SPACE, name="search", config=None, **kwargs) -> Search:
        return create_search(tmp_path / name, read_space(space), config or load_config(), **{"trials": 8, **kwargs})

    return make


def hill(settings: dict) -> float:
    """An objective with its top of 1 at a rate of 3e-4; nothing else matters."""
    return 1 - abs(math.log10(settings["optim.lr"]) - math.log10(3e-4)) / 2


def run(search: Search, objective=hill, epochs=2) -> Search:
    """Run every trial that is left, one after the other."""
    while (asked := search.ask()) is not None:
        number, settings = asked
        value = objective({**search.base, **settings})
        for epoch in range(1, epochs + 1):
            search.report(number, epoch, value * epoch / epochs)
        search.tell(number, "complete", value)
    return search


# Trial 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trial_0_has_the_default_settings_wherever_they_lie(make, sampler):
    """Outside a range, not among the choices, without a logarithm: trial 0 has them, and every sampler lives with it."""
    space = {
        "optim.lr": {"loguniform": [1e-3, 1e-2]},
        "loss.bbox_loss_coef": {"uniform": [6, 9], "step": 0.5},
        "matcher.set_cost_bbox": {"same_as": "loss.giou_loss_coef"},
        "loss.giou_loss_coef": {"uniform": [1, 5]},
        "optim.weight_decay": {"loguniform": [1e-5, 1e-2]},
        "optim.batch_size": {"choice": [4, 8]},
        "optim.lr_drop": {"integer": [2, 9], "when": {"optim.batch_size": 4}},
        "loss.eos_coef": 0.3,
    }
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    base = load_config({"optim.weight_decay": 0.0, "optim.warmup": 0.25})
    search = make(space, config=base, sampler=sampler, trials=9)
    number, settings = search.ask("first")
    assert number == 0
    assert to_dict(load_config(flatten(to_dict(base)), settings)) == to_dict(base)
    assert search.config(0) == base
    search.tell(0, "complete", 0.5)
    run(search, lambda settings: settings["optim.lr"])
    assert search.study.trials[0].params == {"optim.lr": 1e-4, "loss.bbox_loss_coef": 5.0, "loss.giou_loss_coef": 2.0}
    for trial in search.study.trials[1:]:
        assert trial.state == TrialState.COMPLETE
        assert 1e-3 <= search.settings(trial.number)["optim.lr"] <= 1e-2
        assert search.settings(trial.number)["loss.eos_coef"] == 0.3


def test_trials_really_differ_and_ties_reach_their_settings(make):
    search = run(make())
    configs = [search.config(trial.number) for trial in search.frozen()]
    assert len({config.optim.lr for config in configs}) == 8
    assert all(config.matcher.set_cost_bbox == config.loss.bbox_loss_coef for config in configs)
    assert {config.optim.lr_drop for config in configs if config.optim.schedule == "cosine"} == {0.667}  # the base value, not drawn
    assert any(config.optim.lr_drop != 0.667 for config in configs)


# Asking


def test_so_many_trials_as_asked_for_are_handed_out(make):
    search = run(make(trials=5))
    assert [trial.number for trial in search.frozen()] == [0, 1, 2, 3, 4]
    assert search.ask("another") is None
    search.extend(6)
    assert search.ask("another")[0] == 5


def test_the_same_key_gets_the_same_trial(make):
    search = make()
    asked = [search.ask(key) for key in ("a", "b", "c")]
    search.tell(1, "complete", 0.5)
    assert [search.ask(key) for key in ("a", "b", "c")] == asked
    assert [search.number(key) for key in ("c", "b", "a", "z")] == [2, 1, 0, None]
    assert len(search.frozen()) == 3


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "cmaes"])
def test_a_reopened_search_draws_on_as_if_it_had_not_been_interrupted(make, sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    through = run(make(name="through", sampler=sampler, trials=16, seed=3))
    cut = make(name="cut", sampler=sampler, trials=16, seed=3)
    while (asked := open_search(cut.folder).ask()) is not None:
        cut = open_search(cut.folder)
        cut.report(asked[0], 1, hill(asked[1]) / 2)
        cut.report(asked[0], 2, hill(asked[1]))
        cut.tell(asked[0], "complete", hill(asked[1]))
    assert [trial.params for trial in cut.frozen()] == [trial.params for trial in through.frozen()]
    assert len({trial.params["optim.lr"] for trial in cut.frozen()}) == 16  # and not the same draws over again


def test_seeds_decide_the_draws(make):
    first, same, other = (run(make(name=name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert [trial.params for trial in first.frozen()] == [trial.params for trial in same.frozen()]
    assert [trial.params for trial in first.frozen()][1:] != [trial.params for trial in other.frozen()][1:]


def test_tpe_learns_even_in_a_short_search(make):
    """Optuna's own ten random draws would leave it no trial to use what it learned."""
    off = {}
    for sampler in ("tpe", "random"):
        late = [
            trial for seed in range(3) for trial in run(make(name=f"{sampler}{seed}", sampler=sampler, seed=seed, trials=24)).frozen()[12:]
        ]
        off[sampler] = sum(1 - trial.value for trial in late) / len(late)
    assert off["tpe"] < 0.6 * off["random"]


def test_draws_that_run_at_the_same_time_are_spread(make):
    search = make(trials=24, space={"optim.lr": {"loguniform": [1e-5, 1e-3]}})
    for _ in range(16):
        number, settings = search.ask()
        search.tell(number, "complete", hill(settings))
    rates = sorted(math.log10(search.ask()[1]["optim.lr"]) for _ in range(8))
    assert rates[-1] - rates[0] > 0.2


# Results


def test_results_are_taken_once(make):
    search = make()
    search.ask("a")
    search.report(0, 1, 0.2)
    search.report(0, 1, 0.9)  # trained again after a crash
    assert search.tell(0, "complete", 0.3, metrics={"AP50": 0.5, "val_loss": math.nan, "note": "x"})
    assert not search.tell(0, "complete", 0.9)
    assert not search.tell(0, "failed", reason="too late")
    search.report(0, 2, 0.9)
    trial = search.frozen()[0]
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.COMPLETE, 0.3, {1: 0.2})
    assert trial.user_attrs["metrics"] == {"AP50": 0.5, "note": "x"}


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_trial_without_a_finite_objective_is_failed_and_never_best(make, value):
    search = make()
    search.ask()
    search.ask()
    search.report(0, 1, value)
    search.tell(0, "complete", value)
    search.tell(1, "complete", 0.1)
    assert [trial.state for trial in search.frozen()] == [TrialState.FAIL, TrialState.COMPLETE]
    assert search.frozen()[0].user_attrs["reason"] == f"its AP is {value}"
    assert search.best().number == 1


def test_a_pruned_trial_keeps_its_last_value_and_a_failed_one_its_reason(make):
    search = make()
    for _ in range(3):
        search.ask()
    search.report(0, 1, 0.2)
    search.report(0, 2, 0.4)
    search.tell(0, "pruned")
    search.tell(1, "failed", reason="out of memory:\n lower optim.batch_size")
    search.tell(2, "pruned")  # before its first epoch
    assert [trial.state for trial in search.frozen()] == [TrialState.PRUNED, TrialState.FAIL, TrialState.PRUNED]
    assert [trial.value for trial in search.frozen()] == [0.4, None, None]
    assert search.frozen()[1].user_attrs["reason"] == "out of memory: lower optim.batch_size"
    assert [trial.number for trial in search.ranked()] == [0]


def test_of_equals_the_earliest_is_best(make):
    assert run(make(), lambda settings: 0.5).best().number == 0


# Early stopping


def test_asha_stops_the_worse_trials_at_its_rungs_and_never_trial_0(make):
    search = make(trials=30, pruner="asha", grace=2, sampler="random")
    stopped = {}
    for number in range(30):
        search.ask()
        value = 0.0 if number == 0 else number % 10 / 10
        for epoch in range(1, 9):
            search.report(number, epoch, value)
            if search.should_stop(number):
                search.tell(number, "pruned")
                stopped[number] = epoch
                break
        else:
            search.tell(number, "complete", value)
    assert set(stopped.values()) == {2, 6}  # the grace, and three times that
    assert 0 not in stopped
    late = range(10, 30)
    assert all(number in stopped for number in late if number % 10 < 5)
    assert not any(number in stopped for number in late if number % 10 == 9)


@pytest.mark.parametrize("pruner", ["asha", "median"])
def test_trial_0_is_not_stopped_where_any_other_would_be(make, pruner):
    search = make(trials=12, pruner=pruner, grace=1, sampler="random")
    numbers = [search.ask()[0] for _ in range(8)]
    for epoch in (1, 2):
        for number in numbers[1:7]:
            search.report(number, epoch, 0.9)
            search.should_stop(number)  # ASHA notes who came to a rung when it is asked
    for number in numbers[1:7]:
        search.tell(number, "complete", 0.9)
    stopped = []
    for number in (0, 7):
        for epoch in (1, 2):
            search.report(number, epoch, 0.0)
            stopped += [number] if search.should_stop(number) else []
    assert set(stopped) == {7}


def test_what_asha_knows_survives_a_restart(make):
    search = make(trials=12, pruner="asha", grace=1, sampler="random")
    for number in range(9):
        search.ask()
        search.report(number, 1, 0.5 + number / 100)
        search.tell(number, "complete", 0.5 + number / 100) if number == 0 or not search.should_stop(number) else search.tell(
            number, "pruned"
        )
    search = open_search(search.folder)
    search.ask()
    search.report(9, 1, 0.1)
    assert search.should_stop(9)


def test_a_trial_that_is_given_up_stays_so(make):
    """Whoever stops it may ask again, or crash before it tells."""
    search = make(trials=12, pruner="asha", grace=1, sampler="random")
    for number in range(6):
        search.ask(f"key {number}")
        search.report(number, 1, 0.9 - number / 10)
    assert [search.should_stop(number) for number in range(6)] == [False, True, True, True, True, True]
    assert [search.should_stop(number) for number in range(6)] == [False, True, True, True, True, True]
    search.tell(1, "pruned")
    assert not search.should_stop(1)
    search = open_search(search.folder)
    assert search.reclaim(()) == [0]
    assert [trial.state for trial in search.frozen()] == [TrialState.RUNNING] + [TrialState.PRUNED] * 5
    assert [trial.value for trial in search.ranked()] == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])


def test_a_trial_after_its_last_epoch_is_not_given_up(make):
    search = make(trials=12, pruner="asha", grace=2, sampler="random", config=load_config({"optim.epochs": 6}))
    for number in range(6):
        search.ask()
        for epoch in (2, 6):
            search.report(number, epoch, 0.9 - number / 10)
    assert not any(map(search.should_stop, range(6)))
    search.ask()
    search.report(6, 2, 0.1)
    assert search.should_stop(6)


NINE_EPOCHS = {"optim.epochs": 9}  # with a grace of 1, the rungs are at 1 and 3


def train_until_pause(search, key, value, epochs=9):
    """Train the trial that is handed out next; returns its number and the epochs that it has then."""
    number = search.ask(key)[0]
    for epoch in range(epochs_of(search.frozen()[number]) + 1, epochs + 1):
        search.report(number, epoch, value(number) * epoch / 9)
        if search.pause(number, epoch, {"AP50": 0.5}):
            return number, epoch
    search.tell(number, "complete", value(number))
    return number, epochs


def test_paused_trials_are_promoted_before_a_new_one_begins_and_end_as_pruned(make):
    search = make(trials=5, pruner="promote", grace=1, sampler="random", config=load_config(NINE_EPOCHS))
    values = [0.6, 0.5, 0.3, 0.2, 0.1]
    went = []
    while search.ask(f"key {len(went)}") is not None:
        went.append(train_until_pause(search, f"key {len(went)}", values.__getitem__))
        if len(went) == 3:
            search = open_search(search.folder)  # what is paused survives the process
            assert search.reclaim(()) == []
    assert went == [(0, 9), (1, 1), (2, 1), (3, 1), (1, 3), (4, 1)]  # trial 1 is in the better half once there are four
    assert [state_of(trial) for trial in search.frozen()] == ["complete", *["paused"] * 4]
    assert search.end_paused() == [1, 2, 3, 4]
    assert [state_of(trial) for trial in search.frozen()] == ["complete", *["pruned"] * 4]
    assert [trial.value for trial in search.frozen()] == pytest.approx([0.6, 0.5 / 3, 0.3 / 9, 0.2 / 9, 0.1 / 9])
    assert list(trials_frame(search)["AP50"][1:]) == [0.5] * 4


def test_a_trial_whose_driver_dies_at_a_rung_is_paused_there(make):
    """Its report is recorded, and the decision is not."""
    search = make(trials=5, pruner="promote", grace=1, sampler="random", config=load_config(NINE_EPOCHS))
    for number, key in enumerate("abcd"):
        search.ask(key)
        search.report(number, 1, 0.5 - number / 10)
    search.report(3, 2, 0.5)  # its report at the rung was handled, and the decision lost
    search = open_search(search.folder)
    assert search.reclaim(()) == [0, 1]  # trial 1 is in the better half
    assert [state_of(trial) for trial in search.frozen()] == ["running", "running", "paused", "paused"]


def test_a_trial_whose_report_at_a_rung_was_lost_is_paused_after_the_next_one(make):
    search = make(trials=5, pruner="promote", grace=2, sampler="random", config=load_config(NINE_EPOCHS))
    for number in range(2):
        search.ask()
        search.report(number, 1, 0.5 - number / 10)
    search.report(0, 2, 0.6)
    search.report(1, 3, 0.5)
    assert search.pause(1, 3)
    assert state_of(search.frozen()[1]) == "paused"


@pytest.mark.parametrize(
    ("scheduler", "number", "epoch", "paused"),
    [("half", 1, 1, False), ("promote", 0, 1, False), ("promote", 1, 1, True), ("promote", 1, 9, False)],
)
def test_only_promote_pauses_at_rungs_and_neither_trial_0_nor_the_last_epoch(make, scheduler, number, epoch, paused):
    search = make(trials=5, pruner=scheduler, grace=1, sampler="random", config=load_config(NINE_EPOCHS))
    for trial in range(2):
        search.ask()
        search.report(trial, epoch, 0.5 - trial / 10)
    assert search.pause(number, epoch) is paused


def test_a_trial_that_is_in_the_better_half_as_it_comes_to_a_rung_trains_on(make):
    search = make(trials=5, pruner="promote", grace=1, sampler="random", config=load_config(NINE_EPOCHS))
    for number, value in enumerate((0.1, 0.5, 0.4)):
        search.ask()
        search.report(number, 1, value)
        assert search.pause(number, 1) is (number == 2)
    search.report(1, 2, 0.1)
    assert not search.pause(1, 2)  # it is asked once at each rung


def test_paused_trials_count_for_the_best(make):
    search = make(trials=3, pruner="promote", grace=1, sampler="random", config=load_config(NINE_EPOCHS))
    for number, value in enumerate((0.75, 0.5, 0.25)):
        search.ask()
        search.report(number, 1, value)
        search.pause(number, 1)
    assert [trial.number for trial in search.ranked()] == [1, 2]
    assert search.best().number == 1
    assert list(trials_frame(search)["AP"][1:]) == [0.5, 0.25]
    assert len(best_points(search.folder, search.space, search.base_config, 5)) == 2


def test_promote_is_refused_beside_a_sampler_that_does_not_know_paused_trials(make):
    with pytest.raises(UserError, match="--scheduler promote: --sampler tpe does not know paused trials"):
        make(pruner="promote", sampler="tpe")


def test_the_time_of_a_pause_is_none_of_the_trials(make, monkeypatch):
    search = make(trials=4, pruner="promote", grace=1, sampler="random", config=load_config(NINE_EPOCHS))
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


def test_the_members_of_a_population_are_compared_at_the_same_epoch(make):
    search = make(trials=4, pruner="pbt", sampler="random")
    for number, value in enumerate((0.5, 0.3, 0.4, 0.9)):
        search.ask()
        search.report(number, 2, value)
    search.report(1, 4, 0.95)
    assert search.better_trial(1, 2) == 3  # later it was the best
    assert search.better_trial(2, 4) is None  # it has not come so far
    assert search.better_trial(3, 2) is None


def test_trial_0_of_a_population_keeps_its_weights(make):
    search = make(trials=4, pruner="pbt", sampler="random")
    for number, value in enumerate((0.1, 0.3, 0.4, 0.9)):
        search.ask()
        search.report(number, 2, value)
    assert search.better_trial(0, 2) is None


def test_the_median_rule_spares_the_first_epochs(make):
    search = make(trials=12, pruner="median", grace=3)
    for number in range(10):
        search.ask()
        for epoch in range(1, 9):
            search.report(number, epoch, 0.5)
        search.tell(number, "complete", 0.5)
    search.ask()
    decisions = []
    for epoch in range(1, 5):
        search.report(10, epoch, 0.1)
        decisions.append(search.should_stop(10))
    assert decisions == [False, False, True, True]


def test_without_a_pruner_nothing_is_stopped(make):
    search = make(pruner="none")
    for number in range(8):
        search.ask()
        search.report(number, 1, -number)
        assert not search.should_stop(number)


# Crashes


def test_trials_that_the_runner_lost_are_handed_out_again_before_new_ones(make):
    search = make(trials=5)
    first = [search.ask(key) for key in ("a", "b", "c")]
    search.tell(0, "complete", 0.5)
    search.report(2, 1, 0.3)
    search = open_search(search.folder)
    assert search.reclaim({"b"}) == [2]
    assert search.ask("again") == first[2]
    assert search.number("again") == 2
    assert search.ask("new")[0] == 3
    for number in (1, 2, 3):
        search.tell(number, "complete", 0.1)
    assert search.ask("last")[0] == 4
    assert search.ask("none left") is None


def test_a_trial_whose_drawing_was_cut_short_is_drawn_to_its_end(make):
    search = make(trials=3)
    run_first = search.ask("a")
    assert run_first[0] == 0
    cut = search.study.ask()
    cut.suggest_float("optim.lr", 1e-5, 1e-3, log=True)
    search = open_search(search.folder)
    assert len(trials_frame(search)) == 2  # a report in this state works
    assert search.reclaim({"a"}) == [1]
    number, settings = search.ask("b")
    assert number == 1
    assert settings["optim.lr"] == cut.params["optim.lr"]
    assert {"loss.bbox_loss_coef", "matcher.set_cost_bbox", "optim.schedule"} <= set(settings)


def test_the_lock_of_a_killed_writer_is_removed_and_that_of_a_live_one_is_left(make, monkeypatch):
    search = make()
    lock = search.folder / "study.journal.lock"
    lock.symlink_to(search.folder / "study.journal")
    monkeypatch.setattr(study.time, "sleep", lambda seconds: replaced(lock) if seconds == study.LOCK_SECONDS else None)

    def replaced(lock):  # another writer took the lock meanwhile
        lock.unlink()
        lock.symlink_to(search.folder / "config.yaml")

    study._mend(search.folder / "study.journal")
    assert lock.is_symlink()
    monkeypatch.undo()
    open_search(search.folder)
    assert not lock.is_symlink()  # otherwise Optuna would wait for half a minute


def test_an_unfinished_last_line_is_cut_off(make):
    search = make()
    search.ask("a")
    journal = search.folder / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":8,"work')
    assert len(read_study(search.folder).trials) == 1  # readers pass over it
    search = open_search(search.folder)
    search.tell(0, "complete", 0.5)
    assert search.ask("b")[0] == 1
    assert [trial.value for trial in read_study(search.folder).trials] == [0.5, None]


RUNNER = """
import sys, time
from raydetr.search.study import open_search
search = open_search(sys.argv[1])
search.reclaim(())
while (asked := search.ask()) is not None:
    for epoch in range(1, 4):
        time.sleep(0.01)
        search.report(asked[0], epoch, epoch / 10)
    search.tell(asked[0], "complete", asked[1]["optim.lr"])
"""


@pytest.mark.slow
def test_a_search_killed_again_and_again_ends_with_every_trial_once(make):
    """Real processes, killed at seeded moments, while another reads the journal as Optuna's own users do."""
    search = make(trials=20, sampler="random", seed=7)
    moments = random.Random(0)
    kills, seen = 0, 0
    for _ in range(20):
        runner = subprocess.Popen([sys.executable, "-c", RUNNER, str(search.folder)])
        started = time.monotonic()
        limit = None
        while runner.poll() is None:
            storage = JournalStorage(JournalFileBackend(str(search.folder / "study.journal")))
            count = len(optuna.load_study(study_name=None, storage=storage).trials)
            assert count >= seen
            if count > seen and limit is None:
                limit = time.monotonic() + moments.uniform(0.0, 0.4)
            seen = count
            if (limit and time.monotonic() > limit and kills < 6) or time.monotonic() - started > 120:
                runner.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        if runner.wait() == 0:
            break
    trials = read_study(search.folder).trials
    assert kills >= 3
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 20
    through = run(make(name="through", trials=20, sampler="random", seed=7)).frozen()
    # Only a trial that was killed in the middle of its drawing may have other values.
    assert sum(trial.params != other.params for trial, other in zip(trials, through, strict=True)) <= kills


# Several objectives


def run_several(search: Search, objectives: dict, epochs=2) -> Search:
    """Run every trial that is left; ``objectives`` maps names to functions of the settings."""
    while (asked := search.ask()) is not None:
        number, settings = asked
        values = {name: function({**search.base, **settings}) for name, function in objectives.items()}
        for epoch in range(1, epochs + 1):
            search.report(number, epoch, values[search.metric] * epoch / epochs, values)
        search.tell(number, "complete", values[search.metric], latency=values.get("latency"))
    return search


QUERIES = {"model.num_queries": {"integer": [10, 100]}, "optim.lr": {"loguniform": [1e-5, 1e-3]}}
SEVERAL = {
    "AP": lambda settings: hill(settings) * (0.5 + settings["model.num_queries"] / 200),  # more queries find more
    "latency": lambda settings: 0.01 + 1e-4 * settings["model.num_queries"],  # and take longer
}


def test_the_front_has_the_trials_that_no_other_surpasses_and_best_is_by_the_metric(make):
    search = run_several(make(QUERIES, also=["latency"], trials=12, seed=1), SEVERAL)
    assert search.objectives == ["AP", "latency"]
    values = {trial.number: tuple(trial.values) for trial in search.frozen()}
    expected = [
        number
        for number, (ap, latency) in values.items()
        if not any(other >= ap and faster <= latency and (other, faster) != (ap, latency) for other, faster in values.values())
    ]
    front = search.front()
    assert sorted(trial.number for trial in front) == sorted(expected)
    assert len(front) > 1
    assert [trial.values[0] for trial in front] == sorted((trial.values[0] for trial in front), reverse=True)
    assert search.best().number == front[0].number == max(values, key=lambda number: values[number][0])
    write_best(search.folder)
    assert load_config(read_yaml(search.folder / "best.yaml")).optim.lr == search.config(front[0].number).optim.lr
    frame = trials_frame(search)
    assert list(frame.columns[:5]) == ["trial", "state", "AP", "latency", "epochs"]
    assert list(frame["latency"]) == [values[number][1] for number in range(12)]
    table = top_trials(search)
    _, trade_offs = table.split("best trade-offs of AP, latency (no trial is better in one without being worse in another):\n")
    shown = [line.split()[0] for line in trade_offs.splitlines()[1:]]
    assert shown == [str(trial.number) for trial in front[:10]]
    assert f"{1000 * front[-1].values[1]:.1f} ms" in table


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_reopened_search_with_several_objectives_draws_on(make, sampler):
    through = run_several(make(QUERIES, "through", also=["latency", "AP_small"], sampler=sampler, seed=2), SEVERAL | {"AP_small": hill})
    cut = make(QUERIES, "cut", also=["latency", "AP_small"], sampler=sampler, seed=2)
    number, settings = cut.ask()
    cut.report(number, 1, SEVERAL["AP"]({**cut.base, **settings}) / 2, {"AP_small": hill({**cut.base, **settings})})
    cut = open_search(cut.folder)
    assert cut.reclaim(()) == [0]
    run_several(cut, SEVERAL | {"AP_small": hill})
    assert [trial.params for trial in cut.frozen()] == [trial.params for trial in through.frozen()]
    assert [trial.values for trial in cut.frozen()] == [trial.values for trial in through.frozen()]
    assert Search(cut.folder).also == ["latency", "AP_small"]


def test_all_objectives_of_a_trial_are_those_of_one_epoch(make):
    search = make(also=["AP_small", "AP_large"])
    number, _ = search.ask()
    for epoch, (ap, small, large) in enumerate([(0.3, 0.1, 0.9), (0.5, 0.2, 0.6), (0.4, 0.9, 0.9)], 1):
        search.report(
            number, epoch, max(ap, *search.frozen()[number].intermediate_values.values(), 0), {"AP_small": small, "AP_large": large}
        )
    search.tell(number, "complete", 0.5)
    assert search.frozen()[number].values == [0.5, 0.2, 0.6]


def test_a_trial_that_lacks_an_objective_is_failed(make):
    search = make(also=["latency"])
    number, _ = search.ask()
    search.report(number, 1, 0.5)
    search.tell(number, "complete", 0.5)
    assert search.frozen()[number].state == TrialState.FAIL
    assert search.frozen()[number].user_attrs["reason"] == "its latency is None"
    assert search.front() == []


def test_a_search_with_several_objectives_warm_starts_another_and_can_be_one(make):
    earlier = run_several(make(QUERIES, "earlier", also=["latency"], seed=1), SEVERAL)
    points, prior = warm_start_from([earlier.folder], read_space(QUERIES), load_config())
    assert points[0] == earlier.best().params
    later = make(QUERIES, "later", also=["latency"], points=points, prior=prior)
    later.ask()
    assert later.ask()[1]["optim.lr"] == earlier.best().params["optim.lr"]


# Making, opening


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"trials": 0}, "--trials 0: a search needs at least one trial"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee'; did you mean 'tpe'?"),
        ({"sampler": "grid"}, "unknown sampler 'grid'; there are tpe, gp, random, cmaes"),
        ({"pruner": "ascha"}, "unknown scheduler 'ascha'; did you mean 'asha'?"),
        ({"pruner": "asha", "grace": 0}, "a grace of 0 epochs"),
        ({"points": [{"optim.lr": 2e-4}, {"optim.lr": 3e-4}], "trials": 2}, "2 points to start from and trial 0 need 3 trials; 2 were"),
        ({"points": [{"optim.lr": 2}]}, "out of bounds"),
        ({"also": ["latency"], "pruner": "asha"}, "--also latency: --scheduler asha judges trials by AP alone"),
        ({"also": ["latency"], "pruner": "pbt"}, "--also latency: --scheduler pbt judges trials by AP alone"),
        ({"also": ["latency"], "sampler": "gp"}, "--also latency: --sampler gp knows one objective; tpe and random take several"),
        ({"also": ["AP"]}, "--also AP: is an objective of the search already"),
        ({"also": ["latency", "latency"]}, "--also latency: is an objective of the search already"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_leaves_nothing(make, tmp_path, given, expected):
    with pytest.raises(UserError) as caught:
        make(**given)
    assert expected in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_a_missing_package_is_named(make, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "cmaes" else found(name, *rest))
    with pytest.raises(UserError, match="pip install cmaes"):
        make(sampler="cmaes")


def test_a_folder_with_a_search_is_not_overwritten(make):
    search = run(make())
    with pytest.raises(UserError, match=r"holds a search already; resume it \(--resume .*search\) or choose another --name"):
        make()
    assert len(read_study(search.folder).trials) == 8


def test_a_folder_that_cannot_be_made_is_named(make, tmp_path):
    (tmp_path / "search").write_text("a file")
    with pytest.raises(UserError, match=r"search: (cannot be written|Not a directory)"):
        make()


def test_a_changed_space_is_refused_with_the_difference(make):
    search = make()
    changed = read_space({**SPACE, "optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"uniform": [0, 1]}})
    with pytest.raises(UserError) as caught:
        open_search(search.folder, changed)
    assert "loss.eos_coef is new: {uniform: [0.0, 1.0]}; optim.lr was {loguniform: [1.0e-05, 0.001]}, is" in str(caught.value)
    assert open_search(search.folder, read_space(SPACE), trials=10).trials == 10


def test_a_folder_without_a_whole_search_is_refused(make, tmp_path):
    with pytest.raises(UserError, match=r"holds no search \(study.journal is missing\)"):
        open_search(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "study.journal").write_text("no journal\nat all\n")
    with pytest.raises(UserError, match="not the journal of an Optuna study"):
        open_search(tmp_path)
    (tmp_path / "study.journal").write_text('{"some": "json"}\n')
    with pytest.raises(UserError, match="not the journal of an Optuna study"):
        open_search(tmp_path)
    journal = make().folder / "study.journal"
    lines = [line for line in journal.read_text().splitlines() if '"search"' not in json.dumps(json.loads(line).get("user_attr", {}))]
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="interrupted while it was being made"):
        open_search(journal.parent)


@pytest.mark.parametrize("damage", [b'{"op_code":8,"work', b"\xff\xfe", b"[1]", b'{"some": "json"}', b""])
def test_damage_in_the_middle_of_the_journal_names_the_line(make, damage):
    journal = run(make()).folder / "study.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:20], damage + b"\n", *lines[21:]]))
    with pytest.raises(UserError) as caught:
        open_search(journal.parent)
    says = f"line 21: the journal is damaged; to resume with what was recorded before it, keep the first 20 lines of {len(lines)}"
    assert f"study.journal, {says} (head -n 20)" in str(caught.value)
    journal.write_bytes(b"".join(lines[:20]))  # as the message says
    assert len(open_search(journal.parent).frozen()) >= 1


def test_an_edited_space_is_noticed(make):
    search = run(make())
    file = search.folder / "space.yaml"
    before = file.read_text()
    file.write_text(before.replace("0.001", "0.01"))
    for opened in (open_search, Search):
        with pytest.raises(UserError, match=r"space\.yaml: was edited after the search began: optim\.lr was .*; undo the edit"):
            opened(search.folder)
    file.write_text(before)
    assert open_search(search.folder).trials == search.trials
    file.unlink()
    with pytest.raises(UserError, match=r"space\.yaml: is missing"):
        open_search(search.folder)


def test_edited_base_settings_are_noticed_but_data_may_move(make):
    search = run(make())
    file = search.folder / "config.yaml"
    before = file.read_text()
    file.write_text(before.replace("path: null", "path: /elsewhere").replace("device: auto", "device: cpu"))
    assert open_search(search.folder).config(0).data.path == "/elsewhere"
    file.write_text(before.replace("weight_decay: 0.0001", "weight_decay: 0.1"))
    with pytest.raises(UserError, match=r"config\.yaml: was edited after the search began: optim\.weight_decay was 0\.0001, is 0\.1"):
        open_search(search.folder)
    file.write_text("")
    with pytest.raises(UserError, match=r"config\.yaml: is empty"):
        open_search(search.folder)


def test_a_search_of_an_earlier_version_opens_without_the_record_of_its_space(make):
    search = run(make())
    plan = search.study.user_attrs["search"]
    search.study.set_user_attr("search", {name: plan[name] for name in plan if name not in ("space", "base")})
    assert open_search(search.folder).ranked()


WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # root may read anything


@pytest.mark.skipif(bool(WITHOUT_PRIVILEGES) and not shutil.which("setpriv"), reason="needs setpriv to give up root's privileges")
@pytest.mark.parametrize(
    ("file", "mode"), [("study.journal", 0o000), ("study.journal", 0o400), (".", 0o500), (".", 0o000), ("space.yaml", 0o000)]
)
def test_missing_permissions_are_one_line(make, file, mode):
    search = make()
    target = search.folder / file
    target.chmod(mode)
    code = "import sys; from raydetr.errors import UserError\nfrom raydetr.search.study import open_search\n"
    code += "try: open_search(sys.argv[1])\nexcept UserError as error: print(error)"
    try:
        said = subprocess.run([*WITHOUT_PRIVILEGES, sys.executable, "-c", code, search.folder], capture_output=True, text=True, check=False)
    finally:
        target.chmod(0o700)
    assert "Permission denied" in said.stdout, said.stderr
    assert str(target) in said.stdout
    assert said.stdout.count("\n") == 1


def test_trials_have_the_columns_of_settings_and_metrics_and_no_others(make):
    search = make(trials=2)
    internals = {"trial_id": "a1", "pid": 7, "experiment_tag": "1", "config/number": 0, "timestamp": 1, "done": "no", "hostname": "h"}
    for number in range(2):
        search.ask(str(number))
        search.report(number, 1, 0.5)
        search.tell(number, "complete", 0.5, metrics={**dict.fromkeys(REPORTED, 0.25), "node": "n", "cards": "0", **internals})
    columns = ["trial", "state", "AP", "epochs", "seconds", "started", "ended", *search.space.names]
    columns += [name for name in REPORTED if name not in columns] + ["node", "cards", "name", "reason"]
    assert trials_frame(search).columns.to_list() == columns
    header = write_trials(search.folder)[0].read_text().splitlines()[0]
    assert header.split(",") == columns


def test_a_search_can_be_sent_to_another_process(make):
    search = run(make())
    again = pickle.loads(pickle.dumps(search))
    assert [trial.params for trial in again.frozen()] == [trial.params for trial in search.frozen()]


def test_neither_search_nor_report_needs_ray():
    code = """
import sys
import raydetr.search.study
assert "torch" not in sys.modules
import raydetr.report.report
assert "ray" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}).returncode == 0


# Points to start from


def test_points_are_tried_right_after_the_defaults(make):
    point = {"optim.lr": 2e-4, "optim.schedule": "step", "optim.lr_drop": 0.5}
    search = make(points=[point, {"optim.lr": 3e-4}, dict(point)])
    assert search.ask()[0] == 0
    first, second, third = (search.ask()[1] for _ in range(3))
    assert {name: first[name] for name in point} == point
    assert second["optim.lr"] == 3e-4  # the rest is drawn
    assert third["optim.lr"] not in (2e-4, 3e-4)  # the same point is not tried twice


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("points.yaml", "- {optim.lr: 2e-4}\n- optim: {lr: 3e-4, schedule: cosine}\n"),
        ("points.json", '[{"optim.lr": 2e-4},\n {"optim": {"lr": 3e-4, "schedule": "cosine"}}]'),
    ],
)
def test_points_are_read_from_yaml_and_json(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    points = read_points(tmp_path / name, read_space(SPACE), load_config())
    assert points == [{"optim.lr": 2e-4}, {"optim.lr": 3e-4, "optim.schedule": "cosine"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr: 2e-4\n", "expected a list of points"),
        ("[]\n", "expected a list of points"),
        ("- {optim.lr: 2e-4}\n- 3\n", "line 2: a point is a mapping"),
        ("- {optim.lr: 2e-4}\n\n- {optim.lr: 2e-2}\n", "line 3: optim.lr: 0.02 is not in {loguniform"),
        ("- {optim.lr: [\n", "line 2: not a YAML file"),
        ("- &p {optim.lr: 2e-4}\n- &q [*q]\n", "line 2: refers to itself"),
    ],
)
def test_faults_in_points_are_told_with_their_line(tmp_path, text, expected):
    path = tmp_path / "points.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_points(path, read_space(SPACE), load_config())
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_missing_points_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: No such file"):
        read_points(tmp_path / "none.yaml", read_space(SPACE), load_config())


def test_the_best_points_of_an_earlier_search_that_fit_are_taken(make):
    earlier = run(make(name="earlier", trials=12, config=load_config({"loss.giou_loss_coef": 3})))
    narrow = read_space({"optim.lr": {"loguniform": [1e-4, 2e-4]}, "loss.giou_loss_coef": {"uniform": [1, 5]}})
    points = best_points(earlier.folder, narrow, load_config(), count=2)
    fitting = [trial.params["optim.lr"] for trial in earlier.ranked() if 1e-4 <= trial.params["optim.lr"] <= 2e-4]
    assert len(fitting) > 2
    assert points == [{"optim.lr": rate, "loss.giou_loss_coef": 3.0} for rate in fitting[:2]]  # what it did not draw comes from its base
    search = make(narrow.to_dict(), points=points)
    search.ask()
    assert search.ask()[1]["optim.lr"] == fitting[0]


def test_several_earlier_searches_give_first_points_and_a_prior(make):
    earlier = [run(make(name=name, trials=8, seed=seed, sampler="random")) for seed, name in enumerate(("one", "two"))]
    space = read_space(SPACE)
    points, prior = warm_start_from([search.folder for search in earlier], space, load_config())
    assert points == [best_points(search.folder, space, load_config(), 1)[0] for search in earlier]
    assert prior == [point for search in earlier for point in best_points(search.folder, space, load_config(), 5)]
    assert len(warm_start_from([earlier[0].folder], space, load_config())[0]) == 3
    search = make(name="new", points=points, prior=prior, sampler="gp", trials=30)
    for _ in range(3):
        search.ask()
    drawn = [search.ask()[1]["optim.lr"] for _ in range(16)]  # nothing is reported: drawn from the prior, or anywhere
    believed = [math.log10(point["optim.lr"]) for point in prior]
    near = [min(abs(math.log10(rate) - each) for each in believed) < 0.4 for rate in drawn]
    assert sum(near) >= 10
    assert Search(search.folder).study.user_attrs["search"]["prior"] == prior  # a resumed search has it as well


def test_an_earlier_search_without_anything_in_the_new_space_is_refused(make):
    earlier = run(make(name="earlier"))
    space = read_space({"optim.lr": {"loguniform": [1e-2, 1e-1]}})
    with pytest.raises(UserError, match=r"--warm-start .*earlier: no ended trial of it has settings within the new search space"):
        warm_start_from([earlier.folder], space, load_config())


def test_a_space_can_say_where_draws_begin(make):
    search = make({"optim.lr": {"loguniform": [1e-5, 1e-3], "around": "default"}, "loss.eos_coef": {"uniform": [0, 1]}})
    assert search.study.user_attrs["search"]["prior"] == [{"optim.lr": 1e-4}]


# What comes of it


def test_best_yaml_holds_the_complete_settings_of_the_best_trial(make):
    search = run(make(config=load_config({"run.name": "first", "optim.epochs": 7, "model.preset": "detr_tiny"}), trials=20))
    config = load_config(read_yaml(write_best(search.folder)))
    assert config.optim.lr == search.settings(search.best().number)["optim.lr"] != 5e-4
    assert config.matcher.set_cost_bbox == config.loss.bbox_loss_coef
    assert (config.optim.epochs, config.model.preset, config.run.name) == (7, "detr_tiny", None)
    config.run.name = "first"
    assert config == search.config(search.best().number)


def test_there_is_no_best_before_a_trial_has_ended(make):
    search = make()
    search.ask()
    with pytest.raises(UserError, match="no trial has ended with a value of AP yet"):
        write_best(search.folder)
    assert not (search.folder / "best.yaml").exists()


def test_trials_are_written_as_csv_and_parquet(make):
    space = {**SPACE, "data.train_sizes": {"choice": [[480, 512], [640]]}}
    search = make(space, trials=5)
    for number in range(4):
        search.ask()
        search.report(number, 1, number / 10)
        search.tell(number, "failed" if number == 2 else "complete", number / 10, reason="boom", metrics={"AP50": 0.5})
    search.ask()
    csv, parquet = (read(path) for read, path in zip((pandas.read_csv, pandas.read_parquet), write_trials(search.folder), strict=True))
    for frame in (csv, parquet):
        assert frame["trial"].tolist() == [0, 1, 2, 3, 4]
        assert frame["state"].tolist() == ["complete", "complete", "failed", "complete", "running"]
        assert frame["AP"].tolist()[:2] == [0.0, 0.1]
        assert frame["AP50"].tolist()[:4] == [0.5] * 4
        assert frame["reason"].tolist()[2] == "boom"
        assert frame["optim.lr"].tolist() == [search.settings(number)["optim.lr"] for number in range(5)]
        assert set(frame["data.train_sizes"][1:]) <= {"480, 512", "640"}
        drawn = [search.settings(number)["optim.schedule"] == "step" for number in range(5)]
        assert frame["optim.lr_drop"].notna().tolist() == drawn


def test_the_top_trials_stand_beside_trial_0(make):
    search = run(make(), lambda settings: -hill(settings))  # the default is far from the worst rate, so others beat it
    lines = top_trials(search, 2).splitlines()
    best = search.best()
    assert lines[0].split()[:3] == ["trial", "state", "AP"]
    assert lines[1].split()[:2] == [str(best.number), "complete"]
    assert f"{best.value - search.frozen()[0].value:+.4f}" in lines[1]
    assert lines[-1].startswith("0 (default)")
    assert len(lines) == 4


def test_trial_names_tell_the_drawn_settings(make):
    space = {**SPACE, "loss.eos_coef": {"uniform": [0, 1], "step": 0.05}, "model.weights": {"choice": ["coco", "my weights/best.pth"]}}
    search = make(
        space, points=[{"optim.lr": 3e-4, "loss.eos_coef": 0.05, "optim.schedule": "cosine", "model.weights": "my weights/best.pth"}]
    )
    search.ask()
    search.ask()
    assert search.trial_name(0) == "000_default"
    name = search.trial_name(1)
    assert name.startswith("001_lr=3e-4_bbox=")
    assert name.endswith("_schedule=cosine_eos=0.05_weights=my-weights-best.pth")
