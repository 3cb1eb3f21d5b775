"""What the learning curve of a trial says about the objective that it would have at the end."""

from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial


def curve_table(trials: Sequence[FrozenTrial]) -> np.ndarray:
    """Return the reported objective [trials, epochs] after every epoch, NaN where there is no report.

    The table ends at the last epoch that any trial has reported.
    """
    table = np.full((len(trials), max((trial.last_step or 0 for trial in trials), default=0)), np.nan)
    for row, trial in zip(table, trials, strict=True):
        row[[epoch - 1 for epoch in trial.intermediate_values]] = list(trial.intermediate_values.values())
    return table


def carried_forward(table: np.ndarray) -> np.ndarray:
    """Return the objective [trials, epochs] that each report lets expect at the last epoch, NaN where there is no report.

    From each epoch on, a trial gains what the trials that went further gained on average.

    Args:
        table: As :func:`curve_table` returns it.
    """
    gains = np.diff(table, axis=1)
    known = np.isfinite(gains)
    mean_gain = np.where(known, gains, 0).sum(0) / np.maximum(known.sum(0), 1)
    return table + np.append(mean_gain[::-1].cumsum()[::-1], 0.0)
