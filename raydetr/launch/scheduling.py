"""A search as Ray Tune sees it: which trial is next and where, which continue, how they ended. The study is what remembers."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from ray import cloudpickle
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.files import atomic_write
from raydetr.launch import ray_private
from raydetr.launch.nodes import NO_MEMORY, is_node_failure
from raydetr.launch.signals import Received
from raydetr.launch.slots import Demands, Slots, slots_on
from raydetr.launch.train import OUT_OF_MEMORY, RAY_FOLDER, TWICE
from raydetr.search.study import TRIALS_FOLDER, Search
from raydetr.search.trials import TrialsDisplay
from raydetr.storage import LAST, OWNER, copy, fetch, is_uri, join, push, remove_tokens, working_folder
from raydetr.text import count
from raydetr.training.metrics import REPORTED, WHERE
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint

RESUME_STATE = ("optimizer", "lr_scheduler", "scaler", "ema", "random")  # what a checkpoint holds only to be resumed from
TURNS = 4  # how often in a run a trial of population-based training may take over another's weights
ROOM_INTERVAL_S = 1.0  # between two looks at the cluster for free slots
HOPELESS = 3  # trials that all failed before their first epoch: the rest would fail as well
SILENCE_S = 600.0  # a running trial that reports nothing for so long is named,
SILENT_EPOCHS = 5  # unless the longest epoch so far took more than a part of that


class StudySearcher(Searcher):
    """Ray Tune's view of the study: asks it for trials and tells it how they ended.

    Args:
        search: The search.
        demands: What its trials ask of the cluster.
        slots: What each of them gets.
    """

    def __init__(self, search: Search, demands: Demands, slots: Slots):
        super().__init__(metric=search.metric, mode="max")
        self.search, self.demands, self.slots = search, demands, slots
        self.live: dict[str, str | None] = {}  # running trials, by Ray Tune's id, and the node that each is meant for
        self.stripped: set[int] = set()  # finished trials whose last.pth was reduced to the weights
        self._free: dict[str, int] = {}
        self._looked_at = -math.inf
        self._stripping = ThreadPoolExecutor(max_workers=1)  # not in Ray Tune's loop, which would hear no trial meanwhile

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stripping": None}  # Ray Tune pickles a copy that nothing reads; a thread cannot be pickled

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, as :func:`raydetr.launch.trial.run_trial` takes it; None while there is no slot, FINISHED at the end."""
        population = self.search.scheduler == "pbt"
        if not population and len(self.live) >= self.room():
            return None
        asked = self.search.ask(trial_id)
        if asked is None:
            return Searcher.FINISHED
        number, drawn = asked
        try:
            # A member of a population may have taken over settings since it was drawn.
            assigned = self.assigned(number, None if population else drawn)
        except UserError as error:  # each setting is within its bounds, but they do not fit together
            self.search.tell(number, "failed", reason=str(error))
            return None  # Ray Tune asks again, for the next one
        self.search.push()  # before the trial leaves anything in the store
        self.live[trial_id] = None if population else self.choose_node()
        return assigned | {"node": self.live[trial_id]}

    def node_slots(self) -> dict[str, int]:
        """Return how many trials, or workers of trials, fit on each node that is alive, by its id."""
        if time.monotonic() - self._looked_at > ROOM_INTERVAL_S:
            self._free = {node["NodeID"]: slots_on(node["Resources"], self.slots) for node in ray.nodes() if node["Alive"]}
            self._looked_at = time.monotonic()
        return self._free

    def room(self) -> int:
        """Return how many trials may run at a time: as many as were asked for, otherwise as many as the cluster holds now."""
        return self.demands.concurrent or max(1, sum(self.node_slots().values()) // self.demands.workers)

    def choose_node(self) -> str | None:
        """Return the fullest node with a free slot, for a trial that is to be packed; None: Ray chooses, the emptiest."""
        if self.demands.placement != "pack" or self.demands.workers > 1:
            return None
        taken = Counter(self.live.values())
        free = {node: slots - taken[node] for node, slots in self.node_slots().items()}
        return min((node for node in free if free[node] > 0), key=lambda node: (free[node], node), default=None)

    def assigned(self, number: int, drawn: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a trial as :func:`raydetr.launch.trial.run_trial` takes it.

        Args:
            number: The trial's number.
            drawn: Its settings as they were drawn; None: as the study has them now.
        """
        config = self.search.config(number) if drawn is None else self.search.complete(drawn)
        config.run.storage, config.run.name = join(self.search.path, TRIALS_FOLDER), self.search.trial_name(number)
        config.run.workers = self.demands.workers
        return {
            "number": number,
            "metric": self.search.metric,
            "config": config,
            "searched": self.search.space.hparam_domains(self.search.base),
            "slots": self.slots,
            "node": None,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: the scheduler reports to the study."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the study how a trial ended; one that was only interrupted stays unfinished, to be resumed."""
        self.live.pop(trial_id, None)
        number = self.search.number(trial_id)
        if number is None:
            return
        result = result or {}
        if result.get("failed"):
            self.search.tell(number, "failed", reason=result["failed"])
        elif result.get("finished"):
            self.search.tell(number, "complete", best_so_far(self.search, number, result), metrics=reported_metrics(result))
        elif not error and self.search.should_stop(number):
            self.search.tell(number, "pruned", metrics=reported_metrics(result))
        elif not self.search.frozen()[number].state.is_finished():
            return
        self.search.push()  # before stripping: a trial that the store believes to be unfinished is resumed from its last.pth
        self._stripping.submit(self._strip, number)

    def _strip(self, number: int) -> None:
        tidy_trial(trial_root(self.search, number))
        self.stripped.add(number)

    def close(self) -> None:
        """Wait for the checkpoints that are being stripped."""
        self._stripping.shutdown()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study is in its journal."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the study is in its journal."""


class StudyScheduler(FIFOScheduler):
    """Reports every epoch's objective to the study, stops the trials that its pruner gives up, and fails those lost too often."""

    def __init__(self, search: Search):
        super().__init__()
        self.search, self.max_failures = search, search.config(0).run.max_failures
        self.losses: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}  # why a trial's process was lost the last time, by Ray Tune's id
        self.repeated: set[str] = set()  # trials with the same error twice, and no epoch in between
        self.full = ""  # what a trial said about a full disk

    def on_trial_error(self, tune_controller, trial) -> None:
        """Count the loss of a trial's process, unless its node was lost with it. Ray Tune starts the trial again."""
        if NO_MEMORY in ray_private.last_trial_error(trial):  # Ray Tune keeps this error as text only
            self.reasons[trial.trial_id] = OUT_OF_MEMORY
            self.losses[trial.trial_id] += 1
            return
        file = trial.pickled_error_file
        if not (file and is_node_failure(cloudpickle.loads(Path(file).read_bytes()))):
            self.losses[trial.trial_id] += 1

    def on_trial_add(self, tune_controller, trial) -> None:
        """Fail a trial that is to be started again and was lost too often, or twice for the same error."""
        losses, number, repeated = self.losses[trial.trial_id], self.search.number(trial.trial_id), trial.trial_id in self.repeated
        if (losses > self.max_failures or repeated) and number is not None:
            reason = self.reasons.get(trial.trial_id, "its process was killed")
            why = TWICE if repeated else "run.max_failures"
            self.search.tell(number, "failed", reason=f"lost {count(losses, 'time')} ({why}), the last time: {reason}")
            tune_controller.search_alg.on_trial_complete(trial.trial_id, error=True)
            tune_controller.stop_trial(trial)

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Return whether a trial continues or stops."""
        number = self.search.number(trial.trial_id)
        if result.get("full"):
            self.full = self.full or result["full"]
            tune_controller.request_stop_experiment()
            return FIFOScheduler.STOP
        if result.get("fault"):
            if result.get("repeatable") and _without_host(self.reasons.get(trial.trial_id, "")) == _without_host(result["fault"]):
                self.repeated.add(trial.trial_id)
            self.reasons[trial.trial_id] = result["fault"]
        if not is_epoch(result) or number is None:
            return FIFOScheduler.CONTINUE
        self.reasons.pop(trial.trial_id, None)  # an epoch went well since
        self.search.report(number, result["epoch"], best_so_far(self.search, number, result))
        return FIFOScheduler.STOP if self.search.should_stop(number) else FIFOScheduler.CONTINUE


class PopulationScheduler(StudyScheduler):
    """Population-based training: at every turn a trial gives its slot to one that has trained less, and may take over better weights."""

    def __init__(self, search: Search, searcher: StudySearcher):
        super().__init__(search)
        self.searcher = searcher
        optim = search.config(0).optim
        self.first, self.every, self.epochs = grace_epochs(optim), math.ceil(optim.epochs / TURNS), optim.epochs

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Return whether a trial continues, stops, or pauses for the others."""
        decision, epoch = super().on_trial_result(tune_controller, trial, result), result["epoch"]
        if decision != FIFOScheduler.CONTINUE or not is_epoch(result):
            return decision
        if epoch % self.every or not self.first <= epoch < self.epochs:
            return decision
        tune_controller.pause_trial(trial, should_checkpoint=False)  # its folder holds the checkpoint
        return FIFOScheduler.NOOP

    def choose_trial_to_run(self, tune_controller):
        """Return a trial that has not begun, otherwise, where there is a slot, the one that has trained least."""
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
        other = None if number is None else self.search.better_trial(number, epoch)
        if number is not None and other is not None:
            copy_weights(trial_root(self.search, other), trial_root(self.search, number))
            self.search.take_over(number, other, epoch)
            self.search.push()
            trial.set_config(self.searcher.assigned(number))


class Hopeless(ray.tune.Stopper):
    """Ends a search whose first trials all failed without a single epoch."""

    def __init__(self, search: Search):
        self.search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: it stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        trials = self.search.frozen()
        if any(trial.intermediate_values for trial in trials):  # asked after every event, and soon true of the first trial
            return False
        return sum("reason" in trial.user_attrs for trial in trials) >= HOPELESS


class UntilSignal(ray.tune.Stopper):
    """Ends a search, in order, after a signal was received."""

    def __init__(self, received: Received):
        self.received = received

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: it stops no single trial."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        return self.received.number is not None


class Watcher(TrialProgressCallback):
    """Shows the trials as they run, and names those that stopped reporting.

    It replaces Ray Tune's own callback of this kind, which would print lines of its own.
    """

    def __init__(self, search: Search, display: TrialsDisplay):
        self.search, self.display = search, display
        self.heard: dict[int, float] = {}  # when a running trial last reported
        self.longest_s = 0.0  # between two reports of a trial
        self.silent: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks; a terminal cannot be, and a search is resumed from its study alone.
        return {**self.__dict__, "display": None}

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict[str, Any], **info) -> None:
        """Show an epoch of a trial."""
        number = self.search.number(trial.trial_id)
        if number is None or not is_epoch(result):
            return
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.heard.get(number, now))
        self.heard[number] = now
        self.silent.discard(number)
        self.display.epoch(number, result)

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        """Do nothing: the table shows why a trial failed."""

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        """Do nothing: the table shows how a trial ended."""

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        """Show that trials began, ended, or stopped reporting."""
        self.display.refresh()
        running = {
            number for trial in trials if trial.status == Trial.RUNNING and (number := self.search.number(trial.trial_id)) is not None
        }
        now = time.monotonic()
        self.heard = {number: self.heard.get(number, now) for number in running}
        for number in sorted(running - self.silent):
            seconds = now - self.heard[number]
            if seconds > max(SILENCE_S, SILENT_EPOCHS * self.longest_s):
                self.silent.add(number)
                since = time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))
                text = (
                    f"trial {self.search.trial_name(number)} has reported nothing since {since} ({seconds / 60:.0f} minutes); it still "
                    f"runs: look at its process (`py-spy dump`), or kill it: it is retried from its last finished epoch"
                )
                self.display.console.print(text, markup=False, soft_wrap=True)


def _without_host(fault: str) -> str:
    return fault.partition(": ")[2]


def is_epoch(result: Mapping[str, Any]) -> bool:
    """Return whether a trial reports an epoch, and not how it ended."""
    return not any(result.get(name) for name in ("failed", "fault", "full", "finished"))


def grace_epochs(optim: settings.Optim) -> int:
    """Return the first epoch at which a trial may be stopped: after the warm-up, and never the very first."""
    warmup = optim.warmup * optim.epochs if optim.warmup < 1 else optim.warmup
    return min(int(warmup) + 2, optim.epochs)


def trial_root(search: Search, number: int) -> str:
    """Return the folder or URI of the run of a trial."""
    return join(search.path, TRIALS_FOLDER, search.trial_name(number))


def trial_folder(search: Search, number: int) -> Path:
    """Return the run folder of a trial; where the search is in an object store, its working copy on this machine."""
    return working_folder(trial_root(search, number))


def best_so_far(search: Search, number: int, result: Mapping[str, Any]) -> float:
    """Return the objective of a trial: the highest value of the search's metric up to an epoch.

    Args:
        search: The search.
        number: The trial.
        result: What the trial reported after the epoch.

    Returns:
        The highest value, or NaN if no epoch has one.
    """
    noted = search.frozen()[number].intermediate_values.values()
    here = [result[name] for name in (search.metric, f"best_{search.metric}") if name in result]
    return max([*noted, *here], default=float("nan"))


def reported_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``fit`` reported and where the trial ran, without what Ray Tune adds."""
    return {name: result[name] for name in (*REPORTED, *WHERE) if name in result}


def copy_weights(source: str, target: str) -> None:
    """Replace a trial's checkpoints by another's.

    Args:
        source: Folder or URI of the run to copy from.
        target: Folder or URI of the run to copy to.
    """
    for name in ("best.pth", LAST):
        if is_uri(source):
            copy(join(source, name), join(target, name))
        else:
            copy_file(Path(source, name), Path(target, name))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file by an atomic write."""
    with source.open("rb") as content, atomic_write(target) as out:
        shutil.copyfileobj(content, out)


def tidy_search(search: Search, stripped: Collection[int] = ()) -> None:
    """Remove what only running trials need and killed processes leave.

    Args:
        search: The search.
        stripped: Finished trials that need not be checked again.
    """
    shutil.rmtree(search.folder / RAY_FOLDER, ignore_errors=True)
    for trial in search.frozen():
        if trial.state.is_finished() and trial.number not in stripped and trial_folder(search, trial.number).is_dir():
            tidy_trial(trial_root(search, trial.number))


def tidy_trial(trial: str) -> None:
    """Remove from the run of a finished trial, a folder or URI, what is of use only to resume it: the weights stay."""
    shutil.rmtree(working_folder(trial) / RAY_FOLDER, ignore_errors=True)
    try:
        remove_tokens(trial, OWNER, patience_s=0)
        strip(trial)
    except (UserError, OSError):
        return  # it only takes more room; a damaged file is named where it is read


def strip(trial: str) -> None:
    """Reduce the last.pth of a run, a folder or URI, to what is of use in a finished one: the weights and what is known of them."""
    checkpoint = fetch(trial, only=LAST) / LAST
    if checkpoint.exists() and holds_resume_state(checkpoint):
        content = read_checkpoint(checkpoint)
        save_checkpoint(checkpoint, {name: value for name, value in content.items() if name not in RESUME_STATE})
        push(trial, only=LAST)


def holds_resume_state(checkpoint: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint; reads its index only, not its tensors."""
    try:
        names = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).keys()
    except Exception:  # damaged bytes raise anything; reading it whole says what is wrong
        return True
    return not names.isdisjoint(RESUME_STATE)
