"""Compare ``fit`` under Ray Train's TorchTrainer with ``fit`` under torchrun, on two workers: ``python -m benchmarks.train``.

And beside one process alone, which shows what the second worker gains. Each worker has one thread and the same batch size. An epoch of
the demo is measured from its first step until rank 0 is ready for the next: with evaluation, checkpoint, event files and the report. The
three take turns, epoch by epoch; the first does not count. What Ray's other processes do, they do all the time, in the others' turns as
well: it is told apart.
"""

import argparse
import contextlib
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
import torch.distributed as dist

from benchmarks.measure import RAY, first_line, machine, ratio, spread, table
from benchmarks.search import make_config
from benchmarks.turns import Turns, taking_turns
from raydetr.config import Config, load_config, read_yaml, write_yaml
from raydetr.launch import train as launcher
from raydetr.launch.ray_private import SPARING
from raydetr.training.fit import LocalReporter, fit

TORCH_TRAINER, TORCHRUN, ALONE = "TorchTrainer", "torchrun", "one process"
WORKERS = {TORCH_TRAINER: 2, TORCHRUN: 2, ALONE: 1}
TARGET = 1.02  # of TorchTrainer's epoch to torchrun's


def worker_in_turn(turns: Turns, loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """Run a Ray Train worker as raydetr does, with a reporter that waits for its turn."""
    launcher.TrainReporter = taking_turns(launcher.TrainReporter, turns, TORCH_TRAINER)
    return launcher.train_worker(loop_config)


def start_torchrun(turns: Turns, name: str, config: Config) -> subprocess.Popen:
    """Start a contender without Ray in its own processes."""
    write_yaml(config, turns.folder / f"{name}.yaml")
    workers = WORKERS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m", "benchmarks.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = ["--contender", name, "--folder", str(turns.folder), "--epochs", str(turns.epochs)]
    return subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.DEVNULL)


def run_plain(turns: Turns, name: str) -> None:
    """Run the process of a contender under torchrun."""
    dist.init_process_group("gloo")
    reporter = taking_turns(LocalReporter, turns, name)
    fit(load_config(read_yaml(turns.folder / f"{name}.yaml")), reporter())
    dist.destroy_process_group()


def run_all(folder: Path, epochs: int, train: int, val: int) -> tuple[Turns, float]:
    """Run all contenders. Return their turns, and the share of a core that the driver and Ray's other processes take."""
    turns = Turns(folder / "turns", WORKERS, epochs)
    turns.folder.mkdir()
    configs = {}
    for name, workers in WORKERS.items():
        configs[name] = config = make_config(folder, name.replace(" ", "-"), epochs, train=train, val=val)
        config.run.workers = workers if name == TORCH_TRAINER else 1
    plain = [start_torchrun(turns, name, configs[name]) for name in (TORCHRUN, ALONE)]
    trained_by = launcher.train_worker
    launcher.train_worker = functools.partial(worker_in_turn, turns)
    try:
        with ThreadPoolExecutor() as pool, contextlib.redirect_stdout(io.StringIO()):
            share = pool.submit(share_of_others, turns, {process.pid for process in plain})
            launcher.train(configs[TORCH_TRAINER])
            for process in plain:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
            return turns, share.result()
    finally:
        launcher.train_worker = trained_by
        for process in plain:
            process.terminate()


def share_of_others(turns: Turns, plain: set[int]) -> float:
    """Return the share of a core that this process and Ray's own take between TorchTrainer's first and last epoch."""
    turns.wait_for(TORCH_TRAINER, 1)
    before, began = cpu_of_others(plain), time.monotonic()
    turns.wait_for(TORCH_TRAINER, turns.epochs)
    after = cpu_of_others(plain)
    return sum(seconds - before[pid] for pid, seconds in after.items() if pid in before) / (time.monotonic() - began)


def cpu_of_others(plain: set[int]) -> dict[int, float]:
    """Return the CPU seconds of this process and its children by process id, without those that train."""
    seconds, left = {}, [psutil.Process()]
    while left:
        process = left.pop()
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            left += [child for child in process.children() if child.pid not in plain]
            if "RayTrainWorker" not in " ".join(process.cmdline()):
                seconds[process.pid] = sum(process.cpu_times()[:2])
    return seconds


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--epochs", type=int, default=12, help="of each (default 12; the first does not count)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    parser.add_argument("--contender", choices=[TORCHRUN, ALONE], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.contender:
        run_plain(Turns(chosen.folder, WORKERS, chosen.epochs), chosen.contender)
        return
    epochs, train, val = (2, 8, 2) if chosen.quick else (chosen.epochs, 64, 16)
    print(machine(), "\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {**SPARING, **os.environ}
        ray.init(address="local", num_cpus=2, include_dashboard=False, **RAY)
        turns, share = run_all(Path(folder), epochs, train, val)
        ray.shutdown()
        seconds, cpu = {name: turns.seconds(name) for name in WORKERS}, {name: turns.cpu_seconds(name) for name in WORKERS}
        rows = [
            [name, workers, spread(seconds[name]), 1 / ratio(seconds, TORCHRUN, name), f"{cpu[name]:.2f} s"]
            for name, workers in WORKERS.items()
        ]
    rows[0].append(TARGET)
    print(table([[*row, ""][:6] for row in rows], ["who", "workers", "an epoch", "to torchrun", "CPU time of the workers", "target"]), "\n")
    faster, work = ratio(seconds, ALONE, TORCHRUN), cpu[ALONE] / cpu[TORCHRUN]
    print(f"From one process to two: {faster:.2f} times as fast, an efficiency of {faster / 2:.2f}; at most {work:.2f} by the CPU time.")
    print(f"Ray's other processes and the driver: {share:.2f} of a core all the time.")


if __name__ == "__main__":
    main()
