"""Measure what the settings of the recipe that are off by default bring: ``python -m benchmarks.recipe --data BCCD``.

Each setting, alone against the defaults, fine-tunes ``detr_tiny`` with the same seeds on generated balloons and, with ``--data``, on the
photographs of that folder (blood cells, in any format that ``raydetr data convert`` reads). A seed also draws which part of the training
images is used. The model of the last epoch is scored on held-out images, by which nothing was chosen. The interval is Student's t over the
paired differences of the seeds. Time is the CPU time of an epoch.

Each training is a line of ``--out``. The same command continues where it was interrupted, and more ``--seeds`` add to what is there.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from benchmarks.measure import first_line, machine, table
from raydetr.config import load_config
from raydetr.data.formats.convert import convert
from raydetr.demo import balloons
from raydetr.predict.score import score_checkpoint
from raydetr.training.fit import fit
from raydetr.training.reporter import LocalReporter
from raydetr.training.resume import LAST

SETTINGS: dict[str, list[Any]] = {
    "data.color": [0.5],
    "data.zoom_out": [0.3],
    "data.copy_paste": [0.5],
    "data.balance": [1.0],
    "optim.layer_decay": [0.8],
    "optim.freeze_layers": [1],
    "loss.query_groups": [3],
}
NO_EFFECT = {"balloons": ("data.balance",), "cells": ("data.copy_paste",)}  # one category only; no masks
WATCHED = 4  # held-out images that a run looks at after every epoch, because it needs some
DEFAULTS = "defaults"


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set: the name in the table, its COCO folder, and the fraction of its training images that each seed draws."""

    name: str
    folder: Path
    fraction: float


def prepare(name: str, source: Path, folder: Path, training_images: int) -> Images:
    """Convert images. What the source has for validation becomes the test set."""
    found = convert(source, folder)
    annotations = folder / "annotations"
    (folder / "val2017").rename(folder / "test2017")
    (annotations / "custom_val.json").rename(annotations / "custom_test.json")
    coco = json.loads((annotations / "custom_test.json").read_text())
    coco["images"] = coco["images"][:WATCHED]
    watched = {image["id"] for image in coco["images"]}
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] in watched]
    (annotations / "custom_val.json").write_text(json.dumps(coco))
    return Images(name, folder, min(1.0, training_images / found.images["train"]))


def variants(settings: Mapping[str, Sequence[Any]], images: Images) -> Iterator[tuple[str, Any]]:
    """Yield the settings to compare and their values, the defaults first."""
    yield DEFAULTS, None
    for setting, values in settings.items():
        if setting not in NO_EFFECT[images.name]:
            yield from ((setting, value) for value in values)


class Clock(LocalReporter):
    """A reporter that shows nothing and reads the CPU time at the end of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def show(self, event: dict[str, Any]) -> None:
        """Note the end of an epoch."""
        if event["kind"] == "epoch":
            self.ends.append(time.process_time())

    def seconds(self) -> float | None:
        """Return the median CPU seconds of an epoch, without the first."""
        return statistics.median(np.diff(self.ends)) if len(self.ends) > 1 else None


def measure(images: Images, setting: str, value: Any, seed: int, epochs: int) -> dict[str, Any]:
    """Train once and return AP on the test images and the CPU seconds of an epoch."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as storage:
        data = {"data.path": str(images.folder), "data.val_images": str(images.folder / "test2017"), "data.fraction": images.fraction}
        run = {"run.storage": storage, "run.name": "run", "run.seed": seed, "optim.epochs": epochs, "data.num_workers": 0}
        changed = {} if setting == DEFAULTS else {setting: value}
        fit(load_config({"model.preset": "detr_tiny"}, data, run, changed), clock)
        scores = score_checkpoint(Path(storage) / "run" / LAST, data, split="test")
    return {"AP": scores["AP"], "seconds": clock.seconds()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the trainings in ``file``; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of paired differences and both ends of its 95 % interval, NaN for a single pair."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    half = float(stdtrit(len(differences) - 1, 0.975)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def summarize(lines: Sequence[Mapping[str, Any]], epochs: int) -> list[list[Any]]:
    """Return the rows of the table, from the trainings of so many epochs."""
    found: dict[tuple[str, str, Any], dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        if line["epochs"] == epochs:
            found.setdefault((line["images"], line["setting"], line["value"]), {})[line["seed"]] = line
    rows = []
    for (name, setting, value), runs in found.items():
        defaults = found.get((name, DEFAULTS, None), {})
        seeds = sorted(runs.keys() & defaults.keys())
        if not seeds:
            continue
        mean_ap = f"{100 * statistics.mean(runs[seed]['AP'] for seed in seeds):.1f}"
        if setting == DEFAULTS:
            rows.append([name, setting, "", len(seeds), mean_ap, "", "", ""])
            continue
        mean, low, high = interval([100 * (runs[seed]["AP"] - defaults[seed]["AP"]) for seed in seeds])
        verdict = "" if len(seeds) == 1 else "yes" if low > 0 else "harms" if high < 0 else "not shown"
        gain = f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if len(seeds) > 1 else "")
        ratios = [
            runs[seed]["seconds"] / defaults[seed]["seconds"] for seed in seeds if runs[seed]["seconds"] and defaults[seed]["seconds"]
        ]
        slower = f"{statistics.median(ratios):.2f}x" if ratios else ""
        rows.append([name, setting, str(value), len(seeds), mean_ap, gain, verdict, slower])
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--data", type=Path, help="labeled photographs of blood cells; without them only balloons are measured")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each setting (default 3)")
    parser.add_argument("--epochs", type=int, default=15, help="of each training (default 15)")
    parser.add_argument("--images", type=int, nargs=2, default=[60, 80], help="training images of both sets (default 60 80)")
    parser.add_argument("--out", type=Path, default=Path("recipe.jsonl"), help="one line for each training (default recipe.jsonl)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    chosen = parser.parse_args()
    drawn, epochs, seeds = chosen.images[0], chosen.epochs, chosen.seeds
    generated, test = 2 * drawn, 64
    if chosen.quick:
        drawn, generated, test, epochs, seeds = 2, 4, 4, 2, 1
    settings = {name: SETTINGS[name] for name in chosen.settings}
    with tempfile.TemporaryDirectory() as folder:
        balloons.generate(Path(folder) / "photographs", train=generated, val=test)
        sets = [prepare("balloons", Path(folder) / "photographs", Path(folder) / "balloons", drawn)]
        if chosen.data:
            sets.append(prepare("cells", chosen.data, Path(folder) / "cells", chosen.images[1]))
        done = {tuple(line[key] for key in ("images", "setting", "value", "seed", "epochs")) for line in read_lines(chosen.out)}
        for seed in range(seeds):  # outermost, so that an interrupted measurement has whole comparisons
            for images in sets:
                for setting, value in variants(settings, images):
                    if (images.name, setting, value, seed, epochs) in done:
                        continue
                    line = {"images": images.name, "setting": setting, "value": value, "seed": seed, "epochs": epochs}
                    line |= measure(images, setting, value, seed, epochs)
                    with chosen.out.open("a") as file:
                        print(json.dumps(line), file=file)
    print(machine(), f"; {epochs} epochs\n", sep="")
    header = ["images", "setting", "value", "seeds", "AP", "gain in points", "pays", "time of an epoch"]
    print(table(summarize(read_lines(chosen.out), epochs), header))


if __name__ == "__main__":
    main()
