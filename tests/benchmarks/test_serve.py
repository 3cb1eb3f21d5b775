import re
import sys

import pytest

from benchmarks import serve


def test_percentiles_are_of_what_was_answered():
    replies = [serve.Reply(200, seconds / 1000, False) for seconds in range(1, 101)] + [serve.Reply(503, 9, True)]
    assert serve.percentile(replies, 0.5) == "50 ms"
    assert serve.percentile(replies, 0.99) == "99 ms"
    assert serve.percentile(replies[-1:], 0.5) == "none"


def test_larger_batches_are_tried_while_the_rate_rises(monkeypatch):
    rates = {1: 10.0, 2: 12.0, 4: 11.0, 8: 99.0}
    monkeypatch.setattr(serve, "loop_rate", lambda _predictor, _images, size, _seconds: rates[size])
    assert serve.best_batch_size(None, [], (1, 2, 4, 8), 1) == 2
    assert serve.best_batch_size(None, [], (1, 2), 1) == 2


@pytest.mark.slow
def test_the_command_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks.serve", "--quick"])
    serve.main()
    shown = capsys.readouterr().out
    assert "| one image in a request" in shown
    assert "| a zip of 16" in shown
    assert "each 503 with Retry-After" in shown
    assert "no answer" not in shown
    refused = dict(re.findall(r"^\| (\S.*?) +\| (4\d\d) +\|$", shown, re.MULTILINE))
    assert refused == {name: refused[name] for name in serve.bad_uploads()}
    assert "then: an image is answered with 200" in shown
