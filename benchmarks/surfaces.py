"""Response surfaces that stand for trainings, so that searches can be played in seconds and their true result is known.

A surface has a smooth best point at, near or away from the defaults, settings without effect, an interaction of two settings, and a
corner of high learning rates that diverges. Learning curves cross: high rates learn faster at first, and gain more when the rate drops.
Two trainings with the same settings differ (seeds), and the validation images favor some settings over others, equally in all trials.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydetr.config import flatten, load_config, to_dict
from raydetr.search.encoding import from_unit, to_unit
from raydetr.search.space import read_space

EPOCHS = 27
SEED_SD, EPOCH_SD, VAL_SD = 0.02, 0.01, 0.01  # in AP: between seeds, between epochs of a run, between settings on the validation images
DROP = 2 / 3  # of the epochs, after which the learning rate drops
SPREAD = 0.12  # AP that a random setting loses against the best, on average

RATES = {"optim.lr": {"loguniform": [2e-5, 5e-4]}, "optim.lr_backbone": {"loguniform": [1e-6, 5e-5]}}
LOSSES = {
    "loss.bbox_loss_coef": {"loguniform": [1.25, 20]},
    "loss.giou_loss_coef": {"loguniform": [0.5, 8]},
    "loss.eos_coef": {"loguniform": [0.02, 0.5]},
}
EIGHT = {
    **RATES,
    **LOSSES,
    "optim.weight_decay": {"loguniform": [1e-5, 0.1]},
    "matcher.set_cost_class": {"loguniform": [0.5, 4]},
    "model.dropout": {"uniform": [0, 0.3], "step": 0.05},
}
WIDE = {  # as if little were known about the network and the images
    "optim.lr": {"loguniform": [1e-5, 1e-2]},
    "loss.eos_coef": {"loguniform": [0.01, 1.0]},
    "optim.lr_backbone": {"loguniform": [1e-5, 1e-2]},
    "loss.giou_loss_coef": {"loguniform": [0.25, 8.0]},
}


@dataclass(frozen=True)
class Kind:
    """A family of surfaces: its space, and how far the best settings are from the defaults."""

    space: Mapping[str, Any]
    distance: float | None  # standard deviation of the distance, in parts of a range; None: the best settings are anywhere
    about: str


KINDS = {
    "A": Kind({**RATES, **LOSSES}, 0.15, "5 settings, near"),
    "B": Kind({**RATES, **LOSSES}, 0.3, "5 settings, away"),
    "C": Kind(RATES, 0.3, "2 settings, away"),
    "D": Kind(EIGHT, 0.3, "8 settings, away"),
    "W": Kind(WIDE, 0.15, "4 wide ranges, near"),
    "O": Kind({**RATES, **LOSSES}, 0.0, "5 settings, at"),
}


class Surface:
    """AP of settings after every epoch, and their true AP.

    Args:
        kind: One of ``KINDS``.
        seed: Seed of the surface and of its trainings.
    """

    def __init__(self, kind: str, seed: int) -> None:
        family, random = KINDS[kind], np.random.default_rng([seed, 77])
        self.seed, self.space = seed, read_space(family.space)
        self.distributions = self.space.distributions
        self.base = flatten(to_dict(load_config({"model.preset": "detr_tiny"} if kind == "W" else {})))
        count = len(self.distributions)
        self.default = np.clip(self.point(self.base), 0, 1)
        away = random.standard_normal(count)
        if family.distance is None:
            self.best = random.uniform(0.03, 0.97, count)
        else:
            self.best = np.clip(self.default + family.distance * away, 0.03, 0.97)
        self.weight = self._weights(random, count)
        self.pair, self.correlation = random.permutation(count)[:2], random.uniform(-0.6, 0.6)
        self.top = random.uniform(0.35, 0.7)
        self.diverges = random.uniform(0.85, 0.97)  # the position of the rate above which trainings diverge
        frequency = random.normal(0, 1 / 0.35, (32, count)) * np.sqrt(np.maximum(self.weight * count, 0.05))
        self.waves = frequency, random.uniform(0, 2 * np.pi, 32), random.standard_normal(32)  # of the validation images
        self.scale = SPREAD / np.mean([self._lost(point) for point in random.uniform(size=(400, count))])

    @staticmethod
    def _weights(random: np.random.Generator, count: int) -> np.ndarray:
        """How much each setting matters; the learning rate comes first, and of more than three settings some hardly matter."""
        weight = np.exp(random.normal(0, 0.8, count))
        weight[random.permutation(count)[: max(0, count - 3) // 2]] = 0.01
        weight[0] = max(weight[0], 1.5)
        return weight / weight.sum()

    def point(self, settings: Mapping[str, Any]) -> np.ndarray:
        """Settings as positions between 0 and 1 within their ranges."""
        return np.array([to_unit(distribution, settings[name]) for name, distribution in self.distributions.items()])

    def settings(self, point: np.ndarray) -> dict[str, Any]:
        """The drawn settings at a point."""
        return {name: from_unit(each, float(place)) for (name, each), place in zip(self.distributions.items(), point, strict=True)}

    def _lost(self, point: np.ndarray) -> float:
        away = np.sqrt(self.weight) * (point - self.best)
        one, other = self.pair
        return float(away @ away + 2 * self.correlation * away[one] * away[other])

    def true(self, point: np.ndarray) -> float:
        """AP at the last epoch, over all seeds and images."""
        lost, edge = self.scale * self._lost(point), 0.1
        room = self.top - edge
        ap = self.top - lost if lost < edge else room * math.exp(-(lost - edge) / room)
        return float(max(0.0, 0.15 * ap if point[0] > self.diverges else ap))

    def on_validation(self, point: np.ndarray) -> float:
        """AP at the last epoch on the validation images, over all seeds."""
        frequency, phase, height = self.waves
        return self.true(point) + VAL_SD * math.sqrt(2 / 32) * float(height @ np.cos(frequency @ point + phase))

    def progress(self, point: np.ndarray, pace: float = 0.0) -> np.ndarray:
        """Share [epochs] of its AP at the end that a training with the settings at ``point`` has after each epoch."""
        epochs, speed = np.arange(1, EPOCHS + 1), point[0] - self.best[0]
        slow = EPOCHS * 0.16 * math.exp(-1.6 * speed + pace)
        before_drop = np.where(epochs > DROP * EPOCHS, 1, 1 - 0.1 * math.exp(1.2 * speed))
        progress = (1 - np.exp(-((epochs / slow) ** 0.9))) * before_drop
        return np.minimum(progress / progress[-1], 1)

    def curve(self, point: np.ndarray, number: int, stream: int = 0) -> np.ndarray:
        """AP [epochs] of trial ``number`` with the settings at ``point``; NaN after it diverged. Its luck depends on number and stream."""
        random = np.random.default_rng([self.seed, number, 5, stream])
        progress = self.progress(point, random.normal(0, 0.1))
        final = self.on_validation(point) + random.normal(0, SEED_SD)
        wobble, noise = random.standard_normal(), np.empty(EPOCHS)
        for epoch, fresh in enumerate(random.standard_normal(EPOCHS)):
            noise[epoch] = wobble = 0.6 * wobble + 0.8 * fresh
        noise *= EPOCH_SD * np.minimum(1, progress + 0.2)
        noise[round(DROP * EPOCHS) :] *= 0.5  # after the rate has dropped
        curve = progress * final + noise
        if point[0] > self.diverges and random.random() < 0.5:
            curve[random.integers(1, EPOCHS // 3) :] = np.nan
        return np.clip(curve, 0, 1)
