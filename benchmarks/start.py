"""How long the commands take to begin: ``raydetr --help``, and ``raydetr train`` until its first step: ``python -m benchmarks.start``."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.measure import machine, options, spread, table
from raydetr.data import balloons
from raydetr.data.convert import convert

RAYDETR = [sys.executable, "-m", "raydetr.cli"]
HELP_TARGET_S, TRAIN_TARGET_S = 0.3, 12.0


def help_seconds(clock: Callable[[], float] = time.perf_counter) -> float:
    """Of ``raydetr --help``, the whole process."""
    began = clock()
    subprocess.run([*RAYDETR, "--help"], check=True, stdout=subprocess.DEVNULL)
    return clock() - began


def cpu_seconds() -> float:
    """CPU time of all processes that this one has started and seen end."""
    times = os.times()
    return times.children_user + times.children_system


def first_step_seconds(data: Path, storage: Path, preset: str, name: str) -> float:
    """From the start of ``raydetr train`` to the end of its first step, with weights that need no download."""
    began = time.time()
    flags = ["--preset", preset, "--weights", "none", "--data", data, "--storage", storage, "--name", name, "--epochs", 1]
    subprocess.run([*RAYDETR, "train", *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
    return EventAccumulator(str(storage / name / "tb")).Reload().Scalars("train/loss")[0].wall_time - began


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__.splitlines()[0], repeats=3).parse_args()
    repeats = 1 if chosen.quick else chosen.repeats
    preset = "detr_tiny" if chosen.quick else "detr_resnet50"
    print(machine(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        balloons.generate(root / "photographs", train=2, val=1)
        convert(root / "photographs", root / "data")
        help_seconds()  # the first one compiles
        helps = [help_seconds() for _ in range(max(repeats, 3))]
        busy = [help_seconds(cpu_seconds) for _ in range(max(repeats, 3))]
        steps = [first_step_seconds(root / "data", root / "runs", preset, f"run-{number}") for number in range(repeats)]
    rows = [
        ["raydetr --help", spread(helps), f"{HELP_TARGET_S} s"],
        ["the same, CPU time", spread(busy), ""],
        [f"raydetr train, {preset}", spread(steps), f"{TRAIN_TARGET_S:.0f} s"],
    ]
    print(table(rows, ["from the command to its first answer or step", "time", "target"]))


if __name__ == "__main__":
    main()
