"""The search: trials of one fine-tuning each, spread over a cluster by Ray Tune; what is remembered is the study's (search.py)."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune
from filelock import FileLock, Timeout
from rich.console import Console

from raydetr import config as settings
from raydetr.data.cache import DecodedImages, cache_limit
from raydetr.data.coco import CocoImages, find_split
from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.launch.nodes import awaited_machines, check_nodes
from raydetr.launch.places import ONE_WORKER_EACH, Demands, Places, check_disk, find_places, resources_of
from raydetr.launch.scheduling import (
    Hopeless,
    PopulationScheduler,
    StudyScheduler,
    StudySearcher,
    Watcher,
    copy_file,
    grace_epochs,
    trial_place,
)
from raydetr.launch.train import check_data, check_name, nodes_resources, ray_session, run_place, with_absolute_paths
from raydetr.launch.trial import run_trial
from raydetr.search.space import Space, read_space
from raydetr.search.study import Search, create_search, open_search, top_trials, write_best, write_trials
from raydetr.search.trials import TrialsDisplay
from raydetr.storage import OWNER, absolute, become_owner, fetch, is_uri, join, remove_tokens, split, working_folder

STORE_SHARE = 0.5  # of Ray's object store, for decoded pictures
KEEP_INTERVAL_S = 5.0  # between two pushes of a search's own files to a store


def tune(
    config: settings.Config,
    space: Space | str | Path | Mapping[str, Any],
    *,
    trials: int = 32,
    demands: Demands = ONE_WORKER_EACH,
    metric: str = "AP",
    sampler: str = "tpe",
    scheduler: str = "asha",
    seed: int | None = None,
    points: Sequence[Mapping[str, Any]] = (),
    time_budget_s: float | None = None,
) -> Search:
    """Search ``space`` around ``config`` with ``trials`` trials, the first of them ``config`` itself. Returns the search.

    ``seed`` is that of the draws; None: ``run.seed``, as of everything else.

    ``<run.storage>/<run.name>/`` gets the study, a run folder per trial under ``trials/``, and at the end ``best.yaml``, ``best.pth``,
    ``trials.csv`` and ``trials.parquet``. Raises UserError for bad settings, data or an impossible request.
    """
    config = with_absolute_paths(config)
    check_name(config)
    check_data(config)
    place = run_place(config)
    grace, seed = grace_epochs(config.optim), config.run.seed if seed is None else seed
    space = space if isinstance(space, Space) else read_space(space)
    if scheduler == "pbt" and demands.workers > 1:
        raise UserError("--scheduler pbt: trials go on from each other's weights with one worker each; lower --workers-per-trial")
    with ray_session(demands.workers, drivers=demands.workers > 1):
        with awaited_machines(config, demands.workers, demands.gpus_each()):
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
    demands: Demands = ONE_WORKER_EACH,
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
        with awaited_machines(base, demands.workers, demands.gpus_each()):
            check_nodes(base)
            search.reclaim(())
            places = find_places(base, demands, search.trials)
            images = share_images(base)
        return _run(search, demands, places, images, time_budget_s)


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
    """For the length of a ``with``, and at its end, the search's own files are brought to its store. Nothing for a folder.

    The process is then the one that runs the search: another that did, on whatever machine, stops at its next push.
    """
    if not is_uri(search.place):
        yield
        return
    search.owner, done = become_owner(search.place), threading.Event()

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
        remove_tokens(search.place, OWNER)


def _run(search: Search, demands: Demands, places: Places, images: list[ray.ObjectRef], time_budget_s: float | None) -> Search:
    # A trial's own fit writes its events, the study is the record of results (Ray Tune's, kept every few seconds, would cost a sixth of
    # this process's time), the table below is what is shown; and a trial that failed has no metric to report.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1"}
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's error is told in the table, a full disk's by fit_with_room
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
        try:
            fit_with_room(tuner, search, scheduler)
        finally:
            searcher.close()
    finish(search)
    return search


def fit_with_room(tuner: ray.tune.Tuner, search: Search, scheduler: StudyScheduler) -> None:
    """``tuner.fit()``; raises DiskFull where a trial, or the study, found no room: trials under way stay unfinished, none is to blame."""
    try:
        tuner.fit()
    except Exception as error:
        if not is_disk_full(error):
            raise
        scheduler.full = f"the disk of {search.folder} is full"
    if scheduler.full:
        raise DiskFull(f"{scheduler.full}; trials under way were stopped: make room, then raydetr tune --resume {search.place}")


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
