"""Measure what an epoch takes besides its training steps: ``python -m benchmarks.epoch FOLDER``.

``FOLDER`` is a data set as ``raydetr train`` takes it. One worker, the process itself, trains ``detr_resnet50`` from random weights at a
short side of 480 pixels; the parts of each epoch after the first, which decodes the images, are timed. The evaluation is shown
separately.
"""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
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
    """The time that the parts of each epoch take, in seconds."""

    def __init__(self):
        self.epochs: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, call: Callable) -> Callable:
        """Return ``call`` with its time added to the part ``name``."""

        def called(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._seconds[name] += time.perf_counter() - began

        return called

    def batches(self, loader: Any) -> Iterator:
        """Yield the batches of ``loader`` and time the wait for each."""
        batches = self.timed(INPUT, iter)(loader)
        following = self.timed(INPUT, lambda: next(batches, None))
        while (batch := following()) is not None:
            yield batch

    def train(self, training: engine.Training, loader: Any, epoch: int, show: Callable) -> dict[str, float]:
        """Replace ``fit.train_one_epoch`` and time its wait for input and its display. What remains are the steps."""
        whole = self.timed(TRAINING, engine.train_one_epoch)
        return whole(training, self.batches(loader), epoch, self.timed(LOGGING, show))

    def end_of_epoch(self, epoch: Callable) -> Callable:
        """Return ``fit._train_epoch``, timed; each call starts a new entry of ``epochs``."""

        def called(*arguments: Any) -> None:
            self.timed(EPOCH, epoch)(*arguments)
            self.epochs.append(complete(self._seconds))
            self._seconds.clear()

        return called


def complete(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the measured parts and those that follow from them: the steps and the rest of the epoch."""
    parts = {name: value for name, value in seconds.items() if name not in (TRAINING, EPOCH)}
    parts[STEPS] = seconds[TRAINING] - seconds.get(INPUT, 0.0) - seconds.get(LOGGING, 0.0)
    parts[REST] = seconds[EPOCH] - sum(parts.values())
    return {**parts, EPOCH: seconds[EPOCH]}


@contextlib.contextmanager
def measured() -> Iterator[Parts]:
    """Time the parts of every epoch that ``fit`` trains inside the context."""
    parts = Parts()
    replaced = {name: parts.timed(part, getattr(fit, name)) for name, part in {"evaluate": FORWARD, "_score": SCORING}.items()}
    replaced |= {"train_one_epoch": parts.train, "_train_epoch": parts.end_of_epoch(fit._train_epoch)}
    named = {"_write_logs": TEXT, "_draw": PICTURES, "_save": CHECKPOINTS}
    recorded = {name: parts.timed(part, getattr(Recorder, name)) for name, part in named.items()}
    with contextlib.ExitStack() as patches:
        for owner, functions in ((fit, replaced), (Recorder, recorded)):
            for name, function in functions.items():
                patches.enter_context(mock.patch.object(owner, name, function))
        yield parts


def epochs_of(settings: dict[str, Any]) -> list[dict[str, float]]:
    """Train with ``settings`` and return the parts of every epoch except the first, in seconds."""
    with tempfile.TemporaryDirectory() as folder, measured() as parts:
        launcher.train(load_config(settings, {"run.storage": folder, "run.name": "run"}))
    return parts.epochs[1:]


def main() -> None:
    """Measure and print the tables."""
    parser = options(__doc__, repeats=3)
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
