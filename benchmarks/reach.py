"""Compare searches with real trainings of ``detr_tiny``: ``python -m benchmarks.search reach --data BCCD``.

For each seed, random search without early stopping sets the target, the highest AP that it saw, and the budget of epochs. Every other
search gets twice its trials and the same budget. The settings that a search chooses are then scored on test images, by which nothing was
chosen, beside the default settings. A seed also draws which training images are used.

Each search is a line of ``--out``. The same command continues where it was interrupted, and more ``--repeats`` add to what is there.
"""

import contextlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from benchmarks.measure import table
from benchmarks.recipe import interval, read_lines
from raydetr.config import Config, load_config
from raydetr.data.formats.convert import convert
from raydetr.data.tools.split import split
from raydetr.demo import balloons
from raydetr.launch import tune as launcher
from raydetr.launch.scheduling import Hopeless, trial_folder
from raydetr.launch.slots import Demands
from raydetr.launch.tune import tune
from raydetr.predict.score import score_checkpoint
from raydetr.search.record import epochs_of
from raydetr.search.study import Search

# Wide ranges, as if little were known about the network and the images.
SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-2]},
    "loss.eos_coef": {"loguniform": [0.01, 1.0]},
    "optim.lr_backbone": {"loguniform": [1e-5, 1e-2]},
    "loss.giou_loss_coef": {"loguniform": [0.25, 8.0]},
}
RANDOM, OTHERS = ("random", "none"), (("tpe", "asha"), ("gp", "promote"))
RANDOM_SEED = 1000  # is added to that of a random search: other samplers begin with random draws, which must not be the same
VAL, TEST = 0.25, 0.3  # shares of the images
GENERATED = 240  # images, where no data is given


class Budget(Hopeless):
    """Ends a search after ``budget`` epochs of drawn trials, and notes after how many one of them had an AP of ``target``."""

    budget = target = math.inf
    reached: int | None = None

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        drawn = self.search.frozen()[1:]
        used = sum(map(epochs_of, drawn))
        if Budget.reached is None and any(best_of(trial) >= self.target for trial in drawn):
            Budget.reached = used
        return super().stop_all() or used >= self.budget


def best_of(trial: FrozenTrial) -> float:
    """Return the highest AP of a trial, also of one that was cut short by the end of the search."""
    return max(trial.intermediate_values.values(), default=-math.inf)


def prepare(folder: Path, source: Path | None = None, generated: int = GENERATED) -> Path:
    """Return a COCO folder with validation and test images, made from labeled photographs, or from generated ones."""
    if source is None:
        source = folder / "photographs"
        balloons.generate(source, train=generated - 2, val=2)
    convert(source, folder / "converted")
    split(folder / "converted", folder / "data", val=VAL, test=TEST)
    return folder / "data"


def make_config(data: Path, storage: Path, name: str, seed: int, epochs: int, images: int) -> Config:
    """Return the settings of trial 0, which trains on so many images."""
    total = len(json.loads((data / "annotations" / "custom_train.json").read_text())["images"])
    run = {"run.storage": str(storage), "run.name": name, "run.seed": seed, "run.pictures": 0, "optim.epochs": epochs}
    files = {"data.path": str(data), "data.num_workers": 0, "data.fraction": min(1.0, images / total)}
    return load_config({"model.preset": "detr_tiny"}, files, run)


def search_once(config: Config, method: tuple[str, str], trials: int, seed: int, concurrent: int, target: float, budget: float) -> dict:
    """Run one search, and return its best AP, its epochs, and the AP of the chosen and of the default settings on test images."""
    Budget.target, Budget.budget, Budget.reached = target, budget, None
    with contextlib.redirect_stdout(io.StringIO()):
        found = tune(
            config, SPACE, trials=trials, sampler=method[0], scheduler=method[1], seed=seed, demands=Demands(concurrent=concurrent)
        )
    drawn = found.frozen()[1:]
    chosen = max(found.frozen(), key=best_of)
    return {
        "AP": max(map(best_of, drawn)),
        "trials": len(drawn),
        "used": sum(map(epochs_of, drawn)),
        "reached": Budget.reached,
        "test": on_test_images(found, chosen.number),
        "default": on_test_images(found, 0),
    }


def on_test_images(found: Search, number: int) -> float:
    """Return the AP of a trial's best weights on the test images."""
    return score_checkpoint(Path(trial_folder(found, number)) / "best.pth", {"data.path": found.base["data.path"]}, split="test")["AP"]


def measure_reach(folder: Path, out: Path, data: Path, trials: int, epochs: int, images: int, repeats: int, concurrent: int) -> str:
    """Run the searches that ``out`` does not have yet, and return the table."""
    launcher.Hopeless = Budget
    plan = {"trials": trials, "epochs": epochs, "images": images, "concurrent": concurrent}
    for seed in range(repeats):
        for method in (RANDOM, *OTHERS):
            lines = [line for line in read_lines(out) if line["plan"] == plan and line["seed"] == seed]
            if any(line["search"] == ", ".join(method) for line in lines):
                continue
            is_random = method == RANDOM
            random = {} if is_random else next(line for line in lines if line["search"] == ", ".join(RANDOM))
            config = make_config(data, folder, f"{method[0]}-{seed}", seed, epochs, images)
            found = search_once(
                config,
                method,
                trials if is_random else 2 * trials,
                seed + RANDOM_SEED * is_random,
                concurrent,
                random.get("AP", math.inf),
                random.get("used", math.inf),
            )
            with out.open("a") as file:
                print(json.dumps({**found, "plan": plan, "seed": seed, "search": ", ".join(method)}), file=file)
    return summarize([line for line in read_lines(out) if line["plan"] == plan])


def summarize(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of searches: shares, and what the chosen settings gain on test images."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["search"], {})[line["seed"]] = line
    random, rows = found[", ".join(RANDOM)], []
    for name, runs in found.items():
        seeds = sorted(runs)
        reached = [runs[seed]["reached"] for seed in seeds]
        shares = [math.inf if each is None else each / random[seed]["used"] for each, seed in zip(reached, seeds, strict=True)]
        gain = interval([100 * (runs[seed]["test"] - runs[seed]["default"]) for seed in seeds])
        against = interval([100 * (runs[seed]["test"] - random[seed]["test"]) for seed in seeds])
        is_random = runs is random
        rows.append(
            [
                name,
                len(seeds),
                "" if is_random else f"{statistics.median(shares):.2f} ({', '.join(f'{each:.2f}' for each in shares)})".replace("inf", "-"),
                "" if is_random else f"{sum(map(math.isinf, shares))} of {len(seeds)}",
                f"{statistics.mean(runs[seed]['used'] / random[seed]['used'] for seed in seeds):.2f}",
                f"{100 * statistics.mean(runs[seed]['AP'] for seed in seeds):.1f}",
                _with_interval(gain),
                "" if is_random else _with_interval(against),
            ]
        )
    heading = ["sampler, scheduler", "seeds", "share of random search's epochs", "never", "epochs used", "best AP"]
    return table(rows, [*heading, "gain over the defaults on test images", "over random search's"])


def _with_interval(found: tuple[float, float, float]) -> str:
    mean, low, high = found
    return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")
