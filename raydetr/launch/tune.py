"""The search: trials of one fine-tuning each, spread over a cluster by Ray Tune; what is remembered is the study's (search.py)."""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from filelock import FileLock, Timeout
from ray.tune.experiment import Trial
from ray.tune.result import DEFAULT_RESULT_KEYS
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from rich.console import Console

from raydetr import config as settings
from raydetr.data.cache import DecodedImages, cache_limit
from raydetr.data.coco import CocoImages, find_split
from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.launch.nodes import check_nodes, is_of_machine
from raydetr.launch.train import DRIVER, check_data, check_name, cores_each, nodes_resources, ray_session, run_place, with_absolute_paths
from raydetr.launch.trial import run_trial
from raydetr.model.checkpoint import read_checkpoint, save_checkpoint
from raydetr.model.files import written_whole
from raydetr.search import Search, create_search, open_search, top_trials, write_best, write_trials
from raydetr.space import Space, read_space
from raydetr.storage import LAST, absolute, copy, fetch, is_uri, join, push, split, working_folder
from raydetr.trials import TrialsDisplay

TRIALS_FOLDER = "trials"  # in the search's folder: a run folder for each trial
TO_GO_ON = ("optimizer", "lr_scheduler", "scaler", "ema", "random")  # what a checkpoint holds for a run that is not finished
STORE_SHARE = 0.5  # of Ray's object store, for decoded pictures
TURNS = 4  # how often in a run a trial of population-based training may go on from another
KEEP_INTERVAL_S = 5.0  # between two pushes of a search's own files to a store
ROOM_INTERVAL_S = 1.0  # between two looks at the cluster for places
HOPELESS = 3  # trials that all failed before their first epoch: the rest would fail, too


@dataclasses.dataclass(frozen=True)
class Demands:
    """What the trials of a search ask of the cluster."""

    workers: int = 1  # training workers per trial
    gpus: float = 1.0  # per trial of one worker; below 1 trials share a card. Nothing where there are no GPUs
    concurrent: int | None = None  # trials at a time; None: as many as fit, also when machines come and go
    placement: str = "pack"  # trials on as few machines as hold them, or "spread" over all


@dataclasses.dataclass(frozen=True)
class Places:
    """What the cluster gives each of ``concurrent`` trials, or each of its workers."""

    concurrent: int
    cpus: int
    gpus: float
    placement: str = "pack"


def tune(
    config: settings.Config,
    space: Space | str | Path | Mapping[str, Any],
    *,
    trials: int = 32,
    demands: Demands = Demands(),
    metric: str = "AP",
    sampler: str = "tpe",
    scheduler: str = "asha",
    seed: int = 0,
    points: Sequence[Mapping[str, Any]] = (),
    time_budget_s: float | None = None,
) -> Search:
    """Search ``space`` around ``config`` with ``trials`` trials, the first of them ``config`` itself. Returns the search.

    ``<run.storage>/<run.name>/`` gets the study, a run folder per trial under ``trials/``, and at the end ``best.yaml``, ``best.pth``,
    ``trials.csv`` and ``trials.parquet``. Raises UserError for bad settings, data or an impossible request.
    """
    config = with_absolute_paths(config)
    check_name(config)
    check_data(config)
    place = run_place(config)
    grace = grace_epochs(config.optim)
    space = space if isinstance(space, Space) else read_space(space)
    if scheduler == "pbt" and demands.workers > 1:
        raise UserError("--scheduler pbt: trials go on from each other's weights with one worker each; lower --workers-per-trial")
    with ray_session(demands.workers, drivers=demands.workers > 1):
        check_nodes(config)
        places = find_places(config, demands, trials)
        check_disk(config, working_folder(place), trials, places.concurrent)
        images = share_images(config)
        bring(place)
        search = create_search(
            place, space, config, trials=trials, metric=metric, sampler=sampler, pruner=scheduler, grace=grace, seed=seed, points=points
        )
        with driving(search.folder), keeping(search):
            return _run(search, demands, places, images, time_budget_s)


def resume(
    folder: str | Path,
    space: Space | None = None,
    *,
    trials: int | None = None,
    demands: Demands = Demands(),
    time_budget_s: float | None = None,
) -> Search:
    """Go on with the search in ``folder``: no finished trial runs again, unfinished ones go on from their last epoch.

    Raises UserError where ``space`` is given and is not the search's own; the line tells the difference.
    """
    place = absolute(folder)
    bring(place)
    search = open_search(place, space, trials)
    with driving(search.folder), ray_session(demands.workers, drivers=demands.workers > 1), keeping(search):
        base = search.config(0)
        base.run.storage = split(place)[0]  # where the search is now
        check_nodes(base)
        search.reclaim(())
        places = find_places(search.config(0), demands, search.trials)
        return _run(search, demands, places, share_images(search.config(0)), time_budget_s)


@contextlib.contextmanager
def driving(folder: Path) -> Iterator[None]:
    """For the length of a ``with`` nobody else runs the search in ``folder``; UserError where somebody does. Ends with the process."""
    lock = FileLock(folder / "driver.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another raydetr is running this search; wait for its end or stop it first") from None
    try:
        yield
    finally:
        lock.release()


def bring(place: str) -> None:
    """Make the working copy of a search what the store holds of it; not under the hands of another driver. Nothing for a folder."""
    if is_uri(place):
        with driving(working_folder(place)):
            fetch(place, recursive=False)  # the trials fetch their own


@contextlib.contextmanager
def keeping(search: Search) -> Iterator[None]:
    """For the length of a ``with``, and at its end, the search's own files are brought to its store. Nothing for a folder."""
    if not is_uri(search.place):
        yield
        return
    done = threading.Event()

    def keep() -> None:
        while not done.wait(KEEP_INTERVAL_S):
            with contextlib.suppress(UserError):  # it is pushed again soon, and at the end with patience
                search.push(patience_s=0)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        search.push()


def grace_epochs(optim: settings.Optim) -> int:
    """The first epoch at which a trial may be stopped: after the warm-up, and never the very first."""
    warmup = optim.warmup * optim.epochs if optim.warmup < 1 else optim.warmup
    return min(int(warmup) + 2, optim.epochs)


def find_places(config: settings.Config, demands: Demands, trials: int) -> Places:
    """How many trials run at a time and what each gets; raises UserError with the numbers where the cluster cannot hold them."""
    nodes = nodes_resources()
    gpus = [node.get("GPU", 0) for node in nodes]
    use_gpu = config.speed.device != "cpu" and sum(gpus) > 0
    if config.speed.device == "cuda" and not use_gpu:
        raise UserError("speed.device: cuda was asked for and Ray sees no GPU; --speed.device cpu searches without")
    if demands.workers > 1 and demands.gpus < 1:
        raise UserError(
            f"a fraction of a GPU ({demands.gpus}) is for trials of one worker; NCCL wants a whole one for each of {demands.workers}"
        )
    if use_gpu and demands.gpus > max(gpus):
        raise UserError(f"--gpus-per-trial {demands.gpus}: no machine has more than {max(gpus):g} GPUs")
    drivers = int(sum(node.get(DRIVER, 0) for node in nodes))
    if demands.workers > 1 and not drivers:
        start = f"""ray start --head --resources='{{"{DRIVER}": 64}}'"""
        raise UserError(f"--workers-per-trial {demands.workers}: the cluster has no place for their drivers; start it with {start}")
    cores = [int(node.get("CPU", 0)) for node in nodes]
    each = 1.0 if demands.workers > 1 else demands.gpus
    slots = sum(int(count / each + 1e-9) for count in gpus) if use_gpu else sum(cores)
    fitting = slots // demands.workers
    what = f"{sum(gpus):g} GPUs" if use_gpu else f"{sum(cores)} CPUs"
    if fitting < 1:
        raise UserError(f"--workers-per-trial {demands.workers}: asked for that many workers, the cluster has {what}")
    if demands.concurrent is not None and demands.concurrent > fitting and not most_resources():
        raise UserError(f"--concurrent {demands.concurrent}: {what} hold {fitting} trials of {demands.workers} worker(s) at a time")
    concurrent = min(demands.concurrent or fitting, fitting, trials, drivers if demands.workers > 1 else trials)
    # Trials that are packed on a card's machine leave the others there their share of its CPUs.
    packed = cores_each(cores, fitting * demands.workers) if use_gpu and demands.placement == "pack" else None
    cpus = packed or cores_each(cores, concurrent * demands.workers)
    if cpus is None:
        raise UserError(
            f"{concurrent} trials of {demands.workers} worker(s) need a CPU each, the cluster has {sum(cores)}; lower --concurrent"
        )
    return Places(concurrent, cpus, each if use_gpu else 0.0, demands.placement)


def holds(machine: Mapping[str, float], places: Places) -> int:
    """How many trials of one worker, or workers of trials, a machine has places for."""
    cpus = int(machine.get("CPU", 0) // places.cpus)
    return min(cpus, int(machine.get("GPU", 0) / places.gpus + 1e-9)) if places.gpus else cpus


def most_resources() -> dict[str, float]:
    """What the cluster's autoscaler may bring it to; empty where it has none. Ray Train looks it up there, too."""
    return ray._private.state.state.get_max_resources_from_cluster_config() or {}


def check_disk(config: settings.Config, folder: Path, trials: int, concurrent: int) -> str:
    """What the search will keep, in words; raises UserError where the disk of ``folder`` cannot hold it."""
    weights = weights_bytes(config)
    needed = trials * 2 * weights + concurrent * 3 * weights  # best and last; optimizer and average of the unfinished
    forecast = f"{trials} trials x 2 x {weights / 1e6:.0f} MB"
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"run.storage: {forecast} and what runs need {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")
    return forecast


def weights_bytes(config: settings.Config) -> int:
    """Bytes of a network's weights, in float32."""
    from raydetr.model.detr import build_model

    leaves = {name: value for name, value in settings.to_dict(config)["model"].items() if name not in ("preset", "weights")}
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in build_model(config.model.preset, **leaves).state_dict().values()) * 4


def _run(search: Search, demands: Demands, places: Places, images: list[ray.ObjectRef], time_budget_s: float | None) -> Search:
    # A trial's own fit writes its events, the study is the record of results (Ray Tune's, kept every few seconds, would cost a sixth of
    # this process's time), the table below is what is shown; and a trial that failed has no metric to report.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    searcher, population = StudySearcher(search, demands, places), search.scheduler == "pbt"
    # Without a limit of its own Ray Tune lets one trial wait; the searcher has the limit. The members of a population take turns.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = "1" if population else str(search.trials)
    scheduler = PopulationScheduler(search, searcher) if population else StudyScheduler(search)
    trainable = ray.tune.with_parameters(run_trial, images=images)
    with Console(highlight=False) as console, TrialsDisplay(search, console) as display, stopped_in_order():
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(trainable, resources_of),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                reuse_actors=demands.workers == 1,
                time_budget_s=time_budget_s,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name="ray",
                storage_path=str(search.folder),  # of no use to anybody but this process
                failure_config=ray.tune.FailureConfig(max_failures=-1),  # the scheduler counts them
                callbacks=[Watcher(search, display)],
                stop=Hopeless(search),
                verbose=0,
            ),
        )
        fit_with_room(tuner, search, scheduler)
        if searcher.stripped:
            ray.wait(searcher.stripped, num_returns=len(searcher.stripped))  # one that failed leaves a larger file, and that is all
    finish(search)
    return search


def fit_with_room(tuner: ray.tune.Tuner, search: Search, scheduler: "StudyScheduler") -> None:
    """``tuner.fit()``; raises DiskFull where a trial, or the study, found no room: trials under way stay unfinished, none is to blame."""
    try:
        tuner.fit()
    except Exception as error:
        if not is_disk_full(error):
            raise
        scheduler.full = f"the disk of {search.folder} is full"
    if scheduler.full:
        raise DiskFull(f"{scheduler.full}; trials under way were stopped: make room, then raydetr tune --resume {search.place}")


def resources_of(assigned: Mapping[str, Any]) -> ray.tune.PlacementGroupFactory:
    """What a trial takes of the cluster; one of several workers only a driver's place, its workers come by themselves."""
    places = assigned["places"]
    if assigned["settings"]["run"]["workers"] > 1:
        return ray.tune.PlacementGroupFactory([{DRIVER: 1}])
    # Whatever the strategy, a group of one bundle goes to the emptiest machine; only this hint packs. Where the machine is gone or full
    # the trial goes to another.
    return ray.tune.PlacementGroupFactory(
        [{"CPU": places["cpus"], "GPU": places["gpus"]}], "STRICT_PACK", _soft_target_node_id=assigned["machine"]
    )


def share_images(config: settings.Config) -> list[ray.ObjectRef]:
    """The pictures of the search's data, decoded once and put where all trials of a machine share them; nothing with data.cache_gb 0.

    Raises UserError for a picture that cannot be read.
    """
    store = min(node["object_store_memory"] for node in nodes_resources())
    limit = min(cache_limit(config.data), int(store * STORE_SHARE))
    splits = [CocoImages(find_split(config.data, split), None) for split in ("train", "val")]
    images = DecodedImages([file for split in splits for file in split.files], limit)
    images.fill()
    return [ray.put(images)]


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """SIGTERM, which `ray job stop` sends, ends a search as Ctrl-C does: Ray Tune stops the trials, the summary follows."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(search: Search) -> None:
    """What a search leaves when it ends, also before its time: best.yaml, best.pth, the tables. Raises UserError where all failed."""
    write_trials(search.folder)
    best = search.best()
    failed = [trial for trial in search.frozen() if "reason" in trial.user_attrs]
    if best is None:
        if failed:
            raise UserError(f"all {len(failed)} trials failed, the first of them: {failed[0].user_attrs['reason']}")
        return
    write_best(search.folder)
    weights = fetch(trial_place(search, best.number), only="best.pth") / "best.pth"
    if weights.exists():
        copy_file(weights, search.folder / "best.pth")


def summary(search: Search) -> str:
    """The best trials beside trial 0, and what to do next."""
    unfinished = search.trials - sum(trial.state.is_finished() for trial in search.frozen())
    lines = [top_trials(search)]
    if unfinished:
        lines.append(f"{unfinished} of {search.trials} trials are not finished: raydetr tune --resume {search.place}")
    if search.best():
        best = {name: join(search.place, name) for name in ("best.yaml", "best.pth")}
        lines.append(f"best settings: raydetr train --config {best['best.yaml']}; its weights: {best['best.pth']}")
    return "\n".join(lines)


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
    """An epoch's metrics without what Ray Tune adds to them."""
    return {name: value for name, value in result.items() if name not in DEFAULT_RESULT_KEYS and not isinstance(value, (dict, bool))}


class StudySearcher(Searcher):
    """Ray Tune's view of the study: asks it for trials and tells it how they ended."""

    def __init__(self, search: Search, demands: Demands, places: Places):
        super().__init__(metric=search.metric, mode="max")
        self.search, self.demands, self.places = search, demands, places
        self.live: dict[str, str | None] = {}  # trials under way, by Ray Tune's id, and the machine that each is meant for
        self._machines: dict[str, int] = {}
        self._looked = -math.inf
        self._stripper = Stripper.remote()
        self.stripped: list[ray.ObjectRef] = []  # one for each ended trial

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
        """How many trials may be under way: as many as were asked for, else as the cluster holds now.

        An autoscaler brings machines for trials that wait: as many may as run, until it can bring no more.
        """
        if self.demands.concurrent:
            return self.demands.concurrent
        now = max(1, sum(self.machines().values()) // self.demands.workers)
        most = holds(most_resources(), self.places) // self.demands.workers
        return max(now, min(2 * now, most))

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
        self.stripped.append(self._stripper.strip.remote(trial_place(self.search, number)))

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


def copy_weights(source: str, target: str) -> None:
    """Put a trial's checkpoints in the place of another's."""
    for name in ("best.pth", "last.pth"):
        if is_uri(source):
            copy(join(source, name), join(target, name))
        else:
            copy_file(Path(source, name), Path(target, name))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file that appears whole or not at all."""
    with source.open("rb") as content, written_whole(target) as copy:
        shutil.copyfileobj(content, copy)


@ray.remote(num_cpus=0, max_restarts=3, max_task_retries=3)
class Stripper:
    """Makes the checkpoints of ended trials smaller, one after the other and not in the controller, which hears no trial meanwhile."""

    def strip(self, trial: str) -> None:
        """As :func:`strip`."""
        strip(trial)


def strip(trial: str) -> None:
    """Take what only serves to go on out of the last checkpoint of a finished trial, by its place: the weights stay."""
    checkpoint = fetch(trial, only=LAST) / LAST
    if checkpoint.exists():
        content = read_checkpoint(checkpoint)
        if not content.keys().isdisjoint(TO_GO_ON):
            save_checkpoint(checkpoint, {name: value for name, value in content.items() if name not in TO_GO_ON})
            push(trial, only=LAST)
