"""Simulate a search on 64 to 512 GPUs: how busy it keeps them, and what that costs: ``python -m benchmarks.scale``.

The search process is real, the only one that all trials share: ``tune`` runs as for any search, with Ray Tune's controller, its placement
groups on a raylet, the study and its journal. What the GPUs do is simulated: the raylet only says that it has them, and the actors of all
trials live in one process, because a process each would take 100 MB and more. An actor waits as long as a process takes to start, then as
long as an epoch takes, and answers what the response surface of ``benchmarks.search`` says. Network and storage are not simulated: what
goes over them is measured in one real run and multiplied.
"""

import argparse
import asyncio
import contextlib
import io
import pickle
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import ray
import ray.tune
from ray import cloudpickle
from ray.air.execution.resources.placement_group import PlacementGroupAcquiredResources
from ray.tune.result import DONE, RESULT_DUPLICATE

from benchmarks.measure import RAY, first_line, machine, table
from benchmarks.search import SURFACE, make_config, surface_ap
from raydetr.config import load_config, to_dict
from raydetr.launch.slots import weights_bytes
from raydetr.launch.trial import unpacked
from raydetr.launch.tune import tune
from raydetr.training.fit import fit
from raydetr.training.metrics import LAST_EPOCH

START_S, RESET_S = 4.9, 0.85  # a trial's first process, a process's next trial: benchmarks/README.md, Search
JITTER = 0.05  # of an epoch's length, either way
EPOCHS = 9  # of a trial that nobody stops
UNITS = {1: "B", 1e3: "kB", 1e6: "MB", 1e9: "GB"}


class PlayedTrial(ray.tune.Trainable):
    """A simulated trial that reports like :func:`raydetr.launch.trial.run_trial`, without training."""

    def setup(self, config: dict[str, Any]) -> None:
        """Start with the settings that the search has assigned."""
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start again with other settings."""
        assigned = unpacked(new_config)
        self.settings, self.epoch, self.told = to_dict(assigned.config), 0, False
        self.gathered, self.due = assigned.gathered, None
        return True

    @property
    def trains(self) -> bool:
        """Whether there are epochs left."""
        return self.epoch < self.settings["optim"]["epochs"]

    def end_epoch(self) -> None:
        """End an epoch, after which a report may be due."""
        self.epoch += 1
        ends = {} if self.trains else {LAST_EPOCH: True}
        self.due = self.gathered.add({"epoch": self.epoch, "AP": surface_ap(self.settings, self.epoch), **ends})

    def step(self) -> dict[str, Any]:
        """Return the report that is due; after the last one the final report, twice, as Ray Tune's function trainables do."""
        if self.due:
            due, self.due = self.due, None
            return due
        if self.told:
            return {DONE: True, RESULT_DUPLICATE: True}
        self.told = True
        return {"epoch": self.epoch, "AP": surface_ap(self.settings, self.epoch), "finished": True}


@cast(Any, ray.remote)(num_cpus=0, max_concurrency=4096)
class Stage:
    """The actor in which all simulated trials live."""

    def __init__(self, epoch_seconds: float, start_s: float, reset_s: float):
        self.epoch_seconds, self.start_s, self.reset_s = epoch_seconds, start_s, reset_s
        self.trials: dict[int, PlayedTrial] = {}
        self.random = random.Random(0)
        self.done = 0.0
        self.running: dict[int, float] = {}  # seconds of ended epochs, the others' begin
        self.began: float | None = None  # when the first trial was given a GPU
        self.given = 0.0, 0.0  # when the last trial was given one, and the seconds of epochs until then

    async def start(self, number: int, make: bytes) -> None:
        """Wait as long as a process takes to start, then make its first trial."""
        self._note()
        await asyncio.sleep(self.start_s)
        self.trials[number] = PlayedTrial(**pickle.loads(make))

    async def call(self, number: int, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a method of trial ``number``, after the time that it would take: for a report that of its epochs."""
        while number not in self.trials:  # asked before it had begun
            await asyncio.sleep(0.05)
        trial = self.trials[number]
        if method == "reset":
            self._note()
            await asyncio.sleep(self.reset_s)
        while method == "train" and trial.trains and not trial.due:
            seconds = self.epoch_seconds * (1 + JITTER * self.random.uniform(-1, 1))
            self.running[number] = time.monotonic()
            await asyncio.sleep(seconds)
            del self.running[number]
            self.done += seconds  # that it may have woken later is no work
            trial.end_epoch()
        if method == "stop":
            del self.trials[number]
        return getattr(trial, method)(*args, **kwargs)

    def _note(self) -> None:
        now = time.monotonic()
        self.began = self.began or now
        self.given = now, self.done + sum(now - began for began in self.running.values())

    async def played(self) -> dict[str, float]:
        """Return the GPU seconds in epochs and the elapsed seconds, in total and until the last trial got its GPU (``_given``)."""
        assert self.began is not None
        return {
            "busy": self.done,
            "seconds": time.monotonic() - self.began,
            "busy_given": self.given[1],
            "seconds_given": self.given[0] - self.began,
        }


class PlayedActor:
    """Stands in for the actor handle of a trial."""

    count = 0

    def __init__(self, stage, make: dict[str, Any]):
        PlayedActor.count += 1
        self._stage, self._number = stage, PlayedActor.count
        self._started = stage.start.remote(self._number, cast(Any, cloudpickle).dumps(make))

    @property
    def __ray_ready__(self):
        return _Method(lambda: self._started)

    def __getattr__(self, method: str):
        return _Method(lambda *args, **kwargs: self._stage.call.remote(self._number, method, args, kwargs))


class _Method:
    def __init__(self, remote):
        self.remote = remote


def play_on(stage) -> None:
    """Make Ray Tune in this process run its trials on ``stage``. Their placement groups stay real."""

    class OnStage:
        def remote(self, **kwargs):
            return PlayedActor(stage, kwargs)

    PlacementGroupAcquiredResources._annotate_remote_entity = lambda *_, **__: OnStage()


def measure(folder: Path, gpus: int, trials: int, epoch_seconds: float, start_s: float = START_S, reset_s: float = RESET_S) -> list:
    """Run a search of ``trials`` on so many GPUs and return its row of the table."""
    ray.init(address="local", num_cpus=gpus, num_gpus=gpus, include_dashboard=False, **RAY)
    try:
        stage = cast(Any, Stage).remote(epoch_seconds, start_s, reset_s)
        play_on(stage)
        config = make_config(folder, f"scale-{gpus}", EPOCHS, train=4, val=2)
        cpu = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            search = tune(config, SURFACE, trials=trials)
        cpu = time.process_time() - cpu
        played: Any = ray.get(stage.played.remote())
    finally:
        ray.shutdown()
    ended = search.frozen()
    assert len(ended) == trials
    assert all(trial.state.is_finished() for trial in ended)
    epochs = sum(len(trial.intermediate_values) for trial in ended)
    return [
        gpus,
        trials,
        f"{search.sampler}, {search.scheduler}",
        f"{epoch_seconds:g} s",
        f"{epochs / played['seconds']:.1f}",
        f"{100 * played['busy_given'] / gpus / played['seconds_given']:.0f} %",
        f"{100 * played['busy'] / gpus / played['seconds']:.0f} %",
        f"{1000 * cpu / epochs:.1f} ms",
        f"{100 * cpu / played['seconds']:.0f} %",
        f"{(search.folder / 'study.journal').stat().st_size / epochs / 1000:.1f} kB",
    ]


HEADER = (
    "GPUs",
    "trials",
    "sampler, scheduler",
    "an epoch",
    "epochs a second",
    "GPUs busy until the last trial began",
    "in all",
    "CPU time of the search per epoch",
    "of one core",
    "journal per epoch",
)


def traffic(folder: Path) -> list[list]:
    """Return the rows of the second table: the bytes that a trial moves, measured in a real run of two epochs.

    A checkpoint is weights and multiples of them (moments of the optimizer, the moving average), hence as many times larger.
    """
    config = make_config(folder, "traffic", 2, train=8, val=4)
    config.run.pictures = 0  # a trial draws some in its first and its last epoch only
    with contextlib.redirect_stdout(io.StringIO()):
        fit(config)
    run = folder / "runs" / "traffic"
    large = weights_bytes(load_config({"model.preset": "detr_resnet50"})) / weights_bytes(config)
    last, best = ((run / name).stat().st_size for name in ("last.pth", "best.pth"))
    events = sum(file.stat().st_size for file in (run / "tb").iterdir())
    log = (run / "log.txt").stat().st_size
    pictures = 3 * 1024 * 768 * 1000
    return [
        ["decoded pictures, 1000 of 1024 x 768", "object store", "once per node", size(pictures), ""],
        ["settings of a trial", "Ray", "once per trial", size(len(pickle.dumps(to_dict(config)))), ""],
        ["last.pth", "storage", "every epoch", size(last), size(large * last)],
        ["best.pth", "storage", "an epoch that is the best so far", size(best), size(large * best)],
        ["TensorBoard events, log.txt", "storage", "every epoch", size((events + log) / 2), "the same"],
        ["at once, 512 GPUs and epochs of 60 s", "storage", "", rate(512 / 60 * last), rate(512 / 60 * large * last)],
    ]


def size(number: float) -> str:
    """Return a number of bytes in a readable unit."""
    unit = next(unit for unit in UNITS if number < 1000 * unit or unit == max(UNITS))
    return f"{number / unit:.3g} {UNITS[unit]}"


def rate(number: float) -> str:
    """Return bytes per second in a readable unit."""
    return size(number) + "/s"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--trials-per-gpu", type=int, default=3)
    parser.add_argument("--epoch-seconds", type=float, default=20.0, help="of every trial (default 20)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    chosen = parser.parse_args()
    waits = (0.2, 0.05, 0.02) if chosen.quick else (chosen.epoch_seconds, START_S, RESET_S)
    print(machine(), "\n")
    epoch, start, reset = waits
    print(f"Epochs of {epoch:g} s (+- {100 * JITTER:.0f} %), {EPOCHS} a trial;", end=" ")
    print(f"{start:g} s until a process has started, {reset:g} s until its next trial has.\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for gpus in [4] if chosen.quick else chosen.gpus:
            rows.append(measure(Path(folder), gpus, gpus * chosen.trials_per_gpu, *waits))
            print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        print(table(rows, HEADER), "\n")
        print(table(traffic(Path(folder)), ["what", "through", "when", "detr_tiny", "detr_resnet50"]))


if __name__ == "__main__":
    main()
