"""Successive halving that asks again as evidence comes in, for searches in which many trials start at the same time."""

import optuna
from optuna.trial import FrozenTrial


class EvidencePruner(optuna.pruners.BasePruner):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) whose decisions are made again after every epoch.

    A trial may go on while it is among the best of those that have reached its last rung, by the objective that each had there. ASHA
    asks once, when the trial reaches the rung: of many trials that start together, the first pass because nobody is there to compare
    them with. Here they are stopped as soon as enough others have overtaken them.

    Args:
        grace: The first epoch after which a trial may be stopped, which is the first rung.
        reduction: One of so many trials passes a rung, and each rung is at so many times the epochs of the one before.
    """

    def __init__(self, grace: int, reduction: int) -> None:
        self.grace, self.reduction = grace, reduction

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether to stop a trial."""
        reached = trial.last_step or 0
        if reached < self.grace:
            return False
        rung = self.grace
        while rung * self.reduction <= reached:
            rung *= self.reduction
        own = _value_at(trial, rung)
        values = sorted(value for each in study.get_trials(deepcopy=False) if (value := _value_at(each, rung)) is not None)
        return own is not None and own < values[-max(1, len(values) // self.reduction)]


def _value_at(trial: FrozenTrial, epoch: int) -> float | None:
    """The objective after an epoch, or after the last one before it that has a report; None if the trial has not come so far."""
    known = trial.intermediate_values
    if epoch in known:
        return known[epoch]
    before = [value for step, value in known.items() if step < epoch]
    return max(before) if before and len(before) < len(known) else None
