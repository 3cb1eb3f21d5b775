"""Successive halving for searches with few trials at a time, and for those in which many trials start at the same time."""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

# User attributes of a trial: the rungs at which it was paused and promoted last. Optuna has no state for a paused trial, which runs for it.
PAUSED, PROMOTED = "paused after", "promoted after"


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
        rung = last_rung(reached, self.grace, self.spacing)
        own = value_at(trial, rung) if rung else None
        if own is None or (reached > rung and not self.again):
            return False
        values = sorted(value for each in study.get_trials(deepcopy=False) if (value := value_at(each, rung)) is not None)
        return own < values[-max(1, len(values) // self.passing)]


def last_rung(epoch: int, grace: int, spacing: int) -> int:
    """Return the last rung up to an epoch, as the epochs that it is at; 0 before the first one.

    Args:
        epoch: The epoch, from 1.
        grace: The first rung.
        spacing: Each rung is at so many times the epochs of the one before.
    """
    if epoch < grace:
        return 0
    rung = grace
    while rung * spacing <= epoch:
        rung *= spacing
    return rung


def is_paused(trial: FrozenTrial) -> bool:
    """Return whether a trial is paused at a rung, where it waits for its promotion.

    Args:
        trial: The trial.
    """
    known = trial.user_attrs
    return trial.state == TrialState.RUNNING and known.get(PAUSED, 0) > known.get(PROMOTED, 0)


def next_promotion(trials: Sequence[FrozenTrial], passing: int) -> int | None:
    """Return the paused trial that trains on next: the best one, at the last rung that has any to promote.

    This is the promotion of asynchronous successive halving (Li et al. 2020, algorithm 2). No trial passes a rung because nobody is there
    to compare it with, and one that did not pass does so when enough others turn out to be worse.

    Args:
        trials: All trials of the search.
        passing: One of so many trials that have reached a rung passes it.

    Returns:
        The number of the trial; None if no paused trial is among the best of its rung.
    """
    paused = {trial.number: trial.user_attrs[PAUSED] for trial in trials if is_paused(trial)}
    for rung in sorted(set(paused.values()), reverse=True):
        for number in best_of_rung(trials, rung, passing):
            if paused.get(number) == rung:
                return number
    return None


def best_of_rung(trials: Sequence[FrozenTrial], rung: int, passing: int) -> list[int]:
    """Return the numbers of the trials that pass a rung, the best first.

    Args:
        trials: All trials of the search.
        rung: The epochs that the rung is at.
        passing: One of so many trials that have reached it passes.
    """
    reached = {trial.number: value for trial in trials if (value := value_at(trial, rung)) is not None}
    return sorted(reached, key=lambda number: (-reached[number], number))[: len(reached) // passing]


def value_at(trial: FrozenTrial, epoch: int) -> float | None:
    """The objective after an epoch, or after the last one before it that has a report; None if the trial has not come so far."""
    known = trial.intermediate_values
    if epoch in known:
        return known[epoch]
    before = [value for step, value in known.items() if step < epoch]
    return max(before) if before and len(before) < len(known) else None
