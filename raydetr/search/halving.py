"""Successive halving for searches with few trials at a time, and for those in which many trials start at the same time."""

import optuna
from optuna.trial import FrozenTrial


class RungPruner(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) with the share of trials that pass a rung as a setting of its own.

    A trial passes a rung if it is among the best of those that have reached it, by the objective that each had there. ASHA asks once,
    when the trial reaches the rung. Of many trials that start together, the first then pass because nobody is there to compare them
    with; with ``again`` they are stopped as soon as enough others have overtaken them.

    Args:
        grace: The first epoch after which a trial may be stopped, which is the first rung.
        spacing: Each rung is at so many times the epochs of the one before.
        passing: One of so many trials passes a rung.
        again: Whether to decide again after every epoch that follows a rung.
    """

    def __init__(self, grace: int, spacing: int, passing: int, again: bool = False) -> None:
        self.grace, self.spacing, self.passing, self.again = grace, spacing, passing, again

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop a trial."""
        reached = trial.last_step or 0
        if reached < self.grace:
            return False
        rung = self.grace
        while rung * self.spacing <= reached:
            rung *= self.spacing
        own = _value_at(trial, rung)
        if own is None or (reached > rung and not self.again):
            return False
        values = sorted(value for each in study.get_trials(deepcopy=False) if (value := _value_at(each, rung)) is not None)
        return own < values[-max(1, len(values) // self.passing)]


def _value_at(trial: FrozenTrial, epoch: int) -> float | None:
    """The objective after an epoch, or after the last one before it that has a report; None if the trial has not come so far."""
    known = trial.intermediate_values
    if epoch in known:
        return known[epoch]
    before = [value for step, value in known.items() if step < epoch]
    return max(before) if before and len(before) < len(known) else None
