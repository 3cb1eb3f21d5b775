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


def final_values(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the expected objective [trials] at the last epoch, and the share [trials] of the epochs that each trial has left.

    From its last report on, a trial gains per epoch what the trials that went further gained on average.

    Args:
        table: As :func:`curve_table` returns it, with at least one report in each row.
    """
    trials, epochs = table.shape
    gains = np.diff(table, axis=1)
    known = np.isfinite(gains)
    mean_gain = np.where(known, gains, 0).sum(0) / np.maximum(known.sum(0), 1)
    still_to_gain = np.append(mean_gain[::-1].cumsum()[::-1], 0.0)  # after each epoch
    last = epochs - 1 - np.isfinite(table)[:, ::-1].argmax(1)
    return table[np.arange(trials), last] + still_to_gain[last], (epochs - 1 - last) / epochs
