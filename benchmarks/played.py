"""Play searches on response surfaces, many trials at a time, with raydetr's own samplers and schedulers and with published peers."""

import heapq
import math
import statistics
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from benchmarks.measure import table
from benchmarks.surfaces import EPOCH_SD, EPOCHS, KINDS, SEED_SD, Surface
from raydetr.search.halving import PAUSED, PROMOTED, best_of_rung, last_rung, next_promotion
from raydetr.search.methods import HALF, REDUCTION, make_pruner, make_sampler
from raydetr.search.population import better_trial, moved

GRACE = 2
PACE_SD = 0.03  # by which the speeds of trials differ
TURNS = 4  # of a search by population-based training
RANDOM_TRIALS = {1: 20, 2: 20, 8: 32, 32: 128, 128: 512}  # of random search, by the number of trials at a time; others get twice as many


@dataclass(frozen=True)
class Arm:
    """How settings are drawn, and trials stopped."""

    sampler: Callable[[Surface, Sequence[int], int], optuna.samplers.BaseSampler]  # of a surface, a seed and a number of trials
    pruner: Callable[[int], optuna.pruners.BasePruner]  # of a number of trials
    promotes: bool = False  # whether trials are paused at rungs, and the best of these train on


class RayAsha(optuna.pruners.BasePruner):
    """Ray Tune's own ASHA."""

    def __init__(self) -> None:
        # It reads a trial's id and its result, and nothing else of Ray Tune.
        self.scheduler: Any = AsyncHyperBandScheduler("epoch", "AP", "max", max_t=EPOCHS, grace_period=GRACE, reduction_factor=3)
        self.known: set[int] = set()

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Return whether to stop a trial."""
        as_ray_has_it = types.SimpleNamespace(trial_id=str(trial.number))
        if trial.number not in self.known:
            self.known.add(trial.number)
            self.scheduler.on_trial_add(None, as_ray_has_it)
        epoch = trial.last_step or 0
        result = {"epoch": epoch, "AP": trial.intermediate_values[epoch]}
        return self.scheduler.on_trial_result(None, as_ray_has_it, result) != TrialScheduler.CONTINUE


def _product_sampler(name: str, prior: Callable[[Surface], np.ndarray] | None = None) -> Callable:
    def make(surface: Surface, seed: Sequence[int], trials: int) -> optuna.samplers.BaseSampler:
        return make_sampler(name, seed, trials, surface.space, [surface.settings(prior(surface))] if prior else [])

    return make


def _optuna_gp(surface: Surface, seed: Sequence[int], trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.GPSampler(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]), warn_independent_sampling=False)


def _best_settings(surface: Surface, seed: Sequence[int], trials: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.PartialFixedSampler(surface.settings(surface.best), optuna.samplers.RandomSampler())


def _product_pruner(name: str) -> Callable:
    return lambda trials: make_pruner(name, GRACE, trials)


def _gp_with_prior(prior: Callable[[Surface], np.ndarray]) -> Arm:
    return Arm(_product_sampler("gp", prior), _product_pruner("promote"), promotes=True)


ARMS = {
    "random, none": Arm(_product_sampler("random"), _product_pruner("none")),
    "tpe, asha": Arm(_product_sampler("tpe"), _product_pruner("asha")),
    "gp, asha": Arm(_product_sampler("gp"), _product_pruner("asha")),
    "gp, half": Arm(_product_sampler("gp"), _product_pruner("half")),
    "gp, promote": Arm(_product_sampler("gp"), _product_pruner("promote"), promotes=True),
    "gp, evidence": Arm(_product_sampler("gp"), _product_pruner("evidence")),
    "gp, promote; prior at the best": _gp_with_prior(lambda surface: surface.best),
    "gp, promote; prior at the defaults": _gp_with_prior(lambda surface: surface.default),
    "gp, promote; wrong prior": _gp_with_prior(lambda surface: (surface.best + 0.5) % 1),
    "tpe, evidence": Arm(_product_sampler("tpe"), _product_pruner("evidence")),
    "cmaes, asha": Arm(_product_sampler("cmaes"), _product_pruner("asha")),
    "tpe, Optuna Hyperband": Arm(_product_sampler("tpe"), lambda _: optuna.pruners.HyperbandPruner(GRACE, EPOCHS)),
    "tpe, Optuna Wilcoxon": Arm(_product_sampler("tpe"), lambda _: optuna.pruners.WilcoxonPruner()),
    "Optuna GP, asha": Arm(_optuna_gp, _product_pruner("asha")),
    "oracle, promote": Arm(_best_settings, _product_pruner("promote"), promotes=True),  # what luck leaves to gain
    "tpe, Ray ASHA": Arm(_product_sampler("tpe"), lambda _: RayAsha()),
}
POPULATION = "population-based training"


@dataclass
class Played:
    """A search that was played: what it reported in this order, and the true AP of its trials."""

    true: list[float] = field(default_factory=list)
    reports: list[tuple[int, float]] = field(default_factory=list)  # trial, its best AP so far; one for each epoch

    def epochs_until(self, target: float) -> float:
        """Return the epochs of drawn trials until one has an AP of ``target``; infinity if none has."""
        epochs = 0
        for number, value in self.reports:
            epochs += number > 0
            if number and value >= target:
                return epochs
        return math.inf

    def gain(self, epochs: float = math.inf) -> float:
        """Return the true AP of the best trial after so many epochs, less that of trial 0."""
        used, best, chosen = 0, -math.inf, 0
        for number, value in self.reports:
            used += number > 0
            if used > epochs:
                break
            if value > best:
                best, chosen = value, number
        return self.true[chosen] - self.true[0]


def play(surface: Surface, arm: Arm, trials: int, concurrent: int, epochs: float = math.inf, stream: int = 0) -> Played:
    """Play a search.

    Args:
        surface: What stands for the trainings.
        arm: How settings are drawn and trials are stopped.
        trials: The number of trials, including trial 0.
        concurrent: How many run at a time; an epoch takes each of them about as long.
        epochs: The search ends after so many epochs of drawn trials.
        stream: Seeds the draws and the trainings beside the surface. Searches of the same stream that draw at random draw the same
            settings, and their trainings are equally lucky.
    """
    study = optuna.create_study(study_name="played", direction="maximize", pruner=arm.pruner(trials))  # Hyperband hashes the name
    study.enqueue_trial(surface.space.drawn(surface.base))
    played, queue, used, paused = Played(), [], 0, {}
    random = np.random.default_rng([surface.seed, 9, stream])
    pace = np.exp(random.normal(0, PACE_SD, trials))

    def start(now: float) -> None:
        promoted = next_promotion(study.get_trials(deepcopy=False), HALF) if arm.promotes else None
        if promoted is not None:
            epoch, trial, curve = paused[promoted]
            trial.set_user_attr(PROMOTED, epoch)
            heapq.heappush(queue, (now + pace[promoted], promoted, epoch + 1, trial, curve))
            return
        number = len(played.true)
        if number == trials:
            return
        study.sampler = arm.sampler(surface, [surface.seed, number, stream], trials)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = study.ask()
            settings = surface.space.suggest(trial, surface.base)
        point = np.clip(surface.point({**surface.base, **settings}), 0, 1)
        played.true.append(surface.true(point))
        curve = np.fmax.accumulate(surface.curve(point, number, stream))
        heapq.heappush(queue, (now + pace[number], number, 1, trial, curve))

    for _ in range(concurrent):
        start(0.0)
    while queue and used < epochs:
        now, number, epoch, trial, curve = heapq.heappop(queue)
        value, used = float(curve[epoch - 1]), used + (number > 0)
        diverged = math.isnan(value)
        played.reports.append((number, -math.inf if diverged else value))
        if not diverged:
            trial.report(value, epoch)
        if epoch == EPOCHS:
            study.tell(trial, None if diverged else value, TrialState.FAIL if diverged else TrialState.COMPLETE)
        elif not diverged and trial.should_prune() and number:  # trial 0 is never stopped, and the others are compared with it
            study.tell(trial, state=TrialState.PRUNED)
        elif not diverged and arm.promotes and number and epoch == last_rung(epoch, GRACE, REDUCTION):
            if number in best_of_rung(study.get_trials(deepcopy=False), epoch, HALF):
                heapq.heappush(queue, (now + pace[number], number, epoch + 1, trial, curve))
                continue
            trial.set_user_attr(PAUSED, epoch)
            paused[number] = epoch, trial, curve
        else:
            heapq.heappush(queue, (now + pace[number], number, epoch + 1, trial, curve))
            continue
        for _ in range(concurrent - len(queue)):  # a report may have made others the best of their rung
            start(now)
    return played


def play_population(surface: Surface, trials: int) -> Played:
    """Play population-based training by raydetr's own rule, which is that of Ray's PBT, with four turns as in a search.

    A trial that takes over another's weights has its progress and its luck, and its new settings show at once. Trial 0 has the default
    settings and keeps its weights.
    """
    played, random = Played(), np.random.default_rng([surface.seed, 3])
    starts = [
        optuna.create_study(sampler=make_sampler("random", [surface.seed, number], trials, surface.space)).ask() for number in range(trials)
    ]
    drawn = [surface.space.drawn({**surface.base, **surface.space.suggest(trial, surface.base)}) for trial in starts]
    drawn[0] = surface.space.drawn(surface.base)
    progress, luck, best = np.zeros(trials), random.normal(0, SEED_SD, trials), np.zeros(trials)
    for epoch in range(EPOCHS):
        for number in range(trials):
            if number and epoch and epoch % math.ceil(EPOCHS / TURNS) == 0:
                others = set(range(trials)) - {number}
                other = better_trial(dict(enumerate(best)), number, others, random)
                if other is not None:
                    drawn[number] = moved(surface.space, drawn[other], random)
                    progress[number], luck[number], best[number] = progress[other], luck[other], best[other]
            point = np.clip(surface.point({**surface.base, **drawn[number]}), 0, 1)
            share = surface.progress(point)
            before = share[epoch - 1] if epoch else 0.0
            progress[number] += (1 - progress[number]) * max(0.0, (share[epoch] - before) / max(1 - before, 1e-9))
            value = progress[number] * (surface.on_validation(point) + luck[number]) + EPOCH_SD * random.standard_normal()
            best[number] = max(best[number], value)
            played.reports.append((number, float(best[number])))
    played.true = [surface.true(np.clip(surface.point({**surface.base, **settings}), 0, 1)) for settings in drawn]
    return played


@dataclass(frozen=True)
class Outcome:
    """What a search reached: AP in points, and epochs as a share of random search's."""

    share: float  # until it has random search's best; infinity if it never has
    used: float
    gain: float
    quarter: float  # the gain after a quarter of the budget


def play_against_random(kind: str, seed: int, arms: Sequence[str], concurrent: int) -> dict[str, Outcome]:
    """Play a search of every arm on one surface.

    Random search without early stopping sets the target, the highest AP that it saw, and the budget of epochs. Every arm gets twice its
    trials and the same budget. The target's draws and luck are its own: other samplers begin with random draws, and with the same ones
    they would find the best of them again.
    """
    surface, trials = Surface(kind, seed), RANDOM_TRIALS[concurrent]
    random = play(surface, ARMS["random, none"], trials, concurrent, stream=1)
    target, budget = max(value for number, value in random.reports if number), EPOCHS * (trials - 1)
    outcomes = {}
    for name in arms:
        is_population = name == POPULATION  # it stops no trial, so that it has as many as random search
        played = play_population(surface, trials) if is_population else play(surface, ARMS[name], 2 * trials, concurrent, budget)
        used = sum(number > 0 for number, _ in played.reports)
        outcomes[name] = Outcome(played.epochs_until(target) / budget, used / budget, 100 * played.gain(), 100 * played.gain(budget / 4))
    return outcomes


def measure_played(surfaces: Sequence[str], concurrent: Sequence[int], arms: Sequence[str], seeds: Sequence[int]) -> str:
    """Return the table of what searches reach, on each surface and on all of them, paired with the first arm."""
    rows = []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for at_a_time in concurrent:
        everywhere = []
        for kind in surfaces:
            searches = [play_against_random(kind, seed, arms, at_a_time) for seed in seeds]
            rows += [[f"{kind} ({KINDS[kind].about})", at_a_time, *_row(searches, name, arms[0])] for name in arms]
            everywhere += searches
        if len(surfaces) > 1:
            rows += [["all", at_a_time, *_row(everywhere, name, arms[0])] for name in arms]
    heading = ["surface", "at a time", "sampler, scheduler", "share of random search's epochs", "never", "epochs used", "true gain, AP"]
    return table(rows, [*heading, "at a quarter", f"against {arms[0]}", "faster, slower than it"])


def _row(searches: Sequence[dict[str, Outcome]], name: str, reference: str) -> list[str]:
    own, other = ([each[arm] for each in searches] for arm in (name, reference))
    pairs = list(zip(own, other, strict=True))
    faster, slower = sum(one.share < two.share for one, two in pairs), sum(one.share > two.share for one, two in pairs)
    return [
        name,
        f"{statistics.median(each.share for each in own):.2f}".replace("inf", "-"),
        f"{100 * statistics.mean(math.isinf(each.share) for each in own):.0f} %",
        f"{statistics.mean(each.used for each in own):.2f}",
        _mean([each.gain for each in own]),
        _mean([each.quarter for each in own]),
        "" if name == reference else _mean([one.gain - two.gain for one, two in pairs]),
        "" if name == reference else f"{faster}, {slower}",
    ]


def _mean(values: Sequence[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.1f} +- {error:.1f}"
