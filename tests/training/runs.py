"""What the tests of a training run share: small settings, a reporter that watches, and the files of a run folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raydetr.training.fit import fit
from raydetr.training.reporter import LocalReporter
from raydetr.weights.checkpoint import read_checkpoint
from tests.helpers import TINY as TINIEST
from tests.helpers import tiny_config

TINY = TINIEST | {
    "model.num_queries": 9,
    "model.dec_layers": 2,
    "data.train_sizes": [48, 64],
    "data.crop_resize": [48, 56],
    "data.crop_min": 32,
    "data.crop_max": 48,
    "optim.batch_size": 2,
    "optim.epochs": 3,
}
# Everything whose state must survive a stop.
STATEFUL = {"model.dropout": 0.2, "optim.ema_decay": 0.9, "optim.accumulate": 2, "optim.schedule": "cosine", "optim.warmup": 0.3}


def settings(folder, name, **changes):
    return tiny_config(TINY | {"run.name": name}, folder, Path(folder).parent / "runs", **changes)


def folder_of(config):
    return Path(config.run.storage) / config.run.name


class Watcher(LocalReporter):
    """Keeps all that it is told, and stops the run where ``stop(event)`` says so (events of kind ``report`` for reports)."""

    def __init__(self, stop=lambda event: False, checkpoint=None):
        super().__init__(checkpoint)
        self.events, self.stop = [], stop

    def show(self, event):
        self.events.append(event)
        if self.stop(event):
            raise KeyboardInterrupt

    def report(self, metrics, checkpoint=None):
        self.show({"kind": "report", "metrics": metrics, "checkpoint": checkpoint})

    def of_kind(self, kind):
        return [event for event in self.events if event["kind"] == kind]


def run(config, **settings):
    watcher = Watcher(**settings)
    return fit(config, watcher), watcher


def interrupted(config, stop):
    with pytest.raises(KeyboardInterrupt):
        fit(config, Watcher(stop))
    torch.manual_seed(99)
    np.random.seed(99)


def same(first, second, where=""):
    """Asserts that two checkpoints hold the same, bit for bit, but for clocks, their places and torch's count of calls in a process."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for name in first.keys() - {"seconds", "images_per_second", "run", "_step_count"}:
            same(first[name], second[name], f"{where}.{name}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert first == second, where


def last_of(config):
    return read_checkpoint(folder_of(config) / "last.pth")


def log_of(config):
    return [json.loads(line) for line in (folder_of(config) / "log.txt").read_text().splitlines()]
