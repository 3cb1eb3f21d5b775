"""A search as Ray Tune sees it: which trial runs next and where, which trials continue, and how they ended.

The record of all this is the study.
"""

import dataclasses
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
from raydetr.files import atomic_write, delete_partial_files
from raydetr.launch import ray_private
from raydetr.launch.nodes import NO_MEMORY, is_node_failure
from raydetr.launch.signals import Received
from raydetr.launch.slots import Demands, Slots, slots_on
from raydetr.launch.train import OUT_OF_MEMORY, RAY_FOLDER, TWICE
from raydetr.launch.trial import EARLIER, Assignment, Gathered
from raydetr.search.halving import is_paused
from raydetr.search.methods import REDUCTION
from raydetr.search.study import TRIALS_FOLDER, Search
from raydetr.search.trials import TrialsDisplay
from raydetr.storage import LAST, OWNER, copy, fetch, is_uri, join, push, remove_tokens, working_folder
from raydetr.text import count
from raydetr.training.metrics import LAST_EPOCH, LATENCY, REPORTED, WHERE
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint

RESUME_STATE = (
    "optimizer",
    "lr_scheduler",
    "scaler",
    "ema",
    "trained",
    "groups",
    "random",
)  # entries of a checkpoint that only resuming needs
TURNS = 4  # parts of a run in population-based training; after each, a trial may take over another's weights
REPORT_S = 0.02  # seconds between two reports of all trials together: the process that runs the search needs half of it for one
ROOM_INTERVAL_S = 1.0  # between two counts of the cluster's free slots
HOPELESS = 3  # a search ends if this many trials failed before any finished an epoch, because the rest would fail as well
LOOK_INTERVAL_S = 1.0  # between two looks for trials that report nothing
SILENCE_S = 600.0  # a running trial that reports nothing for longer than this,
SILENT_EPOCHS = 5  # and for longer than this many of the longest epochs so far, is named


class StudySearcher(Searcher):
    """Ray Tune's view of the study: draws trials from it and records in it how they ended.

    Args:
        search: The search.
        demands: What its trials request from the cluster.
        slots: What each of them gets.
    """

    def __init__(self, search: Search, demands: Demands, slots: Slots):
        super().__init__(metric=search.metric, mode="max")
        self.search, self.demands, self.slots = search, demands, slots
        self.live: dict[str, str | None] = {}  # running trials, by Ray Tune's id, and the node that each is meant for
        self.stripped: set[int] = set()  # finished trials whose last.pth was reduced to the weights
        self._free: dict[str, int] = {}
        self._looked_at = -math.inf
        self._stripping = ThreadPoolExecutor(max_workers=1)  # in Ray Tune's loop it would delay the reports of all trials

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stripping": None}  # Ray Tune pickles a copy that nothing reads; a thread cannot be pickled

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial to run.

        Args:
            trial_id: Ray Tune's id of the trial.

        Returns:
            The parameters of the trial, from :meth:`raydetr.launch.trial.Assignment.packed`; None if there is no free slot, the drawn
            settings do not fit together, or a paused trial may still be promoted (Ray Tune then asks again); ``Searcher.FINISHED`` if all
            trials have been handed out.
        """
        population = self.search.scheduler == "pbt"
        if not population and len(self.live) >= self.room():
            return None
        asked = self.search.ask(trial_id)
        if asked is None:
            return self._finish()
        number, drawn = asked
        try:
            # A member of a population may have taken over settings since it was drawn.
            assigned = self.assigned(number, None if population else drawn)
        except UserError as error:  # each setting is within its bounds, but they do not fit together
            self.search.tell(number, "failed", reason=str(error))
            return None  # Ray Tune calls again, and gets the next trial
        self.search.push()  # the store must know the trial before the trial pushes files of its own
        self.live[trial_id] = None if population else self.choose_node()
        return dataclasses.replace(assigned, node=self.live[trial_id]).packed()

    def _finish(self) -> str | None:
        """Return ``Searcher.FINISHED``, after recording the paused trials as pruned; None while a running trial may change that."""
        if self.live and self.search.scheduler == "promote":
            return None
        ended = self.search.end_paused()
        if ended:
            self.search.push()
        for number in ended:
            self._stripping.submit(self._strip, number)
        return Searcher.FINISHED

    def node_slots(self) -> dict[str, int]:
        """Return how many trials, or workers of trials, fit on each live node in all, by its id."""
        if time.monotonic() - self._looked_at > ROOM_INTERVAL_S:
            self._free = {node["NodeID"]: slots_on(node["Resources"], self.slots) for node in ray.nodes() if node["Alive"]}
            self._looked_at = time.monotonic()
        return self._free

    def room(self) -> int:
        """Return how many trials may run at a time: as many as requested, otherwise as many as the cluster holds now."""
        return self.demands.concurrent or max(1, sum(self.node_slots().values()) // self.demands.workers)

    def choose_node(self) -> str | None:
        """Return the id of the fullest node with a free slot if trials are to be packed, or None to let Ray choose the emptiest."""
        if self.demands.placement != "pack" or self.demands.workers > 1:
            return None
        taken = Counter(self.live.values())
        free = {node: slots - taken[node] for node, slots in self.node_slots().items()}
        return min((node for node in free if free[node] > 0), key=lambda node: (free[node], node), default=None)

    def assigned(self, number: int, drawn: Mapping[str, Any] | None = None) -> Assignment:
        """Return what a trial is to do.

        Args:
            number: The trial's number.
            drawn: Its settings as they were drawn, by dotted name; None: as the study has them now.

        Raises:
            UserError: The settings do not fit together.
        """
        config = self.search.config(number) if drawn is None else self.search.complete(drawn)
        config.run.storage, config.run.name = join(self.search.path, TRIALS_FOLDER), self.search.trial_name(number)
        config.run.workers = self.demands.workers
        if config.data.reshuffle:
            config.data.reshuffle_seed = number
        if config.data.fold is None:
            config.data.folds = None  # within a search folds gain nothing; its confirmation uses them
        searched = self.search.space.hparam_domains(self.search.base)
        gathered = Gathered(REPORT_S * self.room(), decision_epochs(self.search, config.optim.epochs))
        return Assignment(config, self.search.objectives, searched, self.slots, gathered)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing, since the scheduler reports results to the study."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record in the study how a trial ended, and reduce its checkpoints in the background.

        A trial that was paused or interrupted stays unfinished, so that it can be resumed.

        Args:
            trial_id: Ray Tune's id of the trial.
            result: What the trial reported last. ``failed`` (a reason) or ``finished`` says how it ended.
            error: Whether its process was lost.
        """
        was_live, number = trial_id in self.live, self.search.number(trial_id)
        self.live.pop(trial_id, None)
        if number is None:
            return
        result = result or {}
        if result.get("failed"):
            self.search.tell(number, "failed", reason=result["failed"])
        elif result.get("finished"):
            value = best_so_far(self.search, number, result)
            self.search.tell(number, "complete", value, metrics=reported_metrics(result), latency=result.get(LATENCY))
        elif not error and self.search.should_stop(number):
            self.search.tell(number, "pruned", metrics=reported_metrics(result))
        elif not self.search.trial(number).state.is_finished():
            if not error and is_paused(self.search.trial(number)):
                self.search.push()
            elif error and was_live:
                self.search.hand_out_again(number)
            return
        self.search.push()  # before stripping: a trial that is unfinished according to the store is resumed from its last.pth
        self._stripping.submit(self._strip, number)

    def _strip(self, number: int) -> None:
        tidy_trial(trial_root(self.search, number))
        self.stripped.add(number)

    def close(self) -> None:
        """Wait for the checkpoints that are being reduced to their weights."""
        self._stripping.shutdown()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing, since the study's journal is the record of the search."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, since the study's journal is the record of the search."""


class StudyScheduler(FIFOScheduler):
    """Reports every epoch's objective to the study, stops the trials that it rejects or pauses, and fails those that were lost too often.

    To Ray Tune a paused trial has ended. After its promotion it is another one, which resumes from the same folder.

    Args:
        search: The search.
    """

    def __init__(self, search: Search):
        super().__init__()
        self.search, self.max_failures = search, search.config(0).run.max_failures
        # By number, since to Ray Tune a trial that was paused and promoted is another one.
        self.losses: Counter[int | None] = Counter()
        self.reasons: dict[int | None, str] = {}  # why a trial's process was lost the last time
        self.repeated: set[int | None] = set()  # trials with the same error twice, and no epoch in between
        self.given_up: set[str] = set()  # by Ray Tune
        self.full = ""  # a trial's message about a full disk

    def choose_trial_to_run(self, tune_controller):
        """Return the trial to run next, as ``FIFOScheduler`` does.

        Ray Tune gives up a trial whose process it cannot use again, and tells nobody. That trial is handed out once more.

        Args:
            tune_controller: Ray Tune's controller.

        Returns:
            Ray Tune's trial, or None.
        """
        for trial in tune_controller.get_trials():
            if trial.status == Trial.ERROR and trial.trial_id not in self.given_up:
                self.given_up.add(trial.trial_id)
                tune_controller.search_alg.on_trial_complete(trial.trial_id, error=True)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_error(self, tune_controller, trial) -> None:
        """Count the loss of a trial's process, unless its node was lost with it. Ray Tune then starts the trial again.

        Args:
            tune_controller: Ray Tune's controller.
            trial: Ray Tune's trial.
        """
        number = self.search.number(trial.trial_id)
        if NO_MEMORY in ray_private.last_trial_error(trial):  # Ray Tune keeps this error as text only
            self.reasons[number] = OUT_OF_MEMORY
            self.losses[number] += 1
            return
        file = trial.pickled_error_file
        if not (file and is_node_failure(cloudpickle.loads(Path(file).read_bytes()))):
            self.losses[number] += 1

    def on_trial_add(self, tune_controller, trial) -> None:
        """Fail a trial that is about to start again if it was lost too often, or twice with the same error.

        Args:
            tune_controller: Ray Tune's controller.
            trial: Ray Tune's trial.
        """
        number = self.search.number(trial.trial_id)
        losses, repeated = self.losses[number], number in self.repeated
        if (losses > self.max_failures or repeated) and number is not None:
            reason = self.reasons.get(number, "its process was killed")
            why = TWICE if repeated else "run.max_failures"
            self.search.tell(number, "failed", reason=f"lost {count(losses, 'time')} ({why}), the last time: {reason}")
            tune_controller.search_alg.on_trial_complete(trial.trial_id, error=True)
            tune_controller.stop_trial(trial)

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Record a report of a trial, and decide whether the trial continues.

        A report about a full disk ends the search. A fault is recorded, and counts as repeated if it is the same as the last one with no
        finished epoch in between.

        Args:
            tune_controller: Ray Tune's controller.
            trial: Ray Tune's trial.
            result: What the trial reported: the metrics of an epoch, or how it ended (see :func:`raydetr.launch.trial.run_trial`).

        Returns:
            ``CONTINUE`` or ``STOP``, as in ``FIFOScheduler``.
        """
        number = self.search.number(trial.trial_id)
        if result.get("full"):
            self.full = self.full or result["full"]
            tune_controller.request_stop_experiment()
            return FIFOScheduler.STOP
        if result.get("fault"):
            if result.get("repeatable") and _without_host(self.reasons.get(number, "")) == _without_host(result["fault"]):
                self.repeated.add(number)
            self.reasons[number] = result["fault"]
        if not is_epoch(result) or number is None:
            return FIFOScheduler.CONTINUE
        self.reasons.pop(number, None)  # faults count as repeated only without a finished epoch in between
        for epoch in (*result.get(EARLIER, ()), result):
            self.search.report(number, epoch["epoch"], best_so_far(self.search, number, epoch), epoch)
        if result.get(LAST_EPOCH):
            return FIFOScheduler.CONTINUE
        ends = self.search.should_stop(number) or self.search.pause(number, result["epoch"], reported_metrics(result))
        return FIFOScheduler.STOP if ends else FIFOScheduler.CONTINUE


class PopulationScheduler(StudyScheduler):
    """Population-based training: trials take turns, and a trial that lags behind may take over the weights of a better one.

    After every quarter of its epochs a trial gives its slot to the one that has trained least.

    Args:
        search: The search.
        searcher: Its searcher, which knows how many trials may run.
    """

    def __init__(self, search: Search, searcher: StudySearcher):
        super().__init__(search)
        self.searcher = searcher
        optim = search.config(0).optim
        self.first, self.every, self.epochs = grace_epochs(optim), turn(optim.epochs), optim.epochs

    def on_trial_result(self, tune_controller, trial, result: dict[str, Any]) -> str:
        """Record a report of a trial, and decide whether the trial continues, stops, or pauses to let others train.

        Args:
            tune_controller: Ray Tune's controller.
            trial: Ray Tune's trial.
            result: What the trial reported.

        Returns:
            ``CONTINUE``, ``STOP``, or ``NOOP`` for a trial that was paused, as in ``FIFOScheduler``.
        """
        decision, epoch = super().on_trial_result(tune_controller, trial, result), result["epoch"]
        if decision != FIFOScheduler.CONTINUE or not is_epoch(result):
            return decision
        if epoch % self.every or not self.first <= epoch < self.epochs:
            return decision
        tune_controller.pause_trial(trial, should_checkpoint=False)  # its folder holds the checkpoint
        return FIFOScheduler.NOOP

    def choose_trial_to_run(self, tune_controller):
        """Return the trial to run next: one that has not begun, otherwise, if there is a slot, the paused one that has trained least.

        Args:
            tune_controller: Ray Tune's controller.

        Returns:
            Ray Tune's trial, or None.
        """
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
            trial.set_config(self.searcher.assigned(number).packed())


class Hopeless(ray.tune.Stopper):
    """Ends a search if ``HOPELESS`` trials failed and none has finished an epoch.

    Args:
        search: The search.
    """

    def __init__(self, search: Search):
        self.search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False, since it does not stop single trials."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        trials = self.search.frozen()
        if any(trial.intermediate_values for trial in trials):  # cheap although called after every event: soon true of trial 0
            return False
        return sum("reason" in trial.user_attrs for trial in trials) >= HOPELESS


class UntilSignal(ray.tune.Stopper):
    """Ends a search gracefully after a signal.

    Args:
        received: The record of the signal that was received.
    """

    def __init__(self, received: Received):
        self.received = received

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False, since it does not stop single trials."""
        return False

    def stop_all(self) -> bool:
        """Return whether to end the search."""
        return self.received.number is not None


class Watcher(TrialProgressCallback):
    """Shows the trials as they run, and names those that stopped reporting.

    It replaces Ray Tune's own callback of this kind, which would print lines of its own.

    Args:
        search: The search.
        display: The table of trials on the terminal.
    """

    def __init__(self, search: Search, display: TrialsDisplay):
        self.search, self.display = search, display
        self.heard: dict[int, float] = {}  # when a running trial last reported
        self.longest_s = 0.0  # between two reports of a trial
        self.silent: set[int] = set()
        self.looked_at = -math.inf

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune pickles its callbacks; a terminal cannot be, and a search is resumed from its study alone.
        return {**self.__dict__, "display": None}

    def on_trial_result(self, iteration: int, trials: list, trial, result: dict[str, Any], **info) -> None:
        """Show that a trial has finished an epoch.

        Args:
            iteration: The iteration of Ray Tune's loop, which is ignored.
            trials: All of Ray Tune's trials, which are ignored.
            trial: Ray Tune's trial.
            result: What the trial reported.
            **info: Ignored.
        """
        number = self.search.number(trial.trial_id)
        if number is None or not is_epoch(result):
            return
        now = time.monotonic()
        self.longest_s = max(self.longest_s, now - self.heard.get(number, now))
        self.heard[number] = now
        self.silent.discard(number)
        self.display.epoch(number, result)

    def on_trial_error(self, iteration: int, trials: list, trial, **info) -> None:
        """Do nothing, since the table shows why a trial failed."""

    def on_trial_complete(self, iteration: int, trials: list, trial, **info) -> None:
        """Do nothing, since the table shows how a trial ended."""

    def on_step_end(self, iteration: int, trials: list, **info) -> None:
        """Refresh the table, and name each running trial that has stopped reporting, once.

        Args:
            iteration: The iteration of Ray Tune's loop, which is ignored.
            trials: All of Ray Tune's trials.
            **info: Ignored.
        """
        self.display.refresh()
        now = time.monotonic()
        if now - self.looked_at < LOOK_INTERVAL_S:
            return
        self.looked_at = now
        running = {
            number for trial in trials if trial.status == Trial.RUNNING and (number := self.search.number(trial.trial_id)) is not None
        }
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
    """Return whether a report of a trial is that of an epoch, and not of how the trial ended.

    Args:
        result: The report.
    """
    return not any(result.get(name) for name in ("failed", "fault", "full", "finished"))


def grace_epochs(optim: settings.Optim) -> int:
    """Return the first epoch at which a trial may be stopped, counted from 1: after the warm-up, and never the very first epoch.

    Args:
        optim: Settings of the trials. A ``warmup`` below 1 is a share of ``epochs``, otherwise a number of epochs.
    """
    warmup = optim.warmup * optim.epochs if optim.warmup < 1 else optim.warmup
    return min(int(warmup) + 2, optim.epochs)


def turn(epochs: int) -> int:
    """Return for how many epochs a trial of a population trains before it gives its slot to another.

    Args:
        epochs: The number of epochs of a trial.
    """
    return math.ceil(epochs / TURNS)


def decision_epochs(search: Search, epochs: int) -> set[int]:
    """Return the epochs after which a search decides whether a trial trains on.

    The scheduler ``median``, and after its rungs ``evidence``, decide after any other report as well.

    Args:
        search: The search.
        epochs: The number of epochs of the trial.
    """
    if search.scheduler == "pbt":
        return set(range(turn(epochs), epochs + 1, turn(epochs)))
    rungs, rung = set(), search.grace
    while rung <= epochs:
        rungs.add(rung)
        rung *= REDUCTION
    return rungs


def trial_root(search: Search, number: int) -> str:
    """Return the path or URI of the run folder of a trial.

    Args:
        search: The search.
        number: The trial's number.
    """
    return join(search.path, TRIALS_FOLDER, search.trial_name(number))


def trial_folder(search: Search, number: int) -> Path:
    """Return the local run folder of a trial: its working copy on this machine if the search is in an object store.

    Args:
        search: The search.
        number: The trial's number.
    """
    return working_folder(trial_root(search, number))


def best_so_far(search: Search, number: int, result: Mapping[str, Any]) -> float:
    """Return the objective of a trial: the highest value of the search's metric so far.

    Args:
        search: The search.
        number: The trial.
        result: What the trial reported after the latest epoch.

    Returns:
        The highest value, or NaN if no epoch has one.
    """
    noted = search.trial(number).intermediate_values.values()
    # With several objectives the others must be known of the same epoch.
    names = (search.metric,) if search.also else (search.metric, f"best_{search.metric}")
    here = [result[name] for name in names if name in result]
    return max([*noted, *here], default=float("nan"))


def reported_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that ``fit`` reported and the node and GPUs of the trial, without the entries that Ray Tune adds.

    Args:
        result: A report of a trial as Ray Tune passes it on.
    """
    return {name: result[name] for name in (*REPORTED, *WHERE) if name in result}


def copy_weights(source: str, target: str) -> None:
    """Replace the checkpoints of a trial by those of another.

    Args:
        source: Path or URI of the run folder to copy from.
        target: Path or URI of the run folder to copy to.
    """
    for name in ("best.pth", LAST):
        if is_uri(source):
            copy(join(source, name), join(target, name))
        else:
            copy_file(Path(source, name), Path(target, name))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; the target appears atomically.

    Args:
        source: The file to copy.
        target: The file to create or replace.

    Raises:
        OSError: A file cannot be read or written.
    """
    with source.open("rb") as content, atomic_write(target) as out:
        shutil.copyfileobj(content, out)


def tidy_search(search: Search, stripped: Collection[int] = ()) -> None:
    """Remove what only running trials need, and what killed processes left behind.

    Args:
        search: The search.
        stripped: Numbers of finished trials that need not be checked again.
    """
    shutil.rmtree(search.folder / RAY_FOLDER, ignore_errors=True)
    for trial in search.frozen():
        if trial.state.is_finished() and trial.number not in stripped and trial_folder(search, trial.number).is_dir():
            tidy_trial(trial_root(search, trial.number))


def tidy_trial(trial: str) -> None:
    """Remove from the run folder of a finished trial what is needed only to resume it; the weights stay.

    Args:
        trial: Path or URI of the run folder.
    """
    shutil.rmtree(working_folder(trial) / RAY_FOLDER, ignore_errors=True)
    try:
        delete_partial_files(working_folder(trial))
        remove_tokens(trial, OWNER, patience_s=0)
        strip(trial)
    except (UserError, OSError):
        return  # the files only take more space; a damaged one is reported when it is used


def strip(trial: str) -> None:
    """Remove from the ``last.pth`` of a finished run what is needed only to resume it: the states of ``RESUME_STATE``.

    Args:
        trial: Path or URI of the run folder. An object store gets the smaller file as well.

    Raises:
        UserError: The checkpoint is damaged, or the store refuses or does not answer.
        OSError: The disk fails.
    """
    checkpoint = fetch(trial, only=LAST) / LAST
    if checkpoint.exists() and holds_resume_state(checkpoint):
        content = read_checkpoint(checkpoint)
        save_checkpoint(checkpoint, {name: value for name, value in content.items() if name not in RESUME_STATE})
        push(trial, only=LAST)


def holds_resume_state(checkpoint: Path) -> bool:
    """Return whether a run can be resumed from a checkpoint. The tensors are not read.

    Args:
        checkpoint: The file.

    Returns:
        Whether it has one of the entries of ``RESUME_STATE``; also True for a damaged file, so that the caller reads it and reports what is
        wrong.
    """
    try:
        names = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).keys()
    except Exception:  # a damaged file may raise anything; the caller reads all of it and reports what is wrong
        return True
    return not names.isdisjoint(RESUME_STATE)
