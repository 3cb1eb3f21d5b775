"""The terminal output of a training run: a progress bar and a small table per epoch, or plain lines if the output is not a terminal.

A run describes its progress in events, dicts of plain data with a ``kind``:

- ``message``: ``text``, a line to print;
- ``start``: ``epochs``, ``steps`` (optimizer steps in an epoch), ``done`` (epochs finished before);
- ``step``: ``epoch`` (from 1), ``step`` (in the epoch, from 1), ``loss``, ``images_per_second``; some steps may be left out;
- ``evaluate``: ``epoch``, whose evaluation starts;
- ``epoch``: ``epoch``, ``metrics`` (as ``fit`` reports them), ``seconds``, ``best`` (whether it is the best so far);
- ``end``: ``epochs`` (finished), ``best_AP``, ``best_epoch``, ``checkpoint``; the last event.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded late: a worker whose reporter shows nothing does not need rich
    from rich.console import Console
    from rich.progress import Progress

from raydetr.text import count

PLAIN_INTERVAL_S = 10.0  # between two lines about steps if the output is not a terminal

# The columns of an epoch's table: heading, and name among the metrics. Those of metrics that a run does not have are left out.
COLUMNS = (
    ("train loss", "train_loss"),
    ("val loss", "val_loss"),
    ("AP", "AP"),
    ("AP50", "AP50"),
    ("AP75", "AP75"),
    ("AR100", "AR100"),
    ("mask AP", "segm_AP"),
)


class Display:
    """Shows events as they come. It is a context manager, which restores the terminal however the run ends.

    If the terminal fails (a closed pipe, a lost connection, an encoding without the characters), a warning on stderr says so and nothing
    more is shown.

    Args:
        console: Where to show events; default: the standard output.
    """

    def __init__(self, console: "Console | None" = None):
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._epochs = self._steps = self._done = 0
        self._began = self._last_line = time.monotonic()
        self._failed = False

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar."""
        with self._warning_once():
            self._stop_progress()

    def _stop_progress(self) -> None:
        progress, self._progress = self._progress, None
        if progress:
            progress.stop()

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit):
                if not isinstance(error.__context__, BrokenPipeError):
                    raise
                error = error.__context__  # rich turns a broken pipe into SystemExit
            if not self._failed:
                warn(f"warning: the terminal: {error}; nothing more is shown, the training continues")
            self._failed = True

    def show(self, event: dict[str, Any]) -> None:
        """Show an event. After a failure of the terminal, this does nothing.

        Args:
            event: One of the events that this module describes.
        """
        handlers = {
            "message": self._message,
            "start": self._start,
            "step": self._step,
            "evaluate": self._evaluate,
            "epoch": self._epoch,
            "end": self._end,
        }
        if not self._failed:
            with self._warning_once():
                handlers[event["kind"]](event)

    def _message(self, event: dict[str, Any]) -> None:
        self.console.print(event["text"], markup=False, soft_wrap=True)

    def _start(self, event: dict[str, Any]) -> None:
        self._stop_progress()  # a worker that was lost and replaced starts again
        self._epochs, self._steps, self._done = event["epochs"], event["steps"], event["done"]
        self._began = self._last_line = time.monotonic()
        if not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = [TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.fields[numbers]}")]
        columns += [TimeRemainingColumn(compact=True), TextColumn("left")]
        self._progress = Progress(*columns, console=self.console, transient=True, speed_estimate_period=600, expand=True)
        total, completed = self._epochs * self._steps, self._done * self._steps
        self._progress.add_task(self._which(self._done + 1), total=total, completed=completed, numbers="")
        self._progress.start()

    def _step(self, event: dict[str, Any]) -> None:
        steps = (event["epoch"] - 1) * self._steps + event["step"]
        numbers = f"loss {event['loss']:.3f}, {event['images_per_second']:.1f} images/s"
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=steps, description=self._which(event["epoch"]), numbers=numbers)
        elif time.monotonic() - self._last_line > PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self._plain(f"{self._which(event['epoch'])}, step {event['step']}/{self._steps}: {numbers}, {self._left(steps)} left")

    def _evaluate(self, event: dict[str, Any]) -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], description=f"{self._which(event['epoch'])}, evaluating")

    def _epoch(self, event: dict[str, Any]) -> None:
        metrics, took = event["metrics"], clock(event["seconds"])
        columns = [(heading, _number(metrics[name])) for heading, name in COLUMNS if name in metrics]
        speed = f"{metrics['images_per_second']:.1f}"
        if self.console.is_terminal:
            from rich.table import Table

            headings, numbers = zip(*columns, strict=True)
            table = Table("epoch", *headings, "images/s", "time", box=None, pad_edge=False, padding=(0, 3, 0, 0))
            table.add_row(f"{event['epoch']}/{self._epochs}{' *' if event['best'] else ''}", *numbers, speed, took)
            self.console.print(table)
            return
        numbers = ", ".join(f"{heading} {number}" for heading, number in columns)
        best, left = " (best so far)" if event["best"] else "", self._left(event["epoch"] * self._steps)
        self._plain(f"{self._which(event['epoch'])}: {numbers}{best}, {speed} images/s, {took}, {left} left")
        self._last_line = time.monotonic()

    def _end(self, event: dict[str, Any]) -> None:
        self._stop_progress()
        best = f"best AP {_number(event['best_AP'])} in epoch {event['best_epoch']}"
        self._plain(f"{count(event['epochs'], 'epoch')} finished, {best}: {event['checkpoint']}")

    def _plain(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def _which(self, epoch: int) -> str:
        return f"epoch {epoch}/{self._epochs}"

    def _left(self, steps: int) -> str:
        """Return the time left at the average speed since the start."""
        taken = steps - self._done * self._steps
        return clock((time.monotonic() - self._began) / max(taken, 1) * (self._epochs * self._steps - steps))


def warn(text: str) -> None:
    """Print a line on stderr. If stderr fails as well, this does nothing.

    Args:
        text: The line.
    """
    with contextlib.suppress(OSError, ValueError):  # the same terminal may be gone
        print(text, file=sys.stderr, flush=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Return a duration as ``2:03`` (minutes and seconds) or ``1:02:03`` (with hours).

    Args:
        seconds: The duration in seconds, which is rounded.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
