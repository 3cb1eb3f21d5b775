"""A search as Ray Tune sees it: which trial is next and where, which go on, how they ended. What is remembered is in search.py."""

import dataclasses
import math
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raydetr import config as settings
from raydetr.launch.nodes import is_of_machine
from raydetr.launch.places import Demands, Places, holds
from raydetr.search.study import Search
from raydetr.search.trials import TrialsDisplay
from raydetr.storage import LAST, copy, fetch, is_uri, join, push, working_folder
from raydetr.training.metrics import REPORTED, WHERE
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.files import written_whole

TRIALS_FOLDER = "trials"  # in the search's folder: a run folder for each trial
TO_GO_ON = ("optimizer", "lr_scheduler", "scaler", "ema", "random")  # what a checkpoint holds for a run that is not finished
TURNS = 4  # how often in a run a trial of population-based training may go on from another
ROOM_INTERVAL_S = 1.0  # between two looks at the cluster for places
HOPELESS = 3  # trials that all failed before their first epoch: the rest would fail, too


class StudySearcher(Searcher):
    """Ray Tune's view of the study: asks it for trials and tells it how they ended."""

    def __init__(self, search: Search, demands: Demands, places: Places):
        super().__init__(metric=search.metric, mode="max")
        self.search, self.demands, self.places = search, demands, places
        self.live: dict[str, str | None] = {}  # trials under way, by Ray Tune's id, and the machine that each is meant for
        self._machines: dict[str, int] = {}
        self._looked = -math.inf
        self._stripping = ThreadPoolExecutor(max_workers=1)  # beside the controller, which would hear no trial meanwhile

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stripping": None}  # Ray Tune keeps a copy on the disk that nobody reads; a thread is nothing to keep

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, as :func:`run_trial` takes it; None while there is no room for one."""
        population = self.search.scheduler == "pbt"
        if not population and len(self.live) >= self.room():
            return None
        asked = self.search.ask(trial_id)
        if asked is None:
            return Searcher.FINISHED
        self.search.push()  # before the trial leaves anything there
        self.live[trial_id] = None if population else self.machine()
        return self.assigned(asked[0]) | {"machine": self.live[trial_id]}

    def machines(self) -> dict[str, int]:
        """How many trials, or workers of trials, each machine holds that is there now, by its id."""
        if time.monotonic() - self._looked > ROOM_INTERVAL_S:
            self._machines = {node["NodeID"]: holds(node["Resources"], self.places) for node in ray.nodes() if node["Alive"]}
            self._looked = time.monotonic()
        return self._machines

    def room(self) -> int:
        """How many trials may be under way: as many as were asked for, else as the cluster holds now."""
        return self.demands.concurrent or max(1, sum(self.machines().values()) // self.demands.workers)

    def machine(self) -> str | None:
        """The machine that a trial to be packed is meant for, the fullest that has a place; None: any, for Ray the emptiest."""
        if self.demands.placement != "pack" or self.demands.workers > 1:
            return None
        taken = Counter(self.live.values())
        free = {machine: places - taken[machine] for machine, places in self.machines().items()}
        return min((machine for machine in free if free[machine] > 0), key=lambda machine: (free[machine], machine), default=None)

    def assigned(self, number: int) -> dict[str, Any]:
        """A trial as :func:`run_trial` takes it, with the settings that it has now."""
        config = self.search.config(number)
        config.run.storage, config.run.name = join(self.search.place, TRIALS_FOLDER), self.search.trial_name(number)
        config.run.workers = self.demands.workers
        return {
            "number": number,
            "metric": self.search.metric,
            "settings": settings.to_dict(config),
            "searched": self.search.space.hparam_domains(self.search.base),
            "places": dataclasses.asdict(self.places),
            "machine": None,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing: the scheduler has the study note it."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study; a trial that was only interrupted stays unfinished, to be gone on with."""
        self.live.pop(trial_id, None)
        number = self.search.number(trial_id)
        if number is None:
            return
        result = result or {}
        if result.get("failed"):
            self.search.tell(number, "failed", reason=result["failed"])
        elif error:
            self.search.tell(number, "failed", reason="its worker was lost again and again")
        elif result.get("finished"):
            self.search.tell(number, "complete", best_so_far(self.search, number, result), metrics=metrics_of(result))
        elif self.search.should_stop(number):
            self.search.tell(number, "pruned", metrics=metrics_of(result))
        else:
            return
        self.search.push()  # a trial that nobody knows to have ended goes on from what is stripped now
        self._stripping.submit(strip, trial_place(self.search, number))

    def close(self) -> None:
        """Wait for the checkpoints that are made smaller; one that fails stays as it is, no more."""
        self._stripping.shutdown()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is in its journal."""


class StudyScheduler(FIFOScheduler):
    """Notes every epoch's objective in the study, stops the trials that the study's pruner gives up, and fails those lost too often."""

    def __init__(self, search: Search):
        super().__init__()
        self.search, self.max_failures = search, search.config(0).run.max_failures
        self.losses: Counter[str] = Counter()
        self.full = ""  # what a trial said of a full disk

    def on_trial_error(self, tune_controller, trial) -> None:
        """A trial lost its process; that counts, unless its machine went with it. Ray Tune will start it again."""
        file = trial.pickled_error_file
        if not (file and is_of_machine(ray.cloudpickle.loads(Path(file).read_bytes()))):
            self.losses[trial.trial_id] += 1

    def on_trial_add(self, tune_controller, trial) -> None:
        """A trial is to be started, for the first time or again."""
        if self.losses[trial.trial_id] > self.max_failures:
            tune_controller.search_alg.on_trial_complete(trial.trial_id, error=True)
            tune_controller.stop_trial(trial)

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Continue or stop."""
        number = self.search.number(trial.trial_id)
        if result.get("full"):
            self.full = self.full or result["full"]
            tune_controller.request_stop_experiment()
            return FIFOScheduler.STOP
        if result.get("failed") or result.get("finished") or number is None:
            return FIFOScheduler.CONTINUE
        self.search.report(number, result["epoch"], best_so_far(self.search, number, result))
        return FIFOScheduler.STOP if self.search.should_stop(number) else FIFOScheduler.CONTINUE


class PopulationScheduler(StudyScheduler):
    """Population-based training: at every turn a trial gives its place to one that is less far, and may go on from a better one."""

    def __init__(self, search: Search, searcher: StudySearcher):
        super().__init__(search)
        self.searcher = searcher
        optim = search.config(0).optim
        self.first, self.every, self.epochs = grace_epochs(optim), math.ceil(optim.epochs / TURNS), optim.epochs

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Continue, or stop for this turn."""
        decision, epoch = super().on_trial_result(tune_controller, trial, result), result["epoch"]
        if decision != FIFOScheduler.CONTINUE or result.get("failed") or result.get("finished"):
            return decision
        if epoch % self.every or not self.first <= epoch < self.epochs:
            return decision
        tune_controller.pause_trial(trial, should_checkpoint=False)  # its folder holds the checkpoint
        return FIFOScheduler.NOOP

    def choose_trial_to_run(self, tune_controller):
        """A trial that has not begun, else, where there is a place, the one that is least far."""
        trials = tune_controller.get_trials()
        pending = next((trial for trial in trials if trial.status == Trial.PENDING), None)
        paused = [trial for trial in trials if trial.status == Trial.PAUSED]
        running = sum(trial.status == Trial.RUNNING for trial in trials)
        if pending or not paused or running >= self.searcher.room():
            return pending
        chosen = min(paused, key=lambda trial: trial.last_result["epoch"])
        self._turn(chosen)
        return chosen

    def _turn(self, trial) -> None:
        number, epoch = self.search.number(trial.trial_id), trial.last_result["epoch"]
        other = self.search.better_trial(number, epoch)
        if other is not None:
            copy_weights(trial_place(self.search, other), trial_place(self.search, number))
            self.search.take_over(number, other, epoch)
            self.search.push()
            trial.set_config(self.searcher.assigned(number))


class Hopeless(ray.tune.Stopper):
    """Ends a search whose first trials all failed without a single epoch."""

    def __init__(self, search: Search):
        self.search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Never a single trial."""
        return False

    def stop_all(self) -> bool:
        """Whether to end the search."""
        trials = self.search.frozen()
        if any(trial.intermediate_values for trial in trials):  # asked after every event, and soon true of the first trial
            return False
        return sum("reason" in trial.user_attrs for trial in trials) >= HOPELESS


class Watcher(ray.tune.Callback):
    """Shows the trials as they go."""

    def __init__(self, search: Search, display: TrialsDisplay):
        self.search, self.display = search, display

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune keeps its callbacks on the disk; a terminal is nothing to keep, and a search is gone on with by the study alone.
        return {"search": self.search, "display": None}

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict[str, Any], **info) -> None:
        """An epoch of a trial."""
        number = self.search.number(trial.trial_id)
        if number is not None and "epoch" in result:
            self.display.epoch(number, result)

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        """Trials may have begun or ended."""
        self.display.refresh()


def grace_epochs(optim: settings.Optim) -> int:
    """The first epoch at which a trial may be stopped: after the warm-up, and never the very first."""
    warmup = optim.warmup * optim.epochs if optim.warmup < 1 else optim.warmup
    return min(int(warmup) + 2, optim.epochs)


def trial_place(search: Search, number: int) -> str:
    """Where the run of a trial is kept."""
    return join(search.place, TRIALS_FOLDER, search.trial_name(number))


def trial_folder(search: Search, number: int) -> Path:
    """The run folder of a trial; where the search is in a store, its working copy on this machine."""
    return working_folder(trial_place(search, number))


def best_so_far(search: Search, number: int, result: Mapping[str, Any]) -> float:
    """The objective of a trial after the epoch that ``result`` tells of: the highest of the search's metric."""
    noted = search.frozen()[number].intermediate_values.values()
    here = [result[name] for name in (search.metric, f"best_{search.metric}") if name in result]
    return max([*noted, *here], default=float("nan"))


def metrics_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that ``fit`` reported, and where the trial ran, from a result with keys of Ray Tune's own."""
    return {name: result[name] for name in (*REPORTED, *WHERE) if name in result}


def copy_weights(source: str, target: str) -> None:
    """Put a trial's checkpoints in the place of another's."""
    for name in ("best.pth", "last.pth"):
        if is_uri(source):
            copy(join(source, name), join(target, name))
        else:
            copy_file(Path(source, name), Path(target, name))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that appears whole or not at all."""
    with source.open("rb") as content, written_whole(target) as out:
        shutil.copyfileobj(content, out)


def strip(trial: str) -> None:
    """Take what only serves to go on out of the last checkpoint of a finished trial, by its place: the weights stay."""
    checkpoint = fetch(trial, only=LAST) / LAST
    if checkpoint.exists():
        content = read_checkpoint(checkpoint)
        if not content.keys().isdisjoint(TO_GO_ON):
            save_checkpoint(checkpoint, {name: value for name, value in content.items() if name not in TO_GO_ON})
            push(trial, only=LAST)
