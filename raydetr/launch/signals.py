"""Ctrl-C, SIGTERM (systemd, `ray job stop`, `scancel`) and SIGHUP (a closed terminal): each ends a run or a search in order."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A run or a search was ended by a signal.

    Args:
        message: How to resume; may be empty.
        signal_number: Which signal it was.
        search: The :class:`raydetr.search.study.Search` that was ended, if it had begun.
    """

    def __init__(self, message: str = "", signal_number: int = signal.SIGINT, search: Any = None):
        super().__init__(message)
        self.search = search
        self.exit_code = 128 + signal_number  # what a shell reports for a process that the signal ended


class Received:
    """Which signal was received within :func:`ending_signals`; ``number`` is None before one was."""

    number: int | None = None


@contextlib.contextmanager
def ending_signals(end: Callable[[], None] | None = None) -> Iterator[Received]:
    """Handle the signals that end a run or a search; yields a record of the one that was received.

    A signal that was ignored before stays ignored (``nohup``). Outside the main thread, where Python allows no handlers, this does
    nothing.

    Args:
        end: Called for the first signal, to end in order what runs within; for another one, and where there is no ``end``, the
            signal raises :class:`KeyboardInterrupt`.
    """
    received = Received()

    def handle(number: int, _frame: FrameType | None) -> None:
        first, received.number = received.number is None, received.number or number
        if end and first:
            end()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            os.kill(os.getpid(), signal.SIGINT)  # Ray Train has a handler of its own for this one while it runs

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number in handled:
            signal.signal(number, before[number])


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Restore the handlers of the ending signals afterwards: ``ray.init`` replaces that of SIGTERM."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # else it is no handler of Python's
                    signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(how_to_resume: Callable[[], str]) -> Iterator[Received]:
    """Make Ctrl-C, SIGTERM and SIGHUP within raise :class:`Interrupted` with ``how_to_resume()``; yields which of them was received."""
    with ending_signals() as received:
        try:
            yield received
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(how_to_resume(), received.number or signal.SIGINT) from None
