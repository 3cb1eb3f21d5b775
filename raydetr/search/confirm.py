"""What a confirmation may claim: statistics of settings that were trained afresh with several seeds.

The best trial of a search is mostly the luckiest one. A confirmation trains the best few settings and the defaults again, with new
seeds, and scores all runs on the same images. These functions say which settings to train next, whether the winner beats the
defaults, by how much, and, if nothing can be shown, how many images or seeds would show it. They are pure: they see average precisions
only, and ``python -m benchmarks.claims`` plays them on surfaces whose truth is known.

Two kinds of chance move the difference between two settings: the seeds of the trainings, and the choice of the images. The variance of
the difference adds both (:func:`estimate_gain`). Taking only one of them into account makes intervals that promise 95 % cover 84 to
94 %. The images of the search itself are a poor judge: the candidates were chosen for their luck with them, which no number of seeds
removes, so there the comparison is corrected for every trial of the search.
"""

import bisect
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtrit

from raydetr.errors import UserError
from raydetr.evaluate.intervals import CONFIDENCE, jackknife_variance
from raydetr.text import count

Scores = Sequence[float] | np.ndarray  # AP of the runs of one setting, one for each seed

LEVEL = 0.05  # of false claims, where no candidate is better than the defaults
POWER = 0.8
DEFAULTS = 0  # trial 0 of every search has the default settings
RACE_BUDGET = 20  # trainings; with fewer, a fixed number of seeds of fewer candidates finds more
RACE_CANDIDATES, FEW_CANDIDATES = 4, 2
LEAST_IMAGES = 5  # on fewer nothing is claimed
JUDGES = {"test": "test", "folds": "held-out", "val": "validation"}  # what the images that judge are called, by how they were chosen
MASK_AP = "segm_AP"
MEASURES = {"AP": "AP", MASK_AP: "mask AP"}  # what a confirmation may compare, and what it is called
VERDICT_FILE = "verdict.json"  # in the folder of a search that was confirmed


@dataclasses.dataclass(frozen=True)
class Runs:
    """The trainings of one setting, each with another seed.

    Attributes:
        ap: AP of each run on all images, float64 [seeds].
        left_out: AP of each run with one image left out, float64 [seeds, images]: for the 5000 images of COCO, groups of images.
    """

    ap: np.ndarray
    left_out: np.ndarray

    @property
    def seeds(self) -> int:
        """The number of runs."""
        return len(self.ap)


@dataclasses.dataclass(frozen=True)
class Gain:
    """By how much one setting beats another, and what moves that number.

    Attributes:
        value: Mean AP over the seeds of the one, less that of the other.
        images: Variance of ``value`` over images (J_m).
        seeds: Variance of ``value`` over seeds (V_s).
        both: What these two count twice: each run reacts to each image a little differently (V_o).
        seed_freedom: Degrees of freedom of ``seeds``.
        image_freedom: Degrees of freedom of ``images``.
    """

    value: float
    images: float
    seeds: float
    both: float
    seed_freedom: float
    image_freedom: float

    @property
    def variance(self) -> float:
        """Variance of ``value``."""
        return max(self.images + self.seeds - self.both, self.images, self.seeds)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of ``variance``, by Satterthwaite's formula."""
        return _freedom(self.images, self.seeds, self.image_freedom, self.seed_freedom)


def _freedom(images: float, seeds: float, image_freedom: float, seed_freedom: float) -> float:
    apart = images**2 / image_freedom + seeds**2 / seed_freedom
    return (images + seeds) ** 2 / apart if apart > 0 else image_freedom + seed_freedom


def estimate_gain(setting: Runs, other: Runs, all_runs: Sequence[Runs] = ()) -> Gain:
    """Estimate by how much ``setting`` beats ``other`` on images and seeds of the same kind.

    Args:
        setting: Runs of one setting; two or more.
        other: Runs of the other, on the same images; two or more.
        all_runs: Runs of every setting trained, from which the variance over seeds is pooled; by default the two.

    Returns:
        The difference of the means with its variances. Seeds are taken as independent, even where both settings had the same ones:
        what seeds have in common can only make the difference steadier.
    """
    images = setting.left_out.shape[1]
    difference = setting.left_out.mean(0) - other.left_out.mean(0)
    pooled, freedom = seed_variance([runs.ap for runs in all_runs or (setting, other)])
    both = sum(
        max(
            0.0,
            (float(np.mean([jackknife_variance(run) for run in runs.left_out])) - jackknife_variance(runs.left_out.mean(0)))
            / (runs.seeds - 1),
        )
        for runs in (setting, other)
    )
    return Gain(
        value=float(setting.ap.mean() - other.ap.mean()),
        images=jackknife_variance(difference),
        seeds=pooled * (1 / setting.seeds + 1 / other.seeds),
        both=both,
        seed_freedom=freedom,
        image_freedom=images - 1,
    )


def seed_variance(aps: Sequence[Scores]) -> tuple[float, int]:
    """Return the variance of AP over the seeds of one setting, pooled over the settings, and its degrees of freedom."""
    several = [np.asarray(each, float) for each in aps if len(each) > 1]
    freedom = sum(len(each) - 1 for each in several)
    return (sum(float(((each - each.mean()) ** 2).sum()) for each in several) / freedom if freedom else math.nan), freedom


# ------------------------------------------------------------------------------------------------------- many comparisons


@functools.lru_cache(maxsize=1024)
def dunnett(comparisons: int, freedom: float, level: float = LEVEL) -> float:
    """Return Dunnett's one-sided critical value.

    Of ``comparisons`` settings, none of them better than the one that all are compared with, the largest difference exceeds this many
    standard errors with probability ``level`` (Dunnett 1955; as many runs of each setting, so that two differences correlate by 1/2).

    Args:
        comparisons: How many settings the best was chosen from.
        freedom: Degrees of freedom of the standard error.
        level: Probability of a false claim.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(40)  # over the defaults' own deviation
    quantiles, shares = np.polynomial.legendre.leggauss(64)  # over the standard error's
    scale = np.sqrt(chdtri(freedom, (1 - quantiles) / 2) / freedom) if math.isfinite(freedom) else np.ones(64)

    def exceeded(value: float) -> float:
        below = ndtr(math.sqrt(2) * value * scale[:, None] + points) ** comparisons
        return 1 - float(shares @ below @ weights) / (2 * weights.sum()) - level

    return cast(float, brentq(exceeded, 0, 1000, xtol=1e-4))  # scipy has no annotation that depends on ``full_output``


def multiplier(comparisons: int, freedom: float) -> float:
    """Return how many standard errors an interval reaches to each side, so that a claim is made where it lies above 0.

    That is Dunnett's value, and no less than Student's of a 95 % interval.
    """
    freedom = float(f"{freedom:.3g}")  # few values, to be computed once each
    return max(dunnett(comparisons, freedom), float(stdtrit(freedom, (1 + CONFIDENCE) / 2)))


# --------------------------------------------------------------------------------------------------------- whom to train next


def candidate_count(budget: int) -> int:
    """Return how many candidates ``budget`` trainings, the defaults' among them, suffice for."""
    return RACE_CANDIDATES if budget >= RACE_BUDGET else FEW_CANDIDATES


def next_round(results: Mapping[int, Scores], budget: int) -> list[int]:
    """Return the settings to train with one more seed, the same for all; none where the confirmation is finished.

    With ``RACE_BUDGET`` trainings or more the candidates race: from the second round on, who lies more than one standard error of a
    difference behind the best candidate is dropped, and its trainings go to the others. The defaults always stay.

    Args:
        results: AP of the runs so far of each setting, by trial number; ``DEFAULTS`` and every candidate, empty before the first round.
        budget: The number of trainings in all.
    """
    remaining = _racing(results) if budget >= RACE_BUDGET else sorted(results)
    spent = sum(map(len, results.values()))
    return remaining if spent + len(remaining) <= budget else []


def _racing(results: Mapping[int, Scores]) -> list[int]:
    rounds = max(map(len, results.values()))
    alive = [number for number in sorted(results) if len(results[number]) == rounds]
    variance, _ = seed_variance(list(results.values()))
    if rounds < 2:
        return alive
    means = {number: float(np.mean(results[number])) for number in alive}
    best = max(mean for number, mean in means.items() if number != DEFAULTS)
    behind = best - math.sqrt(2 * variance / rounds)
    return [number for number in alive if number == DEFAULTS or means[number] >= behind]


def winner(results: Mapping[int, Scores]) -> int:
    """Return the candidate with the highest mean AP among those that were trained to the end."""
    rounds = max(map(len, results.values()))
    return max(
        (number for number in results if number != DEFAULTS and len(results[number]) == rounds), key=lambda each: np.mean(results[each])
    )


# ------------------------------------------------------------------------------------------------------------------ verdict


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a confirmation found.

    Attributes:
        setting: The trial number of the best candidate.
        gain: Its AP, less that of the defaults.
        low: Lower end of the gain's interval.
        high: Upper end.
        seeds: Runs of the winner and of the defaults, the smaller number.
        images: The number of images that judged.
        enough_images: Images that would show a gain of ``wanted`` with these seeds in 80 % of cases; None where no number would, and
            where a difference was shown.
        enough_seeds: Seeds that would with these images, or None likewise.
        wanted: The gain that one would like to see, in AP of 0 to 1.
    """

    setting: int
    gain: float
    low: float
    high: float
    seeds: int
    images: int
    enough_images: int | None
    enough_seeds: int | None
    wanted: float

    @property
    def better(self) -> bool:
        """Whether the settings beat the defaults, chance being taken into account."""
        return self.images >= LEAST_IMAGES and self.low > 0

    @property
    def worse(self) -> bool:
        """Whether the defaults beat the settings."""
        return self.images >= LEAST_IMAGES and self.high < 0


def judge(runs: Mapping[int, Runs], images: int, searched_trials: int = 0, wanted: float = 0.02) -> Verdict:
    """Judge whether the best candidate beats the defaults.

    Args:
        runs: The runs of every setting by trial number, ``DEFAULTS`` among them, with two seeds or more each.
        images: The number of images.
        searched_trials: The number of trials of the search if its own validation images judge, which calls for a stricter correction;
            0 if the images are new to the search.
        wanted: The gain for which the number of images and seeds is worked out.

    Returns:
        The verdict; below ``LEAST_IMAGES`` images its interval is from -1 to 1.

    Raises:
        UserError: If a setting that is compared has a single run.
    """
    best = winner({number: each.ap for number, each in runs.items()})
    seeds = min(runs[best].seeds, runs[DEFAULTS].seeds)
    if seeds < 2:
        raise UserError("one training of each setting says nothing about seeds: confirm with two seeds or more (a budget of 6 or more)")
    if images < LEAST_IMAGES:
        value = float(runs[best].ap.mean() - runs[DEFAULTS].ap.mean())
        return Verdict(best, value, -1.0, 1.0, seeds, images, None, None, wanted)
    gain = estimate_gain(runs[best], runs[DEFAULTS], list(runs.values()))
    comparisons = max(len(runs) - 1, searched_trials - 1)
    half = multiplier(comparisons, gain.freedom) * math.sqrt(gain.variance)
    open_question = abs(gain.value) <= half
    more_images, more_seeds = enough(gain, images, seeds, comparisons, wanted) if open_question else (None, None)
    return Verdict(best, gain.value, gain.value - half, gain.value + half, seeds, images, more_images, more_seeds, wanted)


def enough(gain: Gain, images: int, seeds: int, comparisons: int, wanted: float) -> tuple[int | None, int | None]:
    """Return the number of images, with these seeds, and of seeds, with these images, that show a gain of ``wanted`` in 80 % of cases.

    A number is None above a hundred times what there is: then the other kind of chance alone hides the gain.
    """

    def shown(more_images: float, more_seeds: float) -> bool:
        own_images, own_seeds = max(gain.images - gain.both, 0) / more_images, max(gain.seeds - gain.both, 0) / more_seeds
        variance = own_images + own_seeds + gain.both / (more_images * more_seeds)
        image_freedom = (gain.image_freedom + 1) * more_images - 1
        seed_freedom = gain.seed_freedom * max(seeds * more_seeds - 1, 0.1) / max(seeds - 1, 0.1)
        freedom = _freedom(gain.images / more_images, gain.seeds / more_seeds, image_freedom, seed_freedom)
        errors = multiplier(comparisons, freedom) + float(stdtrit(freedom, POWER))
        return wanted >= errors * math.sqrt(variance)

    def least(number: int, is_shown: Callable[[float], bool]) -> int | None:
        if not is_shown(100):
            return None
        return bisect.bisect_left(range(number, 100 * number), True, key=lambda more: is_shown(more / number)) + number

    return least(images, lambda factor: shown(factor, 1)), least(seeds, lambda factor: shown(1, factor))


def no_claim(images: int) -> str:
    """Return what can be said about fewer than ``LEAST_IMAGES`` images."""
    return (
        f"With {count(images, 'image')} no difference can be shown, whatever the number of seeds; "
        f"at least {LEAST_IMAGES} images are needed to try."
    )


def sentence(verdict: Verdict, judged_on: str = "test", judged_by: str = "AP") -> str:
    """Return the verdict in one honest sentence.

    Args:
        verdict: The verdict.
        judged_on: A key of ``JUDGES``.
        judged_by: A key of ``MEASURES``.
    """
    measure = MEASURES[judged_by]
    seeds, images = f"{verdict.seeds} seeds", f"{verdict.images} {JUDGES[judged_on]} images"
    if verdict.images < LEAST_IMAGES:
        return no_claim(verdict.images)
    interval = f"(95 % interval {_points(verdict.low)} to {_points(verdict.high)}; {seeds}, {images})"
    if verdict.better:
        return f"Settings {verdict.setting} beat the defaults by {_points(verdict.gain)} {measure} {interval}."
    if verdict.worse:
        other_way = _negated(verdict, seeds, images)
        return f"The defaults beat settings {verdict.setting}, the best of the search, by {_points(-verdict.gain)} {measure} {other_way}."
    of_masks = " in mask AP" if judged_by == MASK_AP else ""
    return f"No difference{of_masks} can be shown with these images and seeds {interval}; {_needed(verdict, measure)}."


def _needed(verdict: Verdict, measure: str) -> str:
    shown = f"to show {_round(100 * verdict.wanted)} {measure}"
    if verdict.enough_images is not None and verdict.enough_images <= verdict.images:
        return f"a gain of {_round(100 * verdict.wanted)} {measure} would probably have shown"
    if verdict.enough_images and verdict.enough_seeds:
        return f"{shown} about {_rounded(verdict.enough_images)} images or {verdict.enough_seeds} seeds would be needed"
    if verdict.enough_images:
        return f"{shown} about {_rounded(verdict.enough_images)} images would be needed, more seeds alone would not do"
    if verdict.enough_seeds:
        return f"{shown} about {verdict.enough_seeds} seeds would be needed, more images alone would not do"
    return f"{shown} both more images and more seeds would be needed"


def read_verdict(folder: Path) -> dict[str, Any] | None:
    """Return the content of a search's ``verdict.json``, which a confirmation wrote; None where the search was not confirmed.

    Raises:
        UserError: The file is damaged.
    """
    file = folder / VERDICT_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        return {name: content[name] for name in ("sentence", "caveat", "chosen", "judged_on")}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: is damaged; write it again with raydetr confirm {folder}") from None


def caveat(judged_on: str, trials: int = 0) -> str:
    """Return what has to be said about the images that judged; empty for ``"test"``.

    Args:
        judged_on: A key of ``JUDGES``.
        trials: The number of trials of the search.
    """
    if judged_on == "folds":
        return "Judged in the folds that the search did not use; models of different folds are trained on much the same images."
    if judged_on == "val":
        return (
            f"Judged on the validation images by which the search chose among {trials} trials: the gain is overstated, the more so the "
            "fewer the images, and the interval allows for the number of trials. A test split (test2017/) gives a better answer."
        )
    return ""


def _points(ap: float) -> str:
    return f"{100 * ap:.1f}".replace("-0.0", "0.0")


def _negated(verdict: Verdict, seeds: str, images: str) -> str:
    return f"(95 % interval {_points(-verdict.high)} to {_points(-verdict.low)}; {seeds}, {images})"


def _round(number: float) -> str:
    return f"{number:.0f}" if abs(number - round(number)) < 0.05 else f"{number:.1f}"


def _rounded(number: int) -> int:
    """To two digits: more would promise what an estimate of a variance does not hold."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return math.ceil(number / unit) * unit
