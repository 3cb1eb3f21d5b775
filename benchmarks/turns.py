"""Runs of ``fit`` that take turns, an epoch at a time and whoever launched them: what slows the machine slows all of them."""

import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

WAIT_S, TIMEOUT_S = 0.005, 900


@dataclasses.dataclass(frozen=True)
class Turns:
    """Every run of ``workers`` (their number by the run's name) trains ``epochs`` epochs; the order is drawn anew for each epoch.

    A worker leaves a file in ``folder`` for every epoch, with its seconds and its CPU seconds.
    """

    folder: Path
    workers: dict[str, int]
    epochs: int

    def begin(self, name: str, epoch: int) -> None:
        """Wait for the turn of the run before."""
        order = [
            (other, number)
            for number in range(1, self.epochs + 1)
            for other in random.Random(number).sample([*self.workers], len(self.workers))
        ]
        place = order.index((name, epoch))
        if place:
            self.wait_for(*order[place - 1])

    def wait_for(self, name: str, epoch: int) -> None:
        """Until all workers of a run have had that turn; RuntimeError after a quarter of an hour."""
        files = [self._file(name, epoch, rank) for rank in range(self.workers[name])]
        deadline = time.monotonic() + TIMEOUT_S
        while not all(file.exists() for file in files):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} had no turn in epoch {epoch}")
            time.sleep(WAIT_S)

    def end(self, name: str, epoch: int, rank: int, seconds: float, cpu_seconds: float) -> None:
        """A worker has had its turn."""
        file = self._file(name, epoch, rank)
        file.with_suffix(".new").write_text(json.dumps([seconds, cpu_seconds]))
        file.with_suffix(".new").replace(file)

    def seconds(self, name: str) -> list[float]:
        """Of each epoch but the first, until rank 0 was ready for the next."""
        return [self._read(name, epoch, 0)[0] for epoch in range(2, self.epochs + 1)]

    def cpu_seconds(self, name: str) -> float:
        """The median epoch's, of all workers together."""
        ranks = range(self.workers[name])
        return statistics.median(sum(self._read(name, epoch, rank)[1] for rank in ranks) for epoch in range(2, self.epochs + 1))

    def _read(self, name: str, epoch: int, rank: int) -> list[float]:
        return json.loads(self._file(name, epoch, rank).read_text())

    def _file(self, name: str, epoch: int, rank: int) -> Path:
        return self.folder / f"{name}.{epoch}.{rank}.json"


def taking_turns(reporter: type, turns: Turns, name: str) -> type:
    """A reporter as ``reporter``, whose worker waits for its turn before each epoch and says when it has had it."""

    class Paced(reporter):
        def show(self, event: dict[str, Any]) -> None:
            super().show(event)
            if event["kind"] == "epoch":
                turns.end(name, event["epoch"], self.rank, time.perf_counter() - self.began, time.process_time() - self.cpu)
            epoch = {"start": 1, "epoch": event.get("epoch", 0) + 1}.get(event["kind"])
            if epoch and epoch <= turns.epochs:
                turns.begin(name, epoch)
                self.began, self.cpu = time.perf_counter(), time.process_time()

    return Paced
