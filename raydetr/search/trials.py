"""What a search shows while it runs: one live table of its trials; a line per trial that ends where there is no terminal."""

import math
import time
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raydetr.search.study import STATE_NAMES, Search, epochs_of
from raydetr.training.console import clock

SHOWN = 20  # rows: the running trials, then the best ended ones
SHOW_INTERVAL_S = 0.5  # between two looks at the study: Ray Tune's loop, which calls for them, hears no trial meanwhile


class TrialsDisplay:
    """Shows the trials of ``search``. A context manager: leaving it gives the terminal back."""

    def __init__(self, search: Search, console: Console):
        self.search, self.console = search, console
        self.last: dict[int, Mapping[str, Any]] = {}  # each trial's last epoch
        self.began, self.ended_before = time.monotonic(), len(self._ended())
        self.told = set(self._ended())
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
        """A trial has finished an epoch."""
        self.last[number] = result
        self.refresh()

    def refresh(self) -> None:
        """Show what the study says, unless that was done a moment ago; what is passed over is shown the next time or at the end."""
        if time.monotonic() - self.shown_at >= SHOW_INTERVAL_S:
            self._show()
            self.shown_at = time.monotonic()

    def _show(self) -> None:
        if self.live:
            self.live.update(self.table(), refresh=True)
            return
        ended, best = self._ended(), self.search.best()
        for number in sorted(set(ended) - self.told):
            self.told.add(number)
            self.console.print(self.line(self.search.frozen()[number], best, len(ended)), markup=False, soft_wrap=True)

    def line(self, trial: FrozenTrial, best: FrozenTrial | None, ended: int) -> str:
        """How a trial ended, in words; ``ended`` trials have, the ``best`` of them is told beside it."""
        state = STATE_NAMES[trial.state]
        how = (
            trial.user_attrs["reason"] if state == "failed" else f"{self.search.metric} {_number(trial.value)} in {epochs_of(trial)} epochs"
        )
        so_far = f"; best so far {_number(best.value)} in trial {best.number}" if best else ""
        done = f"{ended}/{self.search.trials}"
        return f"{done} {self.search.trial_name(trial.number)} {state}: {how}{so_far}, {self._left(ended)} left"

    def table(self) -> Table:
        """Running trials first, then the best."""
        best = self.search.best()
        ended = len(self._ended())
        title = f"{ended} of {self.search.trials} trials ended, {self._left(ended)} left"
        names = self.search.space.names
        table = Table("trial", "state", "epoch", self.search.metric, "best", *(name.split(".")[-1] for name in names), title=title)
        running = [trial for trial in self.search.frozen() if trial.state == TrialState.RUNNING]
        for trial in [*running, *self.search.ranked()][:SHOWN]:
            last = self.last.get(trial.number, {})
            drawn = self.search.settings(trial.number)
            values = [_number(drawn.get(name)) for name in names]
            highest = max(trial.intermediate_values.values(), default=None)
            style = "bold" if best and trial.number == best.number else None
            state, epoch = STATE_NAMES[trial.state], str(epochs_of(trial))
            table.add_row(str(trial.number), state, epoch, _number(last.get(self.search.metric)), _number(highest), *values, style=style)
        return table

    def _ended(self) -> list[int]:
        return [trial.number for trial in self.search.frozen() if trial.state.is_finished()]

    def _left(self, ended: int) -> str:
        """The time left, as the trials since the start took it."""
        if ended == self.ended_before:
            return "?"
        return clock((time.monotonic() - self.began) / (ended - self.ended_before) * (self.search.trials - ended))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
