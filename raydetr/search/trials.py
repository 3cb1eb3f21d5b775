"""The display of a running search: a live table of its trials, or without a terminal a line for each trial that ends or is paused."""

import math
import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raydetr.search.halving import is_paused
from raydetr.search.record import epochs_of, is_better_lower, objective, objective_text, state_of
from raydetr.search.results import objectives_of
from raydetr.search.study import Search
from raydetr.text import count
from raydetr.training.console import clock

SHOWN = 20  # rows: the running trials, then the best of the others
SHOW_INTERVAL_S = 0.5  # between two updates: while the study is read, Ray Tune's loop handles no result


class TrialsDisplay:
    """Show the trials of a search while it runs. Use it as a context manager, which restores the terminal at its end.

    Args:
        search: The search.
        console: Where to show the trials; a terminal gets a live table.
    """

    def __init__(self, search: Search, console: Console):
        self.search, self.console = search, console
        self.last: dict[int, Mapping[str, Any]] = {}  # the last result of each trial
        ended = self._ended()
        self.began, self.ended_before, self.told = time.monotonic(), len(ended), set(map(_how, ended))
        self.shown_at = -math.inf
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        self._show()
        if self.live:
            self.live.stop()

    def epoch(self, number: int, result: Mapping[str, Any]) -> None:
        """Show that a trial has finished an epoch with this result."""
        self.last[number] = result
        self.refresh()

    def refresh(self) -> None:
        """Show the current state of the study, at most every ``SHOW_INTERVAL_S`` seconds."""
        if time.monotonic() - self.shown_at >= SHOW_INTERVAL_S:
            self._show()
            self.shown_at = time.monotonic()

    def _show(self) -> None:
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        ended, best = self._ended(), self.search.best()
        for trial in ended:
            if _how(trial) not in self.told:
                self.told.add(_how(trial))
                self.console.print(self.line(trial, best, len(ended)), markup=False, soft_wrap=True)

    def line(self, trial: FrozenTrial, best: FrozenTrial | None, ended: int) -> str:
        """Return one line about how a trial ended, or where it was paused.

        Args:
            trial: The trial.
            best: The best trial so far, None if there is none.
            ended: The number of trials that have ended or are paused.
        """
        state = state_of(trial)
        if state == "failed":
            how = trial.user_attrs.get("reason", "unknown reason")
        else:
            values = (f"{name} {_shown(name, value)}" for name, value in objectives_of(self.search, trial).items())
            how = f"{', '.join(values)} in {count(epochs_of(trial), 'epoch')}"
        so_far = f"; best so far {_number(objective(best))} in trial {best.number}" if best else ""
        return f"{ended}/{self._total(ended)} {self.search.trial_name(trial.number)} {state}: {how}{so_far}, {self._left(ended)} left"

    def table(self) -> Table:
        """Return a table of the running trials, followed by the best of those that ended or are paused."""
        best = self.search.best()
        ended = len(self._ended())
        how = "ended or paused" if self.search.scheduler == "promote" else "ended"
        title = f"{ended} of {count(self._total(ended), 'trial')} {how}, {self._left(ended)} left"
        names = self.search.space.names
        table = Table("trial", "state", "epoch", self.search.metric, "best", *(name.split(".")[-1] for name in names), title=title)
        running = [trial for trial in self.search.frozen() if trial.state == TrialState.RUNNING and not is_paused(trial)]
        for trial in [*running, *self.search.ranked()][:SHOWN]:
            last = self.last.get(trial.number, {})
            drawn = self.search.settings(trial.number)
            values = [_number(drawn.get(name)) for name in names]
            style = "bold" if best and trial.number == best.number else None
            state, epoch = state_of(trial), str(epochs_of(trial))
            highest = max(trial.intermediate_values.values(), default=None)
            reached = _number(last.get(self.search.metric)), _number(highest)
            table.add_row(str(trial.number), state, epoch, *reached, *values, style=style)
        return table

    def _ended(self) -> list[FrozenTrial]:
        """The trials that have ended or are paused: most of those are not promoted."""
        return [trial for trial in self.search.frozen() if trial.state.is_finished() or is_paused(trial)]

    def _total(self, ended: int) -> int:
        """The number of trials there will be: a resumed search may have been asked for fewer than it already has."""
        started = sum(trial.state != TrialState.WAITING for trial in self.search.frozen())
        return max(self.search.trials, started, ended)

    def _left(self, ended: int) -> str:
        """The estimated time left, from the time that the trials took since this process began."""
        left = self._total(ended) - ended
        if left == 0:
            return clock(0)
        if ended <= self.ended_before:
            return "?"
        return clock((time.monotonic() - self.began) / (ended - self.ended_before) * left)


def _how(trial: FrozenTrial) -> tuple[int, int, str]:
    """What is told of a trial once: a promoted one is told again, but not that it stays as it was paused."""
    return trial.number, epochs_of(trial), state_of(trial).replace("paused", "pruned")


def _shown(name: str, value: float | None) -> str:
    return objective_text(name, value) if is_better_lower(name) else _number(value)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
