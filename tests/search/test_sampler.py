import copy
import math

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from scipy.stats import norm
from threadpoolctl import threadpool_info, threadpool_limits

from raydetr.search import sampler
from raydetr.search.encoding import Cube
from raydetr.search.halving import PAUSED
from raydetr.search.sampler import CurveSampler, ended, log_expected_improvement, observations
from raydetr.search.space import read_space

SPACE = read_space({"optim.lr": {"loguniform": [1e-5, 1e-3]}, "loss.eos_coef": {"uniform": [0, 1]}})
CHOICES = read_space(
    {
        "optim.schedule": {"choice": ["step", "cosine"]},
        "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
        "model.dec_layers": {"integer": [2, 6]},
    }
)


def place(params) -> float:
    """The position of the learning rate within its range."""
    return (math.log10(params["optim.lr"]) + 5) / 2


def draw(study, seed, space=SPACE, prior=(), startup=6, search_seed=0, density=None):
    study.sampler = CurveSampler(seed, space, startup, search_seed, density or TPESampler(n_startup_trials=10**6), prior)
    trial = study.ask()
    space.suggest(trial)
    return trial


def search(height, count, space=SPACE, state=TrialState.PRUNED, epochs=2, **options):
    """A study of trials, one after the other, whose objective grows to ``height`` of their settings, and that end after some epochs."""
    study = optuna.create_study(direction="maximize")
    for number in range(count):
        trial = draw(study, number, space, **options)
        for epoch in range(1, epochs + 1):
            trial.report(height(trial.params) * (1 - 0.5**epoch), epoch)
        study.tell(trial, height(trial.params) if state == TrialState.COMPLETE else None, state)
    return study


def near(params) -> float:
    """An objective with its top at a rate of 2e-4; nothing else matters."""
    return 0.5 - (place(params) - 0.65) ** 2


def test_the_first_draws_are_spread_over_every_range_and_choice():
    """Before any report, as where many trials start together."""
    study = optuna.create_study()
    study.enqueue_trial({"optim.lr": 1e-4, "loss.eos_coef": 0.5})  # as trial 0, which is not drawn
    drawn = [draw(study, number) for number in range(17)][1:]
    for first in (0, 8):
        places = [(place(trial.params), trial.params["loss.eos_coef"]) for trial in drawn[first : first + 8]]
        assert [sorted(int(8 * each) for each in column) for column in zip(*places, strict=True)] == [list(range(8))] * 2
    study = optuna.create_study()
    schedules = [draw(study, number, CHOICES).params["optim.schedule"] for number in range(9)][1:]
    assert sorted(schedules) == ["cosine"] * 4 + ["step"] * 4


def test_stopped_trials_are_learned_from():
    """None of the trials is complete, and the later ones are near the top."""
    study = search(near, 20)
    assert {trial.state for trial in study.trials} == {TrialState.PRUNED}
    first, last = (np.mean([abs(place(trial.params) - 0.65) for trial in some]) for some in (study.trials[:6], study.trials[12:]))
    assert last < 0.5 * first
    assert last < 0.1


def test_draws_at_the_same_time_spread():
    study = search(near, 10)
    drawn = [draw(study, 100).params for _ in range(8)]  # the same seed every time: only the running trials differ
    assert len({round(place(params), 2) for params in drawn} | {round(params["loss.eos_coef"], 2) for params in drawn}) >= 5


def test_a_draw_leaves_the_other_cores_alone(monkeypatch):
    threads = []

    def counted(gain, sd):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return log_expected_improvement(gain, sd)

    monkeypatch.setattr(sampler, "log_expected_improvement", counted)
    with threadpool_limits(2, "blas"):
        search(near, 8)
    assert set(threads) == {1}


def test_the_seed_and_the_trials_decide_a_draw():
    study = search(near, 10)
    params = [draw(study, seed).params for seed in (5, 5, 6)]
    fresh = draw(search(near, 10), 5).params
    assert fresh == params[0]
    assert params[1] != params[0]  # the first draw is running now
    assert params[2] != params[1]


def test_the_corner_where_trials_fail_is_avoided():
    study = optuna.create_study(direction="maximize")
    for number in range(24):
        trial = draw(study, number)
        if place(trial.params) > 0.5:
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.report(near(trial.params), 1)  # rises towards the corner
            study.tell(trial, near(trial.params))
    failed = [trial.state == TrialState.FAIL for trial in study.trials]
    assert sum(failed[12:]) <= 5


def test_choices_conditions_and_whole_numbers_are_learned():
    def height(params):
        drop = params.get("optim.lr_drop", 0.0)
        return 0.4 - (drop - 0.8) ** 2 - 0.02 * (params["model.dec_layers"] - 3) ** 2

    study = search(height, 30, CHOICES)
    last = [trial.params for trial in study.trials[-8:]]
    assert all(("optim.lr_drop" in params) == (params["optim.schedule"] == "step") for params in last)
    assert sum(params["optim.schedule"] == "step" for params in last) >= 6
    assert sum(params["model.dec_layers"] in (2, 3, 4) for params in last) >= 6


def test_a_prior_is_where_the_first_draws_are():
    prior = [{"optim.lr": 1e-5 * 10**1.3, "loss.eos_coef": 0.5}]
    with_prior, without = (
        [
            abs(place(trial.params) - 0.65)
            for seed in range(200)
            for trial in [draw(optuna.create_study(), seed, prior=some, search_seed=seed)]
        ]
        for some in (prior, ())
    )
    assert np.mean(with_prior) < 0.85 * np.mean(without)
    assert max(with_prior) > 0.4  # some draws are anywhere


def test_a_wrong_prior_is_forgotten():
    study = search(near, 40, prior=[{"optim.lr": 1.2e-5, "loss.eos_coef": 0.5}])
    last = [abs(place(trial.params) - 0.65) for trial in study.trials[-10:]]
    assert np.mean(last) < 0.12


def test_of_many_reports_the_best_last_ones_and_a_sample_are_modeled(monkeypatch):
    monkeypatch.setattr(sampler, "MODELED", 10)
    study = search(near, 30, epochs=4, state=TrialState.COMPLETE)
    _, values, left = observations(study.trials, Cube(SPACE))
    assert len(values) == 10
    assert sorted(values[left == 0])[-5:] == pytest.approx(sorted(near(trial.params) for trial in study.trials)[-5:])
    assert (left > 0).any()  # reports after two epochs


def reported(*trials):
    """A study of trials, each with its reports from epoch 1 on, its state and its value."""
    study = optuna.create_study(direction="maximize")
    for reports, state, value in trials:
        trial = study.ask({"optim.lr": SPACE.distributions["optim.lr"], "loss.eos_coef": SPACE.distributions["loss.eos_coef"]})
        for epoch, each in enumerate(reports, 1):
            trial.report(each, epoch)
        study.tell(trial, value, state)
    return study


def test_reports_are_carried_forward_and_a_failed_trial_counts_as_the_worst():
    stopped, complete, failed = TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL
    study = reported(([0.1, 0.3, 0.5, 0.7], stopped, None), ([0.2], stopped, None), ([0.6, 0.75], complete, 0.75), ([], failed, None))
    points, values, left = observations(study.trials, Cube(SPACE))
    assert points.shape == (5, 2)  # of the first trial, the reports after two and four epochs
    assert values == pytest.approx([0.7, 0.7, 0.775, 0.75, 0.7])  # mean gains: 0.175, 0.2, 0.2
    assert left == pytest.approx([0.5, 0, 0.75, 0, 0])  # the third trial had fewer epochs


def test_how_bad_a_bad_trial_is_does_not_count():
    study = reported(*(([value], TrialState.COMPLETE, value) for value in (0.5, 0.51, 0.52, 0.0)))
    assert observations(study.trials, Cube(SPACE))[1] == pytest.approx([0.5, 0.51, 0.52, 0.505 - sampler.TAIL * 0.015])


def test_settings_that_learn_slowly_are_found():
    """Small rates are behind until the end, and two trials in three are stopped after the first of four epochs."""

    def height(params, epoch):
        return 0.5 - 0.3 * place(params) if epoch == 4 else 0.1 * epoch + 0.2 * place(params)

    study = optuna.create_study(direction="maximize")
    for number in range(24):
        trial = draw(study, number)
        for epoch in range(1, 2 if number % 3 else 5):
            trial.report(height(trial.params, epoch), epoch)
        study.tell(trial, state=TrialState.PRUNED)
    assert np.mean([place(trial.params) for trial in study.trials[16:]]) < 0.3


def test_expected_improvement_is_the_mean_of_what_is_above():
    values = np.random.default_rng(0).normal(0.1, 0.5, 10**6)
    assert math.exp(log_expected_improvement(np.array([0.1]), np.array([0.5]))[0]) == pytest.approx(np.maximum(values, 0).mean(), rel=0.01)
    far = log_expected_improvement(np.array([-5.0, -4.0]), np.array([0.5, 0.5]))
    assert far[0] < far[1]
    assert far[1] == pytest.approx(math.log(0.5 * (norm.pdf(8) - 8 * norm.cdf(-8))))


def test_a_space_without_a_choice_is_drawn():
    study = search(lambda params: 0.5, 4, space=read_space({"model.dilation": {"choice": [True]}}), startup=2)
    assert [trial.params for trial in study.trials] == [{"model.dilation": True}] * 4


def started(study, count, reports=()):
    """Start trials of random settings, which report some values and stay running, or are paused."""
    for _ in range(count):
        trial = study.ask(SPACE.distributions)
        for epoch, value in enumerate(reports, 1):
            trial.report(value, epoch)
        if reports:
            trial.set_user_attr(PAUSED, len(reports))


def test_where_few_trials_run_every_second_draw_is_that_of_tpe():
    """To which a paused trial has been stopped."""
    study, stopped = optuna.create_study(direction="maximize"), optuna.create_study(direction="maximize")
    for each in (study, stopped):
        each.sampler = optuna.samplers.RandomSampler(seed=1)
    started(study, 12, reports=[0.1, 0.2])
    for trial in study.trials:
        at_rung = ended(trial)
        at_rung.datetime_complete = trial.datetime_start  # Optuna demands one
        stopped.add_trial(at_rung)
    drawn = [draw(study, number, density=TPESampler(seed=number, n_startup_trials=5, multivariate=True)) for number in (12, 13)]
    stopped.sampler = TPESampler(seed=12, n_startup_trials=5, multivariate=True)
    assert drawn[0].params == stopped.ask(SPACE.distributions).params
    alone = optuna.create_study(direction="maximize")
    alone.add_trials(study.trials[:13])
    assert drawn[1].params == draw(alone, 13).params  # the model's


@pytest.mark.parametrize(("running", "by_tpe"), [(sampler.FEW - 1, True), (sampler.FEW, False)])
def test_where_more_trials_run_the_model_draws(running, by_tpe):
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))
    started(study, 20 - running, reports=[0.1, 0.2])
    started(study, running)
    alone = draw(copy.deepcopy(study), 20).params
    assert (draw(study, 20, density=TPESampler(seed=3, n_startup_trials=5, multivariate=True)).params != alone) is by_tpe
