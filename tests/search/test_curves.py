import numpy as np
import optuna
import pytest

from raydetr.search.curves import carried_forward, curve_table

NAN = float("nan")


def test_reports_become_a_row_for_each_trial():
    study = optuna.create_study()
    for reports in ({1: 0.1, 2: 0.2, 4: 0.4}, {1: 0.3}, {}):
        trial = study.ask()
        for epoch, value in reports.items():
            trial.report(value, epoch)
    table = curve_table(study.trials)
    assert table == pytest.approx(np.array([[0.1, 0.2, NAN, 0.4], [0.3, NAN, NAN, NAN], [NAN] * 4]), nan_ok=True)
    assert curve_table([]).shape == (0, 0)


def test_a_trial_gains_what_the_others_gained_from_there_on():
    found = carried_forward(np.array([[0.1, 0.3, 0.5, 0.6], [0.1, 0.2, 0.4, NAN], [0.2, NAN, NAN, NAN], [0.0, NAN, 0.3, NAN]]))
    # Mean gains: 0.15 (two trials), 0.2 (two trials), 0.1.
    assert found == pytest.approx(
        np.array([[0.55, 0.6, 0.6, 0.6], [0.55, 0.5, 0.5, NAN], [0.65, NAN, NAN, NAN], [0.45, NAN, 0.4, NAN]]), nan_ok=True
    )
