import os
import signal
import threading

import pytest

from raydetr.launch.signals import Interrupted, ending_signals, interruptible, kept_handlers

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


def send(number):
    """Get that signal, here and now."""
    os.kill(os.getpid(), number)
    threading.Event().wait(10)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_each_signal_ends_with_how_to_resume_and_its_own_exit_code(number, code):
    before = [signal.getsignal(each) for each, _ in SIGNALS]
    with pytest.raises(Interrupted, match="resume it") as caught, interruptible(lambda: "resume it"):
        send(number)
    assert caught.value.exit_code == code
    assert [signal.getsignal(each) for each, _ in SIGNALS] == before


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interruptible(lambda: ""):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_signal_asks_for_an_end_in_order_and_the_second_ends_at_once():
    asked = []
    with ending_signals(end=lambda: asked.append(True)) as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (received.number, asked) == (signal.SIGTERM, [True])
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert received.number == signal.SIGTERM


def test_handlers_that_a_library_replaces_come_back():
    with ending_signals() as received:
        with kept_handlers():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init does
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert received.number == signal.SIGTERM


def test_beside_the_main_thread_nothing_is_handled():
    seen = []

    def run():
        with interruptible(lambda: ""):
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
