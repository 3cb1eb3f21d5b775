"""Let runs of ``fit`` take turns, one epoch at a time, so that whatever slows the machine slows all of them."""

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
    """The order in which runs train their epochs. ``workers`` is the number of workers by the name of the run.

    A worker leaves a file in ``folder`` for every epoch, with its seconds and its CPU seconds.
    """

    folder: Path
    workers: dict[str, int]
    epochs: int

    def begin(self, name: str, epoch: int) -> None:
        """Wait until the previous run has finished its turn."""
        order = [
            (other, number)
            for number in range(1, self.epochs + 1)
            for other in random.Random(number).sample([*self.workers], len(self.workers))
        ]
        position = order.index((name, epoch))
        if position:
            self.wait_for(*order[position - 1])

    def wait_for(self, name: str, epoch: int) -> None:
        """Wait until all workers of a run have finished this epoch. Raises RuntimeError after 15 minutes."""
        files = [self._file(name, epoch, rank) for rank in range(self.workers[name])]
        deadline = time.monotonic() + TIMEOUT_S
        while not all(file.exists() for file in files):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} had no turn in epoch {epoch}")
            time.sleep(WAIT_S)

    def end(self, name: str, epoch: int, rank: int, seconds: float, cpu_seconds: float) -> None:
        """Record that a worker has finished its turn."""
        file = self._file(name, epoch, rank)
        file.with_suffix(".new").write_text(json.dumps([seconds, cpu_seconds]))
        file.with_suffix(".new").replace(file)

    def seconds(self, name: str) -> list[float]:
        """Return the seconds of each epoch except the first, until rank 0 is ready for the next."""
        return [self._read(name, epoch, 0)[0] for epoch in range(2, self.epochs + 1)]

    def cpu_seconds(self, name: str) -> float:
        """Return the median CPU seconds of an epoch, of all workers together."""
        ranks = range(self.workers[name])
        return statistics.median(sum(self._read(name, epoch, rank)[1] for rank in ranks) for epoch in range(2, self.epochs + 1))

    def _read(self, name: str, epoch: int, rank: int) -> list[float]:
        return json.loads(self._file(name, epoch, rank).read_text())

    def _file(self, name: str, epoch: int, rank: int) -> Path:
        return self.folder / f"{name}.{epoch}.{rank}.json"


def taking_turns(reporter: type, turns: Turns, name: str) -> type:
    """Return a subclass of ``reporter`` whose worker waits for its turn before each epoch and records its end."""

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
