"""How much more images would bring: a power law through the AP of models that were trained on parts of the data.

AP rises with the number of images n as ``ceiling - factor * n ** -exponent``, the usual law of learning curves (Hestness et al., "Deep
learning scaling is predictable, empirically", 2017). The functions here see numbers only; :mod:`raydetr.launch.learning_curve` trains.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from raydetr.errors import UserError
from raydetr.evaluate.intervals import CONFIDENCE
from raydetr.text import count
from raydetr.values import short

LEAST_FRACTIONS, LEAST_SEEDS = 3, 2  # a law of three numbers, and what is left to tell how well it is known
DRAWS = 200  # curves that are drawn around the fitted one for an interval
EXPONENTS = (0.05, 2.0)  # the flattest and the steepest curve


@dataclasses.dataclass(frozen=True)
class Growth:
    """What twice the images would bring.

    Attributes:
        now: AP with all images, by the fitted law.
        gain: By how much AP would rise.
        low: Lower end of the 95 % interval of ``gain``.
        high: Upper end.
    """

    now: float
    gain: float
    low: float
    high: float


def check_plan(fractions: Sequence[float], seeds: int, images: int | None = None) -> list[float]:
    """Return the fractions in ascending order.

    Args:
        fractions: Fractions of the training images to train on.
        seeds: The number of trainings on each.
        images: The number of training images; None if it is not known yet.

    Raises:
        UserError: They do not determine a curve.
    """
    outside = [each for each in fractions if not 0 < each <= 1]
    if outside:
        raise UserError(f"--fractions: {outside[0]:g} is not above 0 and at most 1")
    if len(set(fractions)) < max(LEAST_FRACTIONS, len(fractions)):
        raise UserError(f"--fractions: a curve needs at least {LEAST_FRACTIONS} different fractions, such as .25 .5 1")
    if seeds < LEAST_SEEDS:
        raise UserError(f"--seeds {seeds}: at least {LEAST_SEEDS} trainings of each fraction tell what chance does")
    if images is not None and len({round(each * images) for each in (0.0, *fractions)}) <= len(fractions):
        raise UserError(f"--fractions: some are the same number of images, or none, of {count(images, 'training image')}")
    return sorted(fractions)


def fit_power_law(fractions: Sequence[float] | np.ndarray, aps: Sequence[float] | np.ndarray) -> np.ndarray:
    """Fit ``ceiling - factor * fraction ** -exponent`` by least squares, with a ceiling of at most 1 and a curve that rises.

    Args:
        fractions: Fraction of the images of each training, N.
        aps: Its AP, N.

    Returns:
        Ceiling, factor and exponent.
    """
    x, y = np.asarray(fractions, float), np.asarray(aps, float)

    def loss(exponent: float) -> float:
        return float(((power_law(x, *_line(x**-exponent, y), exponent) - y) ** 2).sum())

    found: Any = minimize_scalar(loss, bounds=EXPONENTS, method="bounded", options={"xatol": 1e-4})
    return np.array([*_line(x ** -float(found.x), y), float(found.x)])


def _line(power: np.ndarray, aps: np.ndarray) -> tuple[float, float]:
    """Return ceiling and factor for a known exponent: a straight line in the power, which falls from at most 1."""
    around = power - power.mean()
    factor = max(0.0, -float(around @ aps) / float(around @ around))
    ceiling = float(aps.mean() + factor * power.mean())
    if ceiling > 1:
        ceiling, factor = 1.0, max(0.0, float((1 - aps) @ power) / float(power @ power))
    return ceiling, factor


def power_law(fraction: np.ndarray | float, ceiling: float, factor: float, exponent: float) -> Any:
    """Return the AP with that fraction of the images."""
    return ceiling - factor * np.asarray(fraction, float) ** -exponent


def gain_of(law: np.ndarray) -> float:
    """Return by how much AP rises from all images to twice as many."""
    return float(power_law(2.0, *law) - power_law(1.0, *law))


def growth(fractions: Sequence[float], aps: Sequence[float], seed: int = 0) -> Growth:
    """Return what twice the images would bring, with an interval.

    The interval is that of a parametric bootstrap: curves are drawn around the fitted law with the scatter of the trainings, which is
    that of seeds and of the images in a part, and fitted again. It does not know the chance in the choice of the images that judge.

    Args:
        fractions: Fraction of the images of each training, N.
        aps: Its AP, N.
        seed: Seed of the draws.
    """
    law, random = fit_power_law(fractions, aps), np.random.default_rng(seed)
    expected = power_law(np.asarray(fractions, float), *law)
    scatter = math.sqrt(float(((np.asarray(aps) - expected) ** 2).sum()) / max(1, len(aps) - len(law)))
    gains = [gain_of(fit_power_law(fractions, expected + random.normal(0, scatter, len(aps)))) for _ in range(DRAWS)]
    low, high = np.quantile(gains, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    gain = gain_of(law)
    return Growth(float(power_law(1.0, *law)), gain, min(float(low), gain), max(float(high), gain))


def conclude(trainings: Sequence[Mapping[str, Any]], images: Mapping[str, int], total: int) -> dict[str, Any]:
    """Return what a learning curve says.

    Args:
        trainings: ``fraction``, ``AP`` and ``per_category`` (AP by name; None where the judging images have no such object) of each.
        images: The number of training images of each category.
        total: The number of training images.

    Returns:
        ``growth`` and, by category, the ``gains`` of twice the images; ``lacking``, the category that gains most, with its own growth;
        and all of it in a ``sentence``.

    Raises:
        UserError: AP is undefined.
    """
    fractions = [each["fraction"] for each in trainings]
    if any(each["AP"] is None for each in trainings):
        raise UserError("learning-curve: AP is undefined, because no object of the judging images counts")
    whole = growth(fractions, [each["AP"] for each in trainings])
    known = [name for name in images if all(each["per_category"].get(name) is not None for each in trainings)]
    gains = {name: gain_of(fit_power_law(fractions, [each["per_category"][name] for each in trainings])) for name in known}
    lacking = max(gains, key=lambda name: gains[name], default=None)
    of_lacking = growth(fractions, [each["per_category"][lacking] for each in trainings]) if lacking else None
    lines = [
        f"Twice the {count(total, 'training image')} would bring {_points(whole)} AP, from {100 * whole.now:.1f} to "
        f"{100 * (whole.now + whole.gain):.1f}."
    ]
    if of_lacking and len(gains) > 1:
        of_category = count(images[str(lacking)], "image")
        lines.append(f"Category {short(lacking)} lacks images most: twice its {of_category} would bring it {_points(of_lacking)} AP.")
    return {
        "growth": dataclasses.asdict(whole),
        "gains": gains,
        "lacking": None if of_lacking is None else {"category": lacking, **dataclasses.asdict(of_lacking)},
        "sentence": " ".join(lines),
    }


def _points(found: Growth) -> str:
    return f"{100 * found.gain:.1f} (95 % interval {100 * found.low:.1f} to {100 * found.high:.1f})"


def curve_table(trainings: Sequence[Mapping[str, Any]], total: int) -> str:
    """Return the mean AP of each fraction, and its scatter over the seeds, as a plain text table."""
    lines = [f"{'images':>8}  {'AP':>6}  over seeds"]
    for fraction in sorted({each["fraction"] for each in trainings}):
        aps = [each["AP"] for each in trainings if each["fraction"] == fraction]
        lines.append(f"{max(1, round(fraction * total)):>8}  {np.mean(aps):.4f}  {min(aps):.4f} to {max(aps):.4f}")
    return "\n".join(lines)
