"""Measure the start of ``raydetr --help`` and of ``raydetr train`` until its first step: ``python -m benchmarks.start``."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.measure import machine, options, spread, table
from raydetr.data.formats.convert import convert
from raydetr.demo import balloons

RAYDETR = [sys.executable, "-m", "raydetr.cli"]
HELP_TARGET_S, TRAIN_TARGET_S = 0.3, 12.0


def help_seconds(clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time of a process that runs ``raydetr --help``."""
    began = clock()
    subprocess.run([*RAYDETR, "--help"], check=True, stdout=subprocess.DEVNULL)
    return clock() - began


def cpu_seconds() -> float:
    """Return the CPU time of all ended children of this process."""
    times = os.times()
    return times.children_user + times.children_system


def first_step_seconds(data: Path, storage: Path, preset: str, workers: int, name: str) -> tuple[float, float]:
    """Return the seconds from the start of ``raydetr train`` to the begin and to the end of its first step.

    A step takes two pictures of 480 x 640 in each worker, as in :mod:`benchmarks.step`.
    """
    began = time.time()
    sizes = {"data.train_sizes": 480, "data.val_size": 480, "data.crop": 0, "optim.batch_size": 2, "optim.epochs": 1}
    values = {**sizes, "model.preset": preset, "model.weights": "none", "data.path": data, "run.storage": storage, "run.name": name}
    flags = [word for setting, value in values.items() for word in (f"--{setting}", str(value))]
    subprocess.run([*RAYDETR, "train", "--workers", str(workers), *flags], check=True, stdout=subprocess.DEVNULL)
    events = EventAccumulator(str(storage / name / "tb")).Reload()
    ended = events.Scalars("train/loss")[0].wall_time - began
    return ended - 2 * workers / events.Scalars("speed/images_per_second")[0].value, ended


def main() -> None:
    """Measure and print the tables."""
    chosen = options(__doc__, repeats=3).parse_args()
    repeats = 1 if chosen.quick else chosen.repeats
    preset = "detr_tiny" if chosen.quick else "detr_resnet50"
    print(machine(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        balloons.generate(root / "photographs", train=4, val=2)
        convert(root / "photographs", root / "data")
        help_seconds()  # the first one compiles
        helps = [help_seconds() for _ in range(max(repeats, 3))]
        busy = [help_seconds(cpu_seconds) for _ in range(max(repeats, 3))]
        steps = {
            workers: [first_step_seconds(root / "data", root / "runs", preset, workers, f"{workers}-{number}") for number in range(repeats)]
            for workers in ((1,) if chosen.quick else (1, 2))
        }
    rows = [
        ["raydetr --help", spread(helps), f"{HELP_TARGET_S} s"],
        ["the same, CPU time", spread(busy), ""],
    ]
    for workers, measured in steps.items():
        begins, ends = zip(*measured, strict=True)
        what = f"raydetr train, {preset}, {workers} worker{'s' * (workers > 1)}"
        rows.append([f"{what}, until the first step begins", spread(begins), f"{TRAIN_TARGET_S:.0f} s" * (workers == 1)])
        rows.append([f"{what}, until the first step ends", spread(ends), ""])
    print(table(rows, ["from the command", "time", "target"]))


if __name__ == "__main__":
    main()
