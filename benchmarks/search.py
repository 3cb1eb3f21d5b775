"""What a search costs beside its trainings, and what it saves: ``python -m benchmarks.search [start|controller|overhead|reach]``.

``start``: from the moment that a trial's settings are asked for to its first training step, in a reused process and through an inner
TorchTrainer of two workers. ``controller``: CPU time of the searching process per report, over trials that do not train but follow a
response surface. ``overhead``: what of an epoch of the demo goes into event files and into the report, where a trial waits for the
search, and what the search takes beside it. ``reach``: epochs that TPE with ASHA trains until it has the AP that random search without
early stopping ends at, as a share of random search's epochs, with real trainings on generated balloons.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import ray.tune
from optuna.trial import FrozenTrial
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.measure import RAY, machine, table
from raydetr.config import Config, load_config, to_dict
from raydetr.data.formats.convert import convert
from raydetr.demo import balloons
from raydetr.launch import trial as launched
from raydetr.launch import tune as launcher
from raydetr.launch.scheduling import Hopeless, grace_epochs, trial_folder
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Demands
from raydetr.launch.tune import tune
from raydetr.search.space import read_space
from raydetr.search.study import Search, create_search, epochs_of
from raydetr.training import tracking

SURFACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"loguniform": [0.01, 1.0]}}
# As one draws who knows little of the network and the pictures.
REACH_SPACE = {
    **SURFACE,
    "optim.lr_backbone": {"loguniform": [1e-5, 1e-2]},
    "loss.giou_loss_coef": {"loguniform": [0.25, 8.0]},
}
REACH_TARGET = 0.25  # of random search's epochs


def make_config(folder: Path, name: str, epochs: int, seed: int = 0, train: int = 64, val: int = 16) -> Config:
    """Settings of the demo's trials; the pictures are made where ``folder`` has none yet."""
    data = folder / f"balloons-{seed}-{train}"
    if not data.exists():
        balloons.generate(folder / "photographs", train=train, val=val, seed=seed)
        convert(folder / "photographs", data)
    run = {"run.storage": str(folder / "runs"), "run.name": name, "run.seed": seed, "optim.epochs": epochs}
    return load_config({"model.preset": "detr_tiny", "data.path": str(data), "data.num_workers": 0}, run)


# ------------------------------------------------------------------------------------------------------------------- start


def starts(search: Search) -> list[float]:
    """Of each trial the seconds from being asked for to the end of its first training step."""
    seconds = []
    for trial in search.frozen():
        events = EventAccumulator(str(trial_folder(search, trial.number) / "tb")).Reload()
        seconds.append(events.Scalars("train/loss")[0].wall_time - trial.datetime_start.timestamp())
    return seconds


def measure_start(folder: Path, trials: int) -> None:
    """Print how long trials take to begin."""
    rows = []
    for workers in (1, 2):
        config = make_config(folder, f"start-{workers}", epochs=1, train=16, val=4)
        demands = Demands(workers=workers, concurrent=1)
        first, *others = starts(tune(config, "tiny", trials=trials, scheduler="none", demands=demands))
        what = "inner TorchTrainer of 2 workers" if workers == 2 else "in a reused process"
        rows.append([what, f"{first:.2f} s", f"{statistics.median(others):.2f} s"])
    print(table(rows, ["from a trial's settings to its first step", "first trial", "later ones (median)"]))


# -------------------------------------------------------------------------------------------------------------- controller


def surface_ap(settings: dict[str, Any], epoch: int) -> float:
    """A response surface: AP after ``epoch`` with one optimum in learning rate and no-object weight, which slow rates reach late."""
    lr, eos = settings["optim"]["lr"], settings["loss"]["eos_coef"]
    height = math.exp(-(math.log10(lr / 5e-4) ** 2) - 0.5 * math.log10(eos / 0.2) ** 2)
    return 0.7 * height * (1 - math.exp(-epoch * (lr / 5e-4) ** 0.3 / 3))


def follow_surface(assigned: dict[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """In place of a training: reports what the surface says."""
    settings = to_dict(assigned["config"])
    for epoch in range(1, settings["optim"]["epochs"] + 1):
        values = {"epoch": epoch, "AP": surface_ap(settings, epoch)}
        ray.tune.report(values)
    ray.tune.report({**values, "finished": True})


def measure_controller(folder: Path, trials: int) -> None:
    """Print what a report costs the searching process."""
    launcher.run_trial = follow_surface
    config = make_config(folder, "controller", epochs=9, train=4, val=2)
    cpu, wall = time.process_time(), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        search = tune(config, SURFACE, trials=trials)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    reports = sum(len(trial.intermediate_values) for trial in search.frozen())
    row = [trials, reports, f"{1000 * cpu / reports:.1f} ms", f"{wall:.0f} s"]
    print(table([row], ["trials", "reports", "CPU time of the search per report", "in all"]))


# ---------------------------------------------------------------------------------------------------------------- overhead


EVENTS, REPORT, EPOCH = "writing TensorBoard events", "the report, and the wait for the next epoch", "an epoch in all"


class Watch:
    """Seconds of wall clock and of this thread's CPU time, by what they went into."""

    def __init__(self):
        self.spent = {}
        self.restart()

    def restart(self) -> dict[str, list[float]]:
        """What was spent since the last time, with :data:`EPOCH` for all of it; begins anew."""
        now, before = (time.perf_counter(), time.thread_time()), getattr(self, "began", (0.0, 0.0))
        spent = {**self.spent, EPOCH: [end - begin for end, begin in zip(now, before, strict=True)]}
        self.spent, self.began = {EVENTS: [0.0, 0.0], REPORT: [0.0, 0.0]}, now
        return spent

    def over(self, what: str, call: Callable) -> Callable:
        """``call``, with what it takes added to ``what``."""

        @functools.wraps(call)
        def watched(*arguments, **named):
            began = time.perf_counter(), time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                ended = time.perf_counter(), time.thread_time()
                self.spent[what] = [sum_ + end - begin for sum_, end, begin in zip(self.spent[what], ended, began, strict=True)]

        return watched


def trial_watched(folder: Path, assigned: dict[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """What Ray Tune calls for a trial here: the product's own, with a clock on its event files and reports."""
    watch, epochs = Watch(), []
    Tracker = type("Tracker", (tracking.Tracker,), {})
    for name in ("log_step", "log_epoch", "log_pictures", "flush"):
        setattr(Tracker, name, watch.over(EVENTS, getattr(Tracker, name)))

    class Reporter(launched.TuneReporter):
        def show(self, event: dict) -> None:
            if event["kind"] in ("start", "epoch"):
                epochs.append(watch.restart())

    Reporter.report = watch.over(REPORT, Reporter.report)
    with mock.patch.object(launched, "TuneReporter", Reporter), mock.patch("raydetr.training.recorder.Tracker", Tracker):
        launched.run_trial(assigned, images)
    (folder / f"{assigned['number']}.json").write_text(json.dumps(epochs[2:]))  # not the first epoch, and not what was before it


def measure_overhead(folder: Path, trials: int, epochs: int, train: int = 64, val: int = 16) -> None:
    """Print what a search adds to an epoch."""
    config = make_config(folder, "overhead", epochs, train=train, val=val)
    launcher.run_trial = functools.partial(trial_watched, folder)
    cpu = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        tune(config, "tiny", trials=trials, scheduler="none", sampler="random")
    cpu = (time.process_time() - cpu) / trials / epochs
    spent = [epoch for file in folder.glob("*.json") for epoch in json.loads(file.read_text())]
    medians = {what: [statistics.median(epoch[what][clock] for epoch in spent) for clock in (0, 1)] for what in (EVENTS, REPORT, EPOCH)}
    rows = [[what, *(f"{1000 * each:.1f} ms" for each in medians[what]), *shares(medians[what], medians[EPOCH])] for what in medians]
    rows.append(["the searching process, beside it", "", f"{1000 * cpu:.1f} ms", "", f"{100 * cpu / medians[EPOCH][1]:.1f} %"])
    print(table(rows, ["of an epoch of the demo", "time", "CPU time", "share", "share of CPU time"]))


def shares(part: Sequence[float], whole: Sequence[float]) -> list[str]:
    """In percent."""
    return [f"{100 * one / all_:.1f} %" for one, all_ in zip(part, whole, strict=True)]


# ------------------------------------------------------------------------------------------------------------------- reach


class Reached(Hopeless):
    """Ends a search that has an AP of ``target`` in a trial other than trial 0."""

    target = math.inf

    def stop_all(self) -> bool:
        """Whether to end the search."""
        return super().stop_all() or self.has(self.search.frozen())

    @classmethod
    def has(cls, trials: Sequence[FrozenTrial]) -> bool:
        """Whether a trial has it."""
        return any(value >= cls.target for each in trials[1:] for value in each.intermediate_values.values())


def measure_reach(folder: Path, trials: int, epochs: int, repeats: int, run_arm: Callable) -> None:
    """Print the share of random search's epochs after which TPE with ASHA has its AP; that gets twice the trials, for ASHA ends most.

    ``run_arm`` is :func:`train_arm` or :func:`play_arm`.
    """
    launcher.Hopeless = Reached
    shares = []
    for seed in range(repeats):
        random = run_arm(folder, "random", "none", trials, epochs, seed)
        Reached.target = max(each.value for each in random[1:] if each.value is not None)
        found = run_arm(folder, "tpe", "asha", 2 * trials, epochs, seed)
        budget, used = (sum(map(epochs_of, arm[1:])) for arm in (random, found))
        shares.append(used / budget if Reached.has(found) else math.inf)
        print(
            f"seed {seed}: AP {Reached.target:.3f} of random search in {budget} epochs; of TPE + ASHA in {used}, {shares[-1]:.2f}",
            flush=True,
        )
        Reached.target = math.inf
    middle, low, high = statistics.median(shares), min(shares), max(shares)
    print(f"\nshare of random search's epochs: {middle:.2f} ({low:.2f} to {high:.2f}); target {REACH_TARGET}")


def play_arm(folder: Path, sampler: str, scheduler: str, trials: int, epochs: int, seed: int) -> list[FrozenTrial]:
    """The trials of a search that does not train but follows the response surface, one trial after the other."""
    config = load_config({"optim.epochs": epochs})
    options = {"trials": trials, "sampler": sampler, "pruner": scheduler, "grace": grace_epochs(config.optim), "seed": seed}
    search = create_search(folder / f"{sampler}-{seed}", read_space(SURFACE), config, **options)
    while not Reached.has(search.frozen()) and (asked := search.ask()):
        play_trial(search, asked[0], epochs)
    return search.frozen()


def play_trial(search: Search, number: int, epochs: int) -> None:
    """Report what the response surface says, as long as the search wants to hear it."""
    settings, best = to_dict(search.config(number)), 0.0
    for epoch in range(1, epochs + 1):
        best = max(best, surface_ap(settings, epoch))
        search.report(number, epoch, best)
        if search.should_stop(number):
            search.tell(number, "pruned")
            return
        if Reached.has(search.frozen()):
            return
    search.tell(number, "complete", best)


def train_arm(folder: Path, sampler: str, scheduler: str, trials: int, epochs: int, seed: int) -> list[FrozenTrial]:
    """The trials of a search, trained."""
    config = make_config(folder, f"{sampler}-{seed}", epochs, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        return tune(config, REACH_SPACE, trials=trials, sampler=sampler, scheduler=scheduler, seed=seed).frozen()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["start", "controller", "overhead", "reach"])
    parser.add_argument("--trials", type=int, help="default: 4 (start, overhead), 500 (controller), 20 (reach)")
    parser.add_argument("--epochs", type=int, default=9, help="of each trial of overhead and reach (default 9)")
    parser.add_argument("--repeats", type=int, default=3, help="seeds of reach (default 3)")
    parser.add_argument("--played", action="store_true", help="reach: on the response surface of controller instead of training")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    chosen = parser.parse_args()
    print(machine(), "\n")
    if not chosen.played:
        ray.init(address="local", num_cpus=2, include_dashboard=chosen.what == "start", resources={DRIVER: 4}, **RAY)
    with tempfile.TemporaryDirectory() as temporary:
        folder, quick = Path(temporary), chosen.quick
        if chosen.what == "start":
            measure_start(folder, 2 if quick else chosen.trials or 4)
        elif chosen.what == "controller":
            measure_controller(folder, 6 if quick else chosen.trials or 500)
        elif chosen.what == "overhead":
            measure_overhead(folder, *((1, 3, 4, 2) if quick else (chosen.trials or 4, chosen.epochs)))
        else:
            measure_reach(
                folder,
                *((2, 2, 1) if quick else (chosen.trials or 20, chosen.epochs, chosen.repeats)),
                play_arm if chosen.played else train_arm,
            )
    ray.shutdown()


if __name__ == "__main__":
    main()
