"""What an epoch of a run takes beside its training steps: ``python -m benchmarks.epoch FOLDER``.

``FOLDER`` is a data set as ``raydetr train`` takes it. One worker, the process itself, trains ``detr_resnet50`` from random weights at a
short side of 480 pixels; after its first epoch, which decodes the photographs, the parts of each epoch are timed. The evaluation trains
nothing and is shown apart.
"""

import contextlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.measure import machine, options, table
from raydetr.config import load_config
from raydetr.launch import train as launcher
from raydetr.training import engine, fit
from raydetr.training.recorder import Recorder

TARGET = 1.05
STEPS, INPUT, LOGGING = "training steps", "waiting for input", "steps to TensorBoard and terminal"
FORWARD, SCORING = "evaluation: input, forward, losses", "evaluation: COCO numbers, curve"
TEXT, PICTURES, CHECKPOINTS = "epoch to TensorBoard and log.txt", "pictures", "checkpoints"
TRAINING, EPOCH, REST = "training", "epoch", "the rest"
BESIDE = (INPUT, LOGGING, TEXT, PICTURES, CHECKPOINTS, REST)


class Parts:
    """Seconds of an epoch by what they went to."""

    def __init__(self):
        self.epochs: list[dict[str, float]] = []
        self._seconds: Counter[str] = Counter()

    def timed(self, name: str, call: Callable) -> Callable:
        """``call``, whose time counts as ``name``."""

        def called(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._seconds[name] += time.perf_counter() - began

        return called

    def batches(self, loader: Any) -> Iterator:
        """Those of ``loader``; waiting for them is timed."""
        batches = self.timed(INPUT, iter)(loader)
        following = self.timed(INPUT, lambda: next(batches, None))
        while (batch := following()) is not None:
            yield batch

    def train(self, training: engine.Training, loader: Any, epoch: int, show: Callable) -> dict[str, float]:
        """In place of ``fit.train_one_epoch``: a step is what an epoch does when it neither waits for input nor shows a step."""
        whole = self.timed(TRAINING, engine.train_one_epoch)
        return whole(training, self.batches(loader), epoch, self.timed(LOGGING, show))

    def end_of_epoch(self, epoch: Callable) -> Callable:
        """``fit._train_epoch``, after which the times are those of the next epoch."""

        def called(*arguments: Any) -> None:
            self.timed(EPOCH, epoch)(*arguments)
            self.epochs.append(complete(self._seconds))
            self._seconds.clear()

        return called


def complete(seconds: Counter[str]) -> dict[str, float]:
    """The measured parts with those that follow from them: the steps, and the rest of the epoch."""
    parts = Counter({name: value for name, value in seconds.items() if name not in (TRAINING, EPOCH)})
    parts[STEPS] = seconds[TRAINING] - seconds[INPUT] - seconds[LOGGING]
    parts[REST] = seconds[EPOCH] - parts.total()
    return {**parts, EPOCH: seconds[EPOCH]}


@contextlib.contextmanager
def measured() -> Iterator[Parts]:
    """Within it the parts of every epoch that ``fit`` trains are timed."""
    parts = Parts()
    replaced = {name: parts.timed(part, getattr(fit, name)) for name, part in {"evaluate": FORWARD, "_score": SCORING}.items()}
    replaced |= {"train_one_epoch": parts.train, "_train_epoch": parts.end_of_epoch(fit._train_epoch)}
    named = {"_write_logs": TEXT, "_draw": PICTURES, "_save": CHECKPOINTS}
    recorded = {name: parts.timed(part, getattr(Recorder, name)) for name, part in named.items()}
    with mock.patch.multiple(fit, **replaced), mock.patch.multiple(Recorder, **recorded):
        yield parts


def epochs_of(settings: dict[str, Any]) -> list[dict[str, float]]:
    """The parts of every epoch of a run with ``settings`` but its first."""
    with tempfile.TemporaryDirectory() as folder, measured() as parts:
        launcher.train(load_config(settings, {"run.storage": folder, "run.name": "run"}))
    return parts.epochs[1:]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.splitlines()[0], repeats=3)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    settings = {"model.preset": "detr_resnet50", "data.train_sizes": [480], "data.val_size": 480}
    if chosen.quick:
        settings = {"model.preset": "detr_tiny"}
    common = {"model.weights": "none", "data.path": str(chosen.folder), "optim.epochs": 1 + (1 if chosen.quick else chosen.repeats)}
    epochs = epochs_of({**settings, **common})
    print(machine(), f"; {len(epochs)} epochs\n", sep="")
    medians = {name: statistics.median(epoch.get(name, 0.0) for epoch in epochs) for name in (STEPS, *BESIDE, FORWARD, SCORING, EPOCH)}
    rows = [[name, f"{medians[name]:.3f} s", medians[name] / medians[STEPS], ""] for name in (STEPS, *BESIDE)]
    whole = statistics.median(sum(epoch.get(name, 0.0) for name in (STEPS, *BESIDE)) / epoch[STEPS] for epoch in epochs)
    rows.append(["all of these", "", whole, TARGET])
    rows += [[name, f"{medians[name]:.3f} s", medians[name] / medians[STEPS], ""] for name in (FORWARD, SCORING, EPOCH)]
    print(table(rows, ["of an epoch (median)", "time", "share of the steps", "target"]))


if __name__ == "__main__":
    main()
