"""Tools of the benchmarks: contenders that take turns, tables, a line about the machine, the peak memory of a process."""

import argparse
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

# Arguments for ray.init. By default Ray runs its workers at a lower priority than the processes that they are compared with.
RAY = {"logging_level": "error", "log_to_driver": False, "_system_config": {"worker_niceness": 0}}


def interleaved(
    contenders: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time contenders that take turns.

    Every round calls each contender once, in a random order (the same in every run), so that whatever slows the machine slows all
    of them.

    Args:
        contenders: a function for each name.
        repeats: number of rounds that count.
        warmup: number of rounds before them that do not.
        clock: ``time.process_time`` excludes the time of other processes; use it for work of this process alone.

    Returns:
        The seconds of each contender's calls. Work on a GPU is included.
    """
    order = random.Random(0)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + repeats):
        for name in order.sample(names, len(names)):
            taken = _seconds(contenders[name], clock)
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    wait()
    began = clock()
    call()
    wait()
    return clock() - began


def wait() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> float:
    """Return the time of ``peer`` divided by that of ``ours``: the median of the ratios of all rounds."""
    return statistics.median(other / own for other, own in zip(seconds[peer], seconds[ours], strict=True))


def spread(values: Sequence[float]) -> str:
    """Return times in seconds as text, ``median (lowest to highest)``, in seconds or milliseconds."""
    scale, unit = (1, "s") if statistics.median(values) >= 1 else (1000, "ms")
    middle, low, high = (f"{scale * each:.3g}" for each in (statistics.median(values), min(values), max(values)))
    return f"{middle} {unit} ({low} to {high})"


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Return a Markdown table. Floats have two decimals."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def machine() -> str:
    """Return one line about the machine: processor, cores, GPU, version of torch."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts at the memory of the parent process
        (most,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(most) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Child:
    """A contender in its own process, ``python -m module arguments``, which runs :func:`serve`.

    It shares neither memory nor settings of the allocator with others. Calling the object makes one call there and waits for it.
    """

    def __init__(self, module: str, *arguments: object):
        command, root = [sys.executable, "-m", module, *map(str, arguments)], Path(__file__).parents[1]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        assert self._process.stdin
        assert self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self._name = f"{module} {' '.join(map(str, arguments))}"

    def __call__(self) -> str:
        """Make one call and return the answer. Raises RuntimeError if the process has ended."""
        print(file=self._input, flush=True)
        answer = self._output.readline().strip()
        if not answer:
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}")
        return answer

    def close(self) -> float:
        """End the process and return its peak memory in MiB."""
        self._input.close()
        most = float(self._output.read())
        self._process.wait()
        return most


def serve(call: Callable[[], object], on_gpu: bool) -> None:
    """Make one call for every line of standard input and answer each with a line. At the end print the peak memory in MiB."""
    for _ in sys.stdin:
        call()
        wait()
        print("done", flush=True)
    print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory())


def first_line(docstring: str | None) -> str:
    """Return the first line of a module's docstring, which ``--help`` shows."""
    return (docstring or "").partition("\n")[0]


def options(docstring: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with ``--repeats`` and ``--quick``, which all benchmarks take."""
    parser = argparse.ArgumentParser(description=first_line(docstring))
    parser.add_argument("--repeats", type=int, default=repeats, help=f"rounds that count (default {repeats})")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    return parser
