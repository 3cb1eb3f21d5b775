import itertools
import threading
import time

import pytest

from benchmarks import turns
from benchmarks.turns import Turns, taking_turns


class Reporter:
    rank = 0

    def show(self, event):
        """Nothing."""


def run(name, all_turns, taken):
    reporter = taking_turns(Reporter, all_turns, name)()
    reporter.show({"kind": "start"})
    for epoch in range(1, all_turns.epochs + 1):
        began = time.perf_counter()
        time.sleep(0.05 if name == "slow" else 0.01)
        taken.append((began, time.perf_counter()))
        reporter.show({"kind": "epoch", "epoch": epoch})


def test_nobody_trains_while_another_does(tmp_path):
    all_turns, taken = Turns(tmp_path, {"slow": 1, "quick": 1}, epochs=5), []
    threads = [threading.Thread(target=run, args=(name, all_turns, taken)) for name in all_turns.workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 10
    assert all(end <= began for (_, end), (began, _) in itertools.pairwise(sorted(taken)))
    assert len(all_turns.seconds("slow")) == 4
    assert min(all_turns.seconds("slow")) >= 0.05
    assert all_turns.cpu_seconds("slow") < 0.05


def test_all_workers_of_a_run_must_have_had_their_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "TIMEOUT_S", 0.1)
    all_turns = Turns(tmp_path, {"two": 2}, epochs=1)
    all_turns.end("two", 1, 0, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="two had no turn in epoch 1"):
        all_turns.wait_for("two", 1)
    all_turns.end("two", 1, 1, 2.0, 3.0)
    all_turns.wait_for("two", 1)
