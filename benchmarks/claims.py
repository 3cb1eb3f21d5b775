"""What may be claimed from a search, played where the truth is known: ``python -m benchmarks.claims [claims|coverage]``.

``claims`` plays searches on response surfaces (no training): seeds differ, and the search's validation images favor some settings. It
prints how often today's "best of N trials" announces a gain, and what a confirmation with new seeds on new images claims: false claims
where nothing is better than the defaults, and power where something is. ``coverage`` draws synthetic test sets whose true AP is known,
and prints how often the 95 % intervals of an AP, of the gain of one model on another, and of one setting on another with several seeds
hold the truth.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import optuna

from benchmarks.measure import first_line, table
from raydetr.evaluate.intervals import (
    bootstrap_weights,
    grouped,
    jackknife_interval,
    leave_out_weights,
    left_out_metrics,
    overall,
    weighted_metrics,
)
from raydetr.evaluate.matches import AREAS, IOUS, Matches
from raydetr.search.confirm import DEFAULTS, Runs, candidate_count, estimate_gain, judge, multiplier, next_round
from raydetr.search.methods import make_pruner, make_sampler
from raydetr.search.space import Space

SURFACES = {  # standard deviation of the distance from the defaults to the best settings, and the mean AP that a random setting loses
    "flat": (0.0, 0.0),  # no setting is better or worse than another
    "at": (0.0, 0.12),  # the defaults are the best
    "near": (0.15, 0.12),
    "mid": (0.3, 0.12),
}
SETTINGS, EPOCHS, GRACE = 5, 27, 2
IMAGE_SD, OWN_SD, RUN_SD = 0.22, 0.08, 0.08  # of one image's share in AP: common to all, of a setting, of a run
VAL_SD = 0.01  # by which the search's images favor some settings
VAL_IMAGES = round((OWN_SD / VAL_SD) ** 2)  # as many as favor them by that much


class Surface:
    """AP of settings in the unit cube, the defaults in its middle."""

    def __init__(self, name: str, seed: int, seed_sd: float):
        self.random = np.random.default_rng([seed, 77])
        distance, spread = SURFACES[name]
        self.seed_sd = seed_sd
        self.best = (0.5 + distance * self.random.standard_normal(SETTINGS)).clip(0.03, 0.97)
        self.weight = np.exp(self.random.normal(0, 0.8, SETTINGS)) * spread
        if spread:
            points = self.random.uniform(size=(400, SETTINGS))
            self.weight *= spread / ((points - self.best) ** 2 @ self.weight).mean()
        self.waves = self.random.normal(0, 3, (32, SETTINGS)), self.random.uniform(0, 2 * np.pi, 32), self.random.standard_normal(32)

    def true(self, point: np.ndarray) -> float:
        """AP over all seeds and images."""
        return max(0.0, 0.6 - float((point - self.best) ** 2 @ self.weight))

    def favor(self, point: np.ndarray) -> float:
        """AP that the search's images add to the true one, whatever the seed."""
        frequency, phase, height = self.waves
        return VAL_SD * math.sqrt(2 / 32) * float(height @ np.cos(frequency @ point + phase))

    def curve(self, point: np.ndarray) -> np.ndarray:
        """AP [epochs] of one training on the search's images."""
        final = self.true(point) + self.favor(point) + self.random.normal(0, self.seed_sd)
        epochs = np.arange(1, EPOCHS + 1)
        progress = 1 - np.exp(-((epochs / (EPOCHS * 0.16)) ** 0.9))
        return progress * final / progress[-1] + 0.25 * self.seed_sd * self.random.standard_normal(EPOCHS)


def play_search(surface: Surface, trials: int, seed: int) -> list[tuple[float, np.ndarray]]:
    """AP and settings of the complete trials, trial 0 first, then from the best to the worst."""
    study = optuna.create_study(
        direction="maximize", sampler=make_sampler("tpe", seed, trials, Space(())), pruner=make_pruner("asha", GRACE, trials)
    )
    names = [f"x{number}" for number in range(SETTINGS)]
    study.enqueue_trial(dict.fromkeys(names, 0.5))

    def objective(trial: optuna.Trial) -> float:
        point = np.array([trial.suggest_float(name, 0, 1) for name in names])
        for epoch, ap in enumerate(surface.curve(point), 1):
            trial.report(ap, epoch)
            if trial.number and epoch < EPOCHS and trial.should_prune():  # trial 0 is never stopped
                raise optuna.TrialPruned
        return ap

    study.optimize(objective, n_trials=trials)
    complete = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    scored = [(trial.value, np.array([trial.params[name] for name in names])) for trial in complete if trial.value is not None]
    return scored[:1] + sorted(scored[1:], key=lambda each: -each[0])


class Judges:
    """Images that score settings: the mean of a share of each image, which is enough for what is judged here.

    They are new images, or those of the search, which favor the settings that it found.
    """

    def __init__(self, surface: Surface, images: int, new: bool):
        self.surface, self.random, self.new = surface, surface.random, new
        self.image = self.random.normal(0, IMAGE_SD, images)
        self.own: dict[int, np.ndarray] = {}

    def train(self, number: int, point: np.ndarray) -> np.ndarray:
        """The shares [images] in the AP of one more training of setting ``number``."""
        random, images = self.random, len(self.image)
        own = random.normal(0, OWN_SD, images)
        own = self.own.setdefault(number, own if self.new else own - own.mean() + self.surface.favor(point))
        return self.surface.true(point) + random.normal(0, self.surface.seed_sd) + self.image + own + random.normal(0, RUN_SD, images)


def runs_of(shares: list[np.ndarray]) -> Runs:
    """The runs of one setting, from each run's shares."""
    each = np.stack(shares)
    return Runs(each.mean(1), (each.sum(1, keepdims=True) - each) / (each.shape[1] - 1))


def play_confirmation(
    surface: Surface, complete: list[tuple[float, np.ndarray]], budget: int, images: int, searched_trials: int = 0
) -> tuple[bool, float]:
    """Whether a confirmation of the best complete trials claims a gain, and the true gain of its winner.

    New images judge, or, where ``searched_trials`` is not 0, those of the search of so many trials.
    """
    points = dict(enumerate(point for _, point in complete[: candidate_count(budget) + 1]))
    judges, shares = Judges(surface, images, new=not searched_trials), {number: [] for number in points}
    while chosen := next_round({number: [each.mean() for each in some] for number, some in shares.items()}, budget):
        for number in chosen:
            shares[number].append(judges.train(number, points[number]))
    verdict = judge({number: runs_of(some) for number, some in shares.items()}, images, searched_trials)
    return verdict.better, surface.true(points[verdict.setting]) - surface.true(points[DEFAULTS])


def measure_claims(names: list[str], trials: int, noise: float, budget: int, images: int, seeds: range, judge_on: str = "test") -> str:
    """The table of claims; AP in points."""
    rows = []
    for name in names:
        best_of, confirmed = [], []
        for seed in seeds:
            surface = Surface(name, seed, noise / 100)
            complete = play_search(surface, trials, seed)
            if len(complete) < 2:
                continue  # nothing to confirm
            announced = max(0.0, complete[1][0] - complete[0][0])
            gained = surface.true(complete[1][1]) - surface.true(complete[0][1]) if announced else 0.0
            best_of.append((announced > 0, announced, gained))
            confirmed.append(play_confirmation(surface, complete, budget, images, trials if judge_on == "val" else 0))
        claims, announced, gained = np.array(best_of, float).T
        better, true = np.array([each[0] for each in confirmed]), np.array([each[1] for each in confirmed])
        large = true > 0.01
        rows.append(
            [
                name,
                len(confirmed),
                f"{100 * claims.mean():.0f} %",
                f"{100 * announced.mean():.1f} / {100 * gained.mean():.1f}",
                f"{100 * (claims * (gained <= 0)).mean():.0f} %",
                f"{100 * (better & (true <= 0)).mean():.1f} %",
                f"{100 * better.mean():.0f} %",
                f"{100 * better[large].mean():.0f} % of {large.sum()}" if large.any() else "-",
            ]
        )
    header = ["surface", "searches", "best of N: claims", "announced / true gain", "false", "confirm: false", "claims", "over 1 AP: shown"]
    return table(rows, header)


# ----------------------------------------------------------------------------------------------- coverage of the intervals

CATEGORIES = ((1, 2.5), (0, 1.0), (0, 0.4))  # objects of each in an image: at least, and how many more on average
SKILLS = (0.0, 0.2)  # of two models
RARE = len(CATEGORIES) - 1


def make_sets(
    random: np.random.Generator, images: int, skills: Sequence[float], objects: tuple[int, float] = CATEGORIES[0], run_sd: float = 0.6
) -> list[Matches]:
    """Matches of several detectors, each of a given skill, on the same ``images`` of one category.

    Images differ in difficulty, and objects within them; a detector sees each object a little differently from another.
    """
    counts = objects[0] + random.poisson(objects[1], images)
    image = np.repeat(np.arange(images), counts)
    object_counts = np.zeros((len(AREAS), images, 1), np.int64)
    object_counts[0, :, 0] = counts
    ease = random.normal(0, 0.8, images)[image] + random.normal(0, 0.8, len(image))
    clutter = random.gamma(2, sum(objects) / 3.5, images)  # false positives of an image, on average
    return [_detect(random, image, object_counts, ease + skill, clutter, run_sd) for skill in skills]


def _detect(
    random: np.random.Generator, image: np.ndarray, objects: np.ndarray, ease: np.ndarray, clutter: np.ndarray, run_sd: float
) -> Matches:
    own = ease + random.normal(0, run_sd, len(image))
    iou = 1 / (1 + np.exp(-(own + 1)))
    score = 1 / (1 + np.exp(-(own + random.normal(0, 1, len(own)))))
    false = np.repeat(np.arange(len(clutter)), random.poisson(clutter))
    images, scores = np.r_[image, false], np.r_[score, random.beta(1, 2.5, len(false))]
    hits = np.r_[iou, np.zeros(len(false))] >= IOUS[:, None]
    order = np.argsort(-scores, kind="stable")
    matched = np.zeros((len(AREAS), len(IOUS), len(order)), bool)
    matched[0] = hits[:, order]
    zeros = np.zeros(len(order), np.int64)
    return Matches(images[order], zeros, scores[order], zeros, order, matched, np.zeros_like(matched), objects)


def make_categories(random: np.random.Generator, images: int) -> Matches:
    """Matches of one detector on images with common and rare objects, ``CATEGORIES``."""
    parts = [make_sets(random, images, SKILLS[:1], objects)[0] for objects in CATEGORIES]
    return dataclasses.replace(
        parts[0],
        image=np.concatenate([part.image for part in parts]),
        category=np.repeat(np.arange(len(parts)), [len(part.image) for part in parts]),
        score=np.concatenate([part.score for part in parts]),
        rank=np.concatenate([part.rank for part in parts]),
        row=np.concatenate([part.row for part in parts]),
        matched=np.concatenate([part.matched for part in parts], 2),
        ignored=np.concatenate([part.ignored for part in parts], 2),
        objects=np.concatenate([part.objects for part in parts], 2),
    )


def aps_of(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """AP [R, categories] of the images as often as ``weights`` [R, images] say."""
    return weighted_metrics(matches, weights, ["AP"])["AP"]


def ap_of(matches: Matches) -> float:
    """AP on all images."""
    return float(overall(aps_of(grouped(matches, 1), np.ones((1, 1))))[0])


def left_out(matches: Matches) -> np.ndarray:
    """AP [images] without each image."""
    return overall(left_out_metrics(matches, ["AP"])["AP"])


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The plain interval of the bootstrap: from the 2.5 % to the 97.5 % point of the values of the resamples."""
    low, high = np.nanquantile(values, (0.025, 0.975)) if not np.isnan(values).all() else (math.nan, math.nan)
    return float(low), float(high)


class Coverage:
    """How often the intervals of one number, by the jackknife and by the percentile bootstrap, hold its true value."""

    def __init__(self, truth: float, low: float = 0.0) -> None:
        self.truth, self.low, self.sets = truth, low, 0
        self.ends: tuple[list, list] = [], []

    def add(self, value: float, without: np.ndarray, resampled: np.ndarray) -> None:
        """Count a set, from the number on all images, without each and on each resample."""
        self.add_interval(jackknife_interval(value, without, self.low), percentile_interval(resampled))

    def add_interval(self, jackknife: Sequence[float] | None, percentile: Sequence[float] | None = None) -> None:
        """Count a set; sets without an interval (all objects of a category in one image) are left out."""
        self.sets += 1
        if jackknife is not None:
            self.ends[0].append(jackknife)
            self.ends[1].append(percentile or (math.nan, math.nan))

    def cells(self) -> list[str]:
        """What the table says."""
        cells = []
        for ends in self.ends:
            low, high = np.array(ends).T
            held = ((low <= self.truth) & (self.truth <= high)).mean()
            cells.append("" if np.isnan(low).all() else f"{100 * held:.1f} % ({100 * np.nanmean(high - low):.1f})")
        return [f"{len(self.ends[0])} of {self.sets}", *cells]


def measure_coverage(sizes: Sequence[int], sets: int, seeds: int, resamples: int, seed: int = 0) -> str:
    """The table of the shares of intervals that hold the truth, and their mean widths in points."""
    large = np.random.default_rng(0)
    one, other = (ap_of(each) for each in make_sets(large, 20000, SKILLS))
    of_categories = aps_of(grouped(make_categories(large, 20000), 1), np.ones((1, 1)))[0]
    rows = []
    for images in sizes:
        single, gain, several, rare = (
            Coverage(one),
            Coverage(other - one, -1),
            Coverage(of_categories.mean()),
            Coverage(of_categories[RARE]),
        )
        settings, ones, random = Coverage(0.0, -1), np.ones((1, images)), np.random.default_rng([seed, images])
        for number in range(sets):
            weights = bootstrap_weights(images, resamples, number)
            pair = make_sets(random, images, SKILLS)
            value, without, resampled = (
                [overall(aps_of(model, rows_of)) for model in pair] for rows_of in (ones, leave_out_weights(images), weights)
            )
            single.add(value[0][0], without[0], resampled[0])
            gain.add(value[1][0] - value[0][0], without[1] - without[0], resampled[1] - resampled[0])
            mixed = make_categories(random, images)
            value, without, resampled = (aps_of(mixed, rows_of) for rows_of in (ones, leave_out_weights(images), weights))
            several.add(overall(value)[0], overall(without), overall(resampled))
            rare.add(value[0, RARE], without[:, RARE], resampled[:, RARE])
            settings.add_interval(_gain_of_a_setting(random, images, seeds))
        named = {
            "AP, one category": single,
            f"AP, {len(CATEGORIES)} categories": several,
            "AP of the rarest of them": rare,
            "gain of one model on another": gain,
            f"gain of a setting, {seeds} seeds": settings,
        }
        rows += [[images, name, *found.cells()] for name, found in named.items()]
    return table(rows, ["images", "number", "sets with an interval", "jackknife", "percentile"])


def _gain_of_a_setting(random: np.random.Generator, images: int, seeds: int) -> tuple[float, float]:
    """The interval of the gain of one setting on another, each a number of seeds around the same skill, so that there is none."""
    runs = make_sets(random, images, list(random.normal(0, 0.1, 2 * seeds)))
    ap, without = np.array([ap_of(each) for each in runs]), np.stack([left_out(each) for each in runs])
    gain = estimate_gain(Runs(ap[:seeds], without[:seeds]), Runs(ap[seeds:], without[seeds:]))
    half = multiplier(1, gain.freedom) * math.sqrt(gain.variance)
    return gain.value - half, gain.value + half


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("what", nargs="?", choices=["claims", "coverage"], default="claims")
    parser.add_argument("--surfaces", nargs="+", choices=list(SURFACES), default=list(SURFACES))
    parser.add_argument("--repeats", type=int, default=200, help="searches on each surface (default 200)")
    parser.add_argument("--trials", type=int, default=32, help="of a search (default 32)")
    parser.add_argument("--noise", type=float, default=2.0, help="by how many AP seeds differ (default 2)")
    parser.add_argument("--budget", type=int, default=20, help="trainings of a confirmation (default 20)")
    parser.add_argument("--judge", choices=["test", "val"], default="test", help="by new images (default) or the search's own 64")
    parser.add_argument("--images", type=int, nargs="+", help="test images (default 200; of coverage: 13 50 200)")
    parser.add_argument("--sets", type=int, default=1000, help="test sets for coverage (default 1000)")
    parser.add_argument("--seeds", type=int, default=5, help="of each setting for coverage (default 5)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the percentile interval (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    chosen = parser.parse_args()
    repeats, sets = (3, 5) if chosen.quick else (chosen.repeats, chosen.sets)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if chosen.what == "coverage":
        print(measure_coverage(chosen.images or [13, 50, 200], sets, chosen.seeds, chosen.resamples, chosen.first))
    else:
        print(
            measure_claims(
                chosen.surfaces,
                chosen.trials,
                chosen.noise,
                chosen.budget,
                VAL_IMAGES if chosen.judge == "val" else (chosen.images or [200])[0],
                range(chosen.first, chosen.first + repeats),
                chosen.judge,
            )
        )


if __name__ == "__main__":
    main()
