import math
import os
import pickle
import subprocess
import sys

import pytest
from optuna.trial import TrialState

from raydetr.config import flatten, load_config, read_yaml, to_dict
from raydetr.errors import UserError
from raydetr.search.journal import read_study
from raydetr.search.methods import SAMPLERS
from raydetr.search.points import best_points, warm_start_from
from raydetr.search.record import epochs_of, state_of
from raydetr.search.results import top_trials, trials_frame, write_best
from raydetr.search.space import read_space
from raydetr.search.study import Search, open_search
from tests.search.searches import SPACE, hill, run

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
