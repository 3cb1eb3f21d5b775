"""Whether the importances of a report are true: ``python -m benchmarks.importance``.

Searches with early stopping are played on response surfaces (``benchmarks/surfaces.py``), where the main effect of every setting is
known. The table compares raydetr's importances, which learn from all trials, with Optuna's PED-ANOVA over the complete trials, which
reports commonly show.
"""

import tempfile
from pathlib import Path

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from scipy.stats import rankdata

from benchmarks.measure import options, table
from benchmarks.played import GRACE
from benchmarks.surfaces import EPOCHS, KINDS, Surface
from raydetr.config import load_config
from raydetr.search.importance import importances
from raydetr.search.study import Search, create_search

POINTS, STEPS = 256, 9  # of the space that a true effect is averaged over, and of the effect
NO_EFFECT = 0.01  # share in all true effects below which a setting counts as one without effect


def true_shares(surface: Surface) -> dict[str, float]:
    """Return the variance of each setting's main effect on the true AP, as a share of the sum over all settings."""
    names = list(surface.distributions)
    points = np.random.default_rng(0).random((POINTS, len(names)))
    effects = {}
    for index, name in enumerate(names):
        means = []
        for value in np.linspace(0, 1, STEPS):
            points_there = points.copy()
            points_there[:, index] = value
            means.append(np.mean([surface.true(point) for point in points_there]))
        effects[name] = float(np.var(means))
    return {name: effect / sum(effects.values()) for name, effect in effects.items()}


def play_search(folder: Path, surface: Surface, trials: int) -> Search:
    """Play a search by TPE with ASHA, raydetr's defaults, one trial at a time."""
    config = load_config({**surface.base, "optim.epochs": EPOCHS})
    search = create_search(folder, surface.space, config, trials=trials, sampler="tpe", pruner="asha", grace=GRACE, seed=surface.seed)
    while (asked := search.ask()) is not None:
        number, settings = asked
        point = np.clip(surface.point({**surface.base, **settings}), 0, 1)
        curve = np.fmax.accumulate(surface.curve(point, number))
        for epoch, value in enumerate(curve, 1):
            search.report(number, epoch, float(value))
            if search.should_stop(number):
                search.tell(number, "pruned")
                break
        else:
            search.tell(number, "complete", float(curve[-1]))
    return search


def ped_anova(search: Search) -> dict[str, float]:
    """Return Optuna's importances of the complete trials, empty where they say nothing."""
    if sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in search.frozen()) < 2:
        return {}
    found = get_param_importances(search.study, evaluator=PedAnovaImportanceEvaluator())
    return found if any(found.values()) else {}


def agreement(found: dict[str, float], truth: dict[str, float]) -> tuple[float, bool]:
    """Return the rank correlation of importances with the true ones, and whether the most important setting is right."""
    names = list(truth)
    correlation = np.corrcoef(rankdata([found.get(name, 0.0) for name in names]), rankdata([truth[name] for name in names]))[0, 1]
    return float(correlation), max(names, key=lambda name: found.get(name, 0.0)) == max(truth, key=lambda name: truth[name])


def measure(kind: str, trials: int, seeds: range) -> list[list]:
    """Return the rows of the table for searches of ``trials`` trials on surfaces of one kind."""
    scores: dict[str, list[tuple[float, bool]]] = {"raydetr": [], "PED-ANOVA": []}
    claims, false = 0, 0
    for seed in seeds:
        surface = Surface(kind, seed)
        truth = true_shares(surface)
        with tempfile.TemporaryDirectory() as folder:
            search = play_search(Path(folder) / "search", surface, trials)
            ours = importances(search, seed)[0]
            theirs = ped_anova(search)
        if ours:
            scores["raydetr"].append(agreement({each.name: each.share for each in ours}, truth))
        if theirs:
            scores["PED-ANOVA"].append(agreement(theirs, truth))
        named = [each.name for each in ours if each.matters]
        claims, false = claims + len(named), false + sum(truth[name] < NO_EFFECT for name in named)
    rows = []
    for who, each in scores.items():
        correlation, first = np.array(each or [(np.nan, np.nan)], float).T
        said = f"{len(each)} of {len(seeds)}"
        numbers = [f"{correlation.mean():.2f}", f"{100 * first.mean():.0f} %"] if each else ["", ""]
        rows.append([f"{kind} ({KINDS[kind].about})", trials, who, said, *numbers, f"{false} of {claims}" if who == "raydetr" else ""])
    return rows


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, repeats=24)
    parser.add_argument("--surfaces", nargs="+", choices=list(KINDS), default=["A", "B", "D"])
    parser.add_argument("--trials", type=int, nargs="+", default=[20, 50], help="of a search (default 20 50)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    chosen = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = range(chosen.first, chosen.first + (2 if chosen.quick else chosen.repeats))
    rows = [row for kind in chosen.surfaces for trials in chosen.trials for row in measure(kind, trials, seeds)]
    header = ["surface", "trials", "importances by", "something said", "rank correlation", "first is right", "named, without effect"]
    print(table(rows, header))


if __name__ == "__main__":
    main()
