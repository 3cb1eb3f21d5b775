"""Measure what a search costs besides its trainings, and what it saves: ``python -m benchmarks.search [start|controller|overhead|reach]``.

``start``: from the moment that a trial's settings are asked for to its first training step, in a reused process and through an inner
TorchTrainer of two workers. ``controller``: CPU time of the searching process per epoch, over trials that do not train but follow a
response surface, and that of Ray Tune without raydetr. ``overhead``: what of an epoch of the demo goes into event files and into the
report, where a trial waits for the search, and what the search takes beside it. ``reach``: epochs that searches train until they have the
AP that random search without early stopping ends at, as a share of random search's epochs, and what the chosen settings gain, with real
trainings (:mod:`benchmarks.reach`); ``reach --played``: the same on response surfaces, with many trials at a time and with published peers.
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
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.measure import RAY, first_line, machine, table
from benchmarks.played import ARMS, GRACE, POPULATION, RANDOM_TRIALS, measure_played
from benchmarks.reach import measure_reach, prepare
from benchmarks.surfaces import KINDS
from raydetr.config import Config, load_config, to_dict
from raydetr.data.formats.convert import convert
from raydetr.demo import balloons
from raydetr.launch import trial as launched
from raydetr.launch import tune as launcher
from raydetr.launch.scheduling import trial_folder
from raydetr.launch.session import DRIVER
from raydetr.launch.slots import Demands
from raydetr.launch.trial import unpacked
from raydetr.launch.tune import tune
from raydetr.search.methods import REDUCTION
from raydetr.search.study import Search
from raydetr.training import tracking
from raydetr.training.metrics import LAST_EPOCH

SURFACE = {"optim.lr": {"loguniform": [1e-5, 1e-2]}, "loss.eos_coef": {"loguniform": [0.01, 1.0]}}
CONTROLLER_EPOCHS = 9  # of a trial of controller that nobody stops


def make_config(folder: Path, name: str, epochs: int, seed: int = 0, train: int = 64, val: int = 16) -> Config:
    """Return settings like those of the demo's trials, and generate the images if ``folder`` has none yet."""
    data = folder / f"balloons-{seed}-{train}"
    if not data.exists():
        balloons.generate(folder / "photographs", train=train, val=val, seed=seed)
        convert(folder / "photographs", data)
    run = {"run.storage": str(folder / "runs"), "run.name": name, "run.seed": seed, "optim.epochs": epochs}
    return load_config({"model.preset": "detr_tiny", "data.path": str(data), "data.num_workers": 0}, run)


# ------------------------------------------------------------------------------------------------------------------- start


def starts(search: Search) -> list[float]:
    """Return the seconds from the proposal of each trial to the end of its first training step."""
    seconds = []
    for trial in search.frozen():
        events = EventAccumulator(str(trial_folder(search, trial.number) / "tb")).Reload()
        assert trial.datetime_start
        seconds.append(events.Scalars("train/loss")[0].wall_time - trial.datetime_start.timestamp())
    return seconds


def measure_start(folder: Path, trials: int) -> None:
    """Print how long trials take to start."""
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
    """Return the AP after ``epoch`` on a response surface with one optimum, which small learning rates reach late."""
    lr, eos = settings["optim"]["lr"], settings["loss"]["eos_coef"]
    height = math.exp(-(math.log10(lr / 5e-4) ** 2) - 0.5 * math.log10(eos / 0.2) ** 2)
    return 0.7 * height * (1 - math.exp(-epoch * (lr / 5e-4) ** 0.3 / 3))


def follow_surface(parameters: dict[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """Report the values of the response surface instead of training, as a trial of a search reports its epochs."""
    assigned = unpacked(parameters)
    settings, epochs = to_dict(assigned.config), assigned.config.optim.epochs
    for epoch in range(1, epochs + 1):
        values = {"epoch": epoch, "AP": surface_ap(settings, epoch)}
        if due := assigned.gathered.add(values | ({LAST_EPOCH: True} if epoch == epochs else {})):
            ray.tune.report(due)
    ray.tune.report({**values, "finished": True})


def follow_surface_alone(drawn: dict[str, float]) -> None:
    """Report the values of the response surface, as a trial of Ray Tune without raydetr."""
    settings = {"optim": {"lr": drawn["optim.lr"]}, "loss": {"eos_coef": drawn["loss.eos_coef"]}}
    for epoch in range(1, CONTROLLER_EPOCHS + 1):
        ray.tune.report({"epoch": epoch, "AP": surface_ap(settings, epoch)})


def search_alone(folder: Path, trials: int, searcher: Searcher | None, scheduler: TrialScheduler | None) -> int:
    """Search with Ray Tune without raydetr, and return the number of epochs. Its own loggers are off, as in raydetr's searches."""
    space = {name: ray.tune.loguniform(*bounds) for name, domain in SURFACE.items() for bounds in domain.values()}
    tuner = ray.tune.Tuner(
        follow_surface_alone,
        param_space=space,
        tune_config=ray.tune.TuneConfig(
            metric="AP", mode="max", num_samples=trials, search_alg=searcher, scheduler=scheduler, reuse_actors=True
        ),
        run_config=ray.tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    return sum(result.metrics["training_iteration"] for result in tuner.fit() if result.metrics)


def measure_controller(folder: Path, trials: int) -> None:
    """Print the CPU time of the search process for each epoch, without what a process does once, which is mostly imports."""
    launcher.run_trial = follow_surface
    asha = AsyncHyperBandScheduler("epoch", max_t=CONTROLLER_EPOCHS, grace_period=GRACE, reduction_factor=REDUCTION)

    def of_raydetr(name: str, trials: int, sampler: str | None = None, scheduler: str | None = None) -> int:
        config = make_config(folder, name, epochs=CONTROLLER_EPOCHS, train=4, val=2)
        found = tune(config, SURFACE, trials=trials, sampler=sampler, scheduler=scheduler)
        return sum(len(trial.intermediate_values) for trial in found.frozen())

    searches = {
        "raydetr: gp, promote": lambda: of_raydetr("gp", trials),
        "raydetr: tpe, asha": lambda: of_raydetr("tpe", trials, sampler="tpe", scheduler="asha"),
        "Ray Tune: OptunaSearch, ASHA": lambda: search_alone(folder / "optuna", trials, OptunaSearch(), asha),
        "Ray Tune: random settings, all epochs": lambda: search_alone(folder / "random", trials, None, None),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        of_raydetr("before", 4)
    rows = []
    for name, search in searches.items():
        cpu, wall = time.process_time(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            epochs = search()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        rows.append([name, trials, epochs, f"{1000 * cpu / epochs:.1f} ms", f"{1000 * cpu / trials:.0f} ms", f"{wall:.0f} s"])
    print(table(rows, ["search", "trials", "epochs", "CPU time of the search per epoch", "per trial", "in all"]))


# ---------------------------------------------------------------------------------------------------------------- overhead


EVENTS, REPORT, EPOCH = "writing TensorBoard events", "the report, and the wait for the next epoch", "an epoch in all"


class Watch:
    """Stopwatch of wall-clock time and of the CPU time of this thread, by activity."""

    def __init__(self):
        self.spent = {}
        self.restart()

    def restart(self) -> dict[str, list[float]]:
        """Return the seconds since the last restart, by activity, with the total under :data:`EPOCH`, and start again."""
        now, before = (time.perf_counter(), time.thread_time()), getattr(self, "began", (0.0, 0.0))
        spent = {**self.spent, EPOCH: [end - begin for end, begin in zip(now, before, strict=True)]}
        self.spent, self.began = {EVENTS: [0.0, 0.0], REPORT: [0.0, 0.0]}, now
        return spent

    def over(self, what: str, call: Callable) -> Callable:
        """Return ``call`` with its time added to ``what``."""

        @functools.wraps(call)
        def watched(*arguments, **named):
            began = time.perf_counter(), time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                ended = time.perf_counter(), time.thread_time()
                self.spent[what] = [sum_ + end - begin for sum_, end, begin in zip(self.spent[what], ended, began, strict=True)]

        return watched


def trial_watched(folder: Path, parameters: dict[str, Any], images: Sequence[ray.ObjectRef] = ()) -> None:
    """Run a trial as raydetr does, with a stopwatch on its event files and reports."""
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
        launched.run_trial(parameters, images)
    (folder / f"{unpacked(parameters).config.run.name}.json").write_text(
        json.dumps(epochs[2:])
    )  # not the first epoch, and not what was before it


def measure_overhead(folder: Path, trials: int, epochs: int, train: int = 64, val: int = 16) -> None:
    """Print the time that a search adds to an epoch."""
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
    """Return the shares of the whole, as text in percent."""
    return [f"{100 * one / all_:.1f} %" for one, all_ in zip(part, whole, strict=True)]


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=first_line(__doc__))
    parser.add_argument("what", choices=["start", "controller", "overhead", "reach"])
    parser.add_argument("--trials", type=int, help="default: 4 (start, overhead), 500 (controller), 10 (reach, of random search)")
    parser.add_argument("--epochs", type=int, default=9, help="of each trial of overhead and reach (default 9)")
    parser.add_argument("--repeats", type=int, help="seeds of reach (default 5; with --played 40)")
    parser.add_argument("--data", type=Path, help="labeled photographs that reach trains on (default: generated balloons)")
    parser.add_argument("--images", type=int, default=80, help="training images of reach, drawn by each seed (default 80)")
    parser.add_argument("--out", type=Path, default=Path("reach.jsonl"), help="one line for each search of reach (default reach.jsonl)")
    parser.add_argument("--played", action="store_true", help="reach: on response surfaces whose truth is known, instead of training")
    parser.add_argument("--surfaces", nargs="+", choices=list(KINDS), default=list(KINDS), help="of reach --played")
    parser.add_argument(
        "--concurrent",
        nargs="+",
        type=int,
        choices=list(RANDOM_TRIALS),
        default=[1, 8],
        help="trials at a time; reach without --played takes the first",
    )
    parser.add_argument(
        "--arms", nargs="+", choices=[*ARMS, POPULATION], default=[*ARMS, POPULATION], help="samplers and schedulers of reach --played"
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed of reach --played (default 0)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, its numbers mean nothing")
    chosen = parser.parse_args()
    print(machine(), "\n")
    if chosen.played:
        seeds = range(chosen.first, chosen.first + (1 if chosen.quick else chosen.repeats or 40))
        print(measure_played(chosen.surfaces[:1] if chosen.quick else chosen.surfaces, chosen.concurrent, chosen.arms, seeds))
        return
    cores = chosen.concurrent[0] if chosen.what == "reach" else 2  # one for each trial that trains
    ray.init(address="local", num_cpus=cores, include_dashboard=chosen.what == "start", resources={DRIVER: 4}, **RAY)
    with tempfile.TemporaryDirectory() as temporary:
        folder, quick = Path(temporary), chosen.quick
        if chosen.what == "start":
            measure_start(folder, 2 if quick else chosen.trials or 4)
        elif chosen.what == "controller":
            measure_controller(folder, 6 if quick else chosen.trials or 500)
        elif chosen.what == "overhead":
            measure_overhead(folder, *((1, 3, 4, 2) if quick else (chosen.trials or 4, chosen.epochs)))
        else:
            data = prepare(folder, chosen.data, *([12] if quick else []))
            sizes = (2, 2, 4, 1) if quick else (chosen.trials or 10, chosen.epochs, chosen.images, chosen.repeats or 5)
            print(measure_reach(folder / "runs", folder / "reach.jsonl" if quick else chosen.out, data, *sizes, chosen.concurrent[0]))
    ray.shutdown()


if __name__ == "__main__":
    main()
