import optuna
import pytest

from raydetr.search.halving import PAUSED, PROMOTED, RungPruner, is_paused, last_rung, next_promotion


def study_of(*curves):
    """A study whose running trials have these reports from epoch 1 on."""
    study = optuna.create_study(direction="maximize")
    for curve in curves:
        trial = study.ask()
        for epoch, value in enumerate(curve, 1):
            trial.report(value, epoch)
    return study


def stopped(study):
    pruner = RungPruner(grace=2, spacing=3, passing=3, again=True)
    return [pruner.prune(study, trial) for trial in study.get_trials()]


def test_the_best_third_of_a_rung_goes_on():
    assert stopped(study_of(*([value, value] for value in (0.1, 0.6, 0.3, 0.5, 0.2, 0.4)))) == [True, False, True, False, True, True]


def test_nothing_is_stopped_before_the_grace():
    assert stopped(study_of([0.1], [0.9], [0.8], [0.7])) == [False] * 4


def test_a_trial_that_passed_alone_is_stopped_when_others_overtake_it():
    assert stopped(study_of([0.1, 0.2, 0.3])) == [False]
    assert stopped(study_of([0.1, 0.2, 0.3], [0.2, 0.3], [0.2, 0.4])) == [True, True, False]


def test_trials_are_compared_at_the_last_rung_that_they_have_reached():
    """A trial at the second rung, epoch 6, does not lose against what others had at the first."""
    late = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert stopped(study_of(late, [0.4, 0.5], [0.4, 0.6], [0.4, 0.7]))[0] is False
    assert stopped(study_of(late, [0.5] * 5 + [0.7], [0.5] * 5 + [0.8]))[0] is True


def test_a_gap_in_the_reports_counts_as_the_value_before(monkeypatch):
    study = study_of([0.5])
    trial = study.ask()
    trial.report(0.4, 1)
    trial.report(0.9, 3)
    assert stopped(study) == [False, False]
    for value in (0.45, 0.42):
        other = study.ask()
        other.report(value, 1)
        other.report(value, 2)
    assert stopped(study)[1] is True  # 0.4 at epoch 2


def test_the_better_half_passes_when_asked_once():
    study = study_of(*([value, value] for value in (0.1, 0.6, 0.3, 0.5, 0.2, 0.4)))
    pruner = RungPruner(grace=2, spacing=3, passing=2)
    assert [pruner.prune(study, trial) for trial in study.get_trials()] == [True, False, True, False, True, False]
    later = study_of([0.1, 0.2, 0.3], [0.1, 0.3], [0.1, 0.4])
    assert [pruner.prune(later, trial) for trial in later.get_trials()] == [False, True, False]  # the first was alone at the rung


@pytest.mark.parametrize("reports", [0, 1])
def test_a_trial_without_enough_reports_goes_on(reports):
    assert stopped(study_of([0.1] * reports)) == [False]


def promoted(study, passing=2):
    return next_promotion(study.get_trials(), passing)


def pause(study, *numbers):
    """Pause running trials after their last report."""
    for trial in study.get_trials():
        if trial.number in numbers:
            optuna.Trial(study, trial._trial_id).set_user_attr(PAUSED, trial.last_step)


def promote(study, number):
    optuna.Trial(study, study.trials[number]._trial_id).set_user_attr(PROMOTED, study.trials[number].user_attrs[PAUSED])


def test_the_better_half_of_a_rung_is_promoted_the_best_first():
    study = study_of(*([value, value] for value in (0.1, 0.6, 0.3, 0.5, 0.2)))
    pause(study, 0, 1, 2, 3, 4)
    order = []
    while (number := promoted(study)) is not None:
        order.append(number)
        promote(study, number)
    assert order == [1, 3]
    assert [is_paused(trial) for trial in study.trials] == [True, False, True, False, True]


def test_who_is_alone_at_a_rung_waits_and_passes_when_a_worse_one_comes():
    study = study_of([0.1, 0.2])
    pause(study, 0)
    assert promoted(study) is None
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)  # without a report it has come to no rung
    assert promoted(study) is None
    worse = study.ask()
    for epoch in (1, 2):
        worse.report(0.1, epoch)
    assert promoted(study) == 0


def test_the_last_rung_comes_first():
    late = [0.3] * 6
    study = study_of(late, [0.2] * 6, [0.9, 0.9], [0.1, 0.1])
    pause(study, 0, 1, 2, 3)
    assert promoted(study) == 0
    promote(study, 0)
    assert promoted(study) == 2  # at the first rung it is the best of four


def test_trials_that_trained_on_or_ended_count_at_the_rungs_that_they_passed():
    study = study_of([0.9] * 4, [0.8] * 4, [0.5, 0.5], [0.1, 0.1])
    pause(study, 2, 3)
    assert promoted(study) is None  # the better half of the rung are the two that have passed it


@pytest.mark.parametrize(("epoch", "rung"), [(1, 0), (2, 2), (5, 2), (6, 6), (17, 6), (18, 18), (60, 54)])
def test_rungs_are_a_factor_apart(epoch, rung):
    assert last_rung(epoch, grace=2, spacing=3) == rung
