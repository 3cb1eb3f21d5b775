"""Shut a run or a search down gracefully at Ctrl-C, SIGTERM (systemd, `ray job stop`, `scancel`) or SIGHUP (a closed terminal)."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ended a run or a search.

    Args:
        message: How to resume; may be empty.
        signal_number: Which signal it was.
        search: The :class:`raydetr.search.study.Search` that was ended, if it had begun.

    Attributes:
        exit_code: 128 plus the number of the signal, which is what a shell reports for a process that the signal ended.
    """

    def __init__(self, message: str = "", signal_number: int = signal.SIGINT, search: Any = None):
        super().__init__(message)
        self.search = search
        self.exit_code = 128 + signal_number


class Received:
    """A record of the signal that was received in a context of :func:`ending_signals`.

    Attributes:
        number: Number of the first signal, or None if there was none.
    """

    number: int | None = None


@contextlib.contextmanager
def ending_signals(end: Callable[[], None] | None = None) -> Iterator[Received]:
    """Handle the signals that end a run or a search while the context is active.

    A signal that was ignored before stays ignored (``nohup``). Outside the main thread, where Python allows no handlers, this does nothing.

    Args:
        end: Called for the first signal, to end gracefully what runs within the context. Any further signal, and the first one without
            ``end``, raises :class:`KeyboardInterrupt`.

    Yields:
        A record of the first signal that was received.
    """
    received = Received()

    def handle(number: int, _frame: FrameType | None) -> None:
        first, received.number = received.number is None, received.number or number
        if end and first:
            end()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            os.kill(os.getpid(), signal.SIGINT)  # while Ray Train runs, it handles this signal itself

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
    """Restore the handlers of the signals in ``ENDING`` at the end of the context, because ``ray.init`` replaces the handler of SIGTERM."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: the handler was not installed by Python, which cannot restore it
                    signal.signal(number, handler)


@contextlib.contextmanager
def interruptible(how_to_resume: Callable[[], str]) -> Iterator[Received]:
    """Turn Ctrl-C, SIGTERM and SIGHUP within the context into :class:`Interrupted`.

    Args:
        how_to_resume: Called when a signal was received; returns the exception's message.

    Yields:
        A record of the first signal that was received.

    Raises:
        Interrupted: A signal was received.
    """
    with ending_signals() as received:
        try:
            yield received
        except Interrupted:
            raise
        except KeyboardInterrupt:
            raise Interrupted(how_to_resume(), received.number or signal.SIGINT) from None
