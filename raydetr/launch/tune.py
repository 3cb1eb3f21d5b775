"""Run a search: Ray Tune distributes its trials, one fine-tuning each, over a cluster; the study is the record of them."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.stopper import CombinedStopper
from rich.console import Console

from raydetr import config as settings
from raydetr.data.cache import DecodedImages, cache_limit
from raydetr.data.coco import CocoImages, find_split
from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.launch import ray_private
from raydetr.launch.nodes import check_nodes, nodes_resources, reserved_slots
from raydetr.launch.scheduling import (
    Hopeless,
    PopulationScheduler,
    StudyScheduler,
    StudySearcher,
    UntilSignal,
    Watcher,
    copy_file,
    grace_epochs,
    tidy_search,
    trial_root,
)
from raydetr.launch.session import ending_if_ray_is_lost, ray_session
from raydetr.launch.signals import Interrupted, Received, ending_signals, interruptible
from raydetr.launch.slots import ONE_WORKER_EACH, Demands, Slots, check_disk, find_slots
from raydetr.launch.train import RAY_FOLDER, alone, check_data, naming_the_file, run_root, with_absolute_paths
from raydetr.launch.trial import run_trial, trial_resources
from raydetr.search.methods import check_request
from raydetr.search.results import top_trials, write_best, write_trials
from raydetr.search.space import Space, read_space
from raydetr.search.study import TRIALS_FOLDER, Search, create_search, open_search
from raydetr.search.trials import TrialsDisplay
from raydetr.storage import CONFIRM_FOLDER, OWNER, absolute, become_owner, fetch, is_uri, join, remove_tokens, split, working_folder
from raydetr.training.metrics import LATENCY, MASK_METRICS, METRICS

STORE_SHARE = 0.5  # of Ray's object store, for decoded images
DEFAULT_SAMPLER, SAMPLER_OF_TOO_MANY = "gp", "tpe"
TOO_MANY = 129  # trials at a time, with which a draw of the model takes too long
DEFAULT_SCHEDULERS = {"gp": "promote"}  # by sampler, with one objective; beside all others asha
KEEP_INTERVAL_S = 5.0  # between two pushes of a search's own files to an object store


def tune(
    config: settings.Config,
    space: Space | str | Path | Mapping[str, Any],
    *,
    trials: int = 32,
    demands: Demands = ONE_WORKER_EACH,
    metric: str = "AP",
    also: Sequence[str] = (),
    sampler: str | None = None,
    scheduler: str | None = None,
    seed: int | None = None,
    points: Sequence[Mapping[str, Any]] = (),
    prior: Sequence[Mapping[str, Any]] = (),
    time_budget_s: float | None = None,
) -> Search:
    """Search ``space`` around ``config``.

    ``<run.storage>/<run.name>/`` gets the study, a run folder for each trial under ``trials/``, and at the end ``best.yaml``, ``best.pth``,
    ``trials.csv`` and ``trials.parquet``.

    Args:
        config: The settings of trial 0, and the values of all settings that are not in the space.
        space: A search space, a file of one, the name of a ready one, or a mapping.
        trials: Number of trials in all, trial 0 included.
        demands: What each trial requests from the cluster.
        metric: The COCO metric to maximize.
        also: Further objectives, of which the search finds the best trade-offs: other COCO metrics, or ``"latency"``, the seconds that the
            trained network takes for one image. ``best.yaml`` stays the best by ``metric``.
        sampler: How settings are drawn: ``"tpe"``, ``"gp"``, ``"random"`` or ``"cmaes"``; None: as :func:`default_sampler` says.
        scheduler: What stops trials early: ``"asha"``, ``"half"``, ``"promote"``, ``"evidence"``, ``"median"``, ``"none"`` or ``"pbt"``;
            None: as :func:`default_scheduler` says.
        seed: Seed of the draws; None: ``run.seed``, which is the seed of everything else.
        points: Settings to try after trial 0, by dotted name.
        prior: Settings that are believed to be good; the sampler ``"gp"`` begins to draw near them.
        time_budget_s: Time in seconds after which the search stops; None: no limit.

    Returns:
        The search.

    Raises:
        UserError: Bad settings or data, an impossible request, or all trials failed.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP ended the search; the message says how to resume.
    """
    config = with_absolute_paths(config)
    root = run_root(config)
    grace, seed = grace_epochs(config.optim), config.run.seed if seed is None else seed
    space = space if isinstance(space, Space) else read_space(space)
    check_objectives(metric, also, config)
    likely = sampler or default_sampler(1, scheduler, also)  # how many trials run at a time is known later
    check_request(space, trials, likely, scheduler or default_scheduler(likely, also), objectives=[metric, *also])
    settings.check_batch_total(config.optim, demands.workers, demands.workers)
    if scheduler == "pbt" and demands.workers > 1:
        raise UserError("--scheduler pbt: trials take over each other's weights with one worker each; lower --workers-per-trial")
    if scheduler == "pbt" and config.data.reshuffle:
        raise UserError("--scheduler pbt: trials take over each other's weights, so all need the same images; leave out data.reshuffle")
    check_data(settings.with_settings(config, {"data.copy_paste": 1.0}) if "data.copy_paste" in space.dimensions else config)
    with naming_the_file(), interruptible(lambda: ""), ray_session(demands.workers, drivers=demands.workers > 1):
        with reserved_slots(config, demands.workers, demands.gpus_per_worker()):
            check_nodes(config)
            slots = find_slots(config, demands, trials)
            sampler = sampler or default_sampler(slots.concurrent, scheduler, also)
            scheduler = scheduler or default_scheduler(sampler, also)
            check_disk(config, working_folder(root), trials, slots.concurrent, scheduler == "promote")
            images = share_images(config)
        refresh_working_copy(root)
        search = create_search(
            root,
            space,
            config,
            trials=trials,
            metric=metric,
            sampler=sampler,
            pruner=scheduler,
            grace=grace,
            seed=seed,
            points=points,
            prior=prior,
            also=also,
        )
        with driving(search.folder), pushing(search):
            return run_trials(search, demands, slots, images, time_budget_s)


def default_sampler(concurrent: int, scheduler: str | None, also: Sequence[str] = ()) -> str:
    """Return how a search draws settings where nobody says it: with a model of all trials, unless too many run at a time.

    Args:
        concurrent: Number of trials at a time.
        scheduler: The scheduler that was asked for; None: the default.
        also: Further objectives of the search.
    """
    too_many = concurrent >= TOO_MANY and scheduler != "promote"
    return SAMPLER_OF_TOO_MANY if too_many or scheduler == "pbt" or also else DEFAULT_SAMPLER


def default_scheduler(sampler: str, also: Sequence[str] = ()) -> str:
    """Return what stops trials where nobody says it: a rule that lets more of them pass beside the sampler that learns from these.

    Args:
        sampler: How the search draws settings.
        also: Further objectives of the search.
    """
    return "none" if also else DEFAULT_SCHEDULERS.get(sampler, "asha")


def check_objectives(metric: str, also: Sequence[str], config: settings.Config) -> None:
    """Check the names of the objectives of a search.

    Args:
        metric: The metric to maximize.
        also: Further objectives.
        config: The settings of trial 0.

    Raises:
        UserError: A name is unknown, or that of an AP of masks, which the settings do not train.
    """
    known = ", ".join(METRICS)
    for flag, name in (("--metric", metric), *(("--also", each) for each in also)):
        if name == LATENCY and flag == "--also":
            continue
        if name == LATENCY:
            raise UserError(f"--metric {LATENCY}: the fastest network finds nothing; search a metric such as AP, and give --also {LATENCY}")
        if name not in (*METRICS, *MASK_METRICS):
            first = f"{LATENCY}, " if flag == "--also" else ""
            raise UserError(f"{flag}: {name!r} is not one of {first}{known}, or with masks {', '.join(MASK_METRICS)}")
        if name in MASK_METRICS and not config.model.masks:
            raise UserError(f"{flag} {name}: without model.masks there is no AP of masks; set --model.masks true")


def resume(
    folder: str | Path,
    space: Space | None = None,
    *,
    trials: int | None = None,
    demands: Demands = ONE_WORKER_EACH,
    time_budget_s: float | None = None,
) -> Search:
    """Resume a search: finished trials do not run again, and unfinished ones resume from their last epoch.

    Args:
        folder: Path or URI of the search.
        space: Its search space, which is compared with the one that the search began with; None: no comparison.
        trials: Number of trials in all from now on; None: as before.
        demands: What each trial requests from the cluster.
        time_budget_s: Time in seconds after which the search stops; None: no limit.

    Returns:
        The search.

    Raises:
        UserError: There is no search, another process runs it, ``space`` is not its own (the message has the difference), or ``trials`` is
            less than the number of trials that have begun.
        KeyboardInterrupt: As for :func:`tune`.
    """
    root = absolute(folder)
    with naming_the_file(), interruptible(lambda: f"raydetr tune --resume {root}"):
        refresh_working_copy(root)
        search = open_search(root, space)
        _extend(search, trials)
        with driving(search.folder), ray_session(demands.workers, drivers=demands.workers > 1), pushing(search):
            base = search.config(0)
            base.run.storage = split(root)[0]  # the search may have been moved since it began
            with reserved_slots(base, demands.workers, demands.gpus_per_worker()):
                check_nodes(base)
                search.reclaim(())
                slots = find_slots(base, demands, search.trials)
                images = share_images(base)
            tidy_search(search)
            return run_trials(search, demands, slots, images, time_budget_s)


def _extend(search: Search, trials: int | None) -> None:
    begun = sum(trial.datetime_start is not None for trial in search.frozen())
    if trials is not None and trials < begun:
        raise UserError(f"--trials {trials}: {begun} trials of {search.path} have begun already; give {begun} to finish these, or more")
    if trials is not None and trials != search.trials:
        search.extend(trials)


def driving(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep every other process of this machine from running a search while the context is active.

    Args:
        folder: The local folder of the search.

    Raises:
        UserError: Another process runs the search.
    """
    return alone(folder / "driver.lock", f"{folder}: another raydetr is running this search; wait for its end or stop it first")


def refresh_working_copy(root: str) -> None:
    """Update the working copy of a search to what its object store holds. Nothing happens for a local folder.

    Args:
        root: Path or URI of the search.

    Raises:
        UserError: Another process of this machine runs the search, or the store refuses or does not answer.
        OSError: The local disk fails.
    """
    if is_uri(root):
        with driving(working_folder(root)):
            fetch(root, recursive=False)  # the trials fetch their own


@contextlib.contextmanager
def pushing(search: Search) -> Iterator[None]:
    """Push the search's own files to its object store every few seconds and at the end of the context. Nothing happens for a local folder.

    This process becomes the owner of the search: another process that ran it, on whatever machine, stops at its next push.

    Args:
        search: The search.

    Raises:
        UserError: The store refuses or does not answer, or another process has taken over the search.
    """
    if not is_uri(search.path):
        yield
        return
    search.owner, done = become_owner(search.path), threading.Event()

    def push_again_and_again() -> None:
        while not done.wait(KEEP_INTERVAL_S):
            with contextlib.suppress(UserError):  # the next push follows soon, and the last one retries for minutes
                search.push(patience_s=0)

    thread = threading.Thread(target=push_again_and_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        search.push()
        remove_tokens(search.path, OWNER)


def run_trials(search: Search, demands: Demands, slots: Slots, images: list[ray.ObjectRef], time_budget_s: float | None) -> Search:
    """Run the unfinished trials of a search, and write its results.

    Args:
        search: The search.
        demands: What each trial requests from the cluster.
        slots: What each trial gets, from :func:`raydetr.launch.slots.find_slots`.
        images: A reference to the decoded images, from :func:`share_images`.
        time_budget_s: Time in seconds after which the search stops; None: no limit.

    Returns:
        The search.

    Raises:
        UserError: All trials failed, a disk is full, or a file cannot be written.
        KeyboardInterrupt: A signal ended the search; the message says how to resume.
    """
    searcher, population = StudySearcher(search, demands, slots), search.scheduler == "pbt"
    os.environ |= ray_private.TUNE_ENVIRONMENT
    # By default Ray Tune lets one trial wait. Here the searcher limits the trials; only in a population, which takes turns, one waits.
    os.environ[ray_private.PENDING_TRIALS] = "1" if population else str(search.trials)
    logging.getLogger(ray_private.LOGGERS["tune"]).setLevel(logging.CRITICAL)  # the table shows why a trial failed
    ray_private.keep_keys_out_of_logs()
    ray_private.count_no_callbacks()
    scheduler = PopulationScheduler(search, searcher) if population else StudyScheduler(search)
    with ending_signals(end=lambda: None) as received, ending_if_ray_is_lost(received, lambda: _last_words(search)):
        with Console(highlight=False) as console, TrialsDisplay(search, console) as display:
            tuner = ray.tune.Tuner(
                ray.tune.with_resources(ray.tune.with_parameters(run_trial, images=images), trial_resources),
                tune_config=ray.tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=scheduler,
                    num_samples=-1,
                    reuse_actors=demands.workers == 1,
                    time_budget_s=time_budget_s,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=_ray_run_config(search, display, received),
            )
            try:
                fit_until_full(tuner, search, scheduler)
            finally:
                searcher.close()
        tidy_search(search, searcher.stripped)
        finish(search, interrupted=received.number is not None)
        if received.number is not None:
            raise Interrupted(how_to_resume(search), received.number, search)
    return search


def _ray_run_config(search: Search, display: TrialsDisplay, received: Received) -> ray.tune.RunConfig:
    return ray.tune.RunConfig(
        name=RAY_FOLDER,
        storage_path=str(search.folder),  # a local folder, since only this process uses these files
        failure_config=ray.tune.FailureConfig(max_failures=-1),  # the scheduler counts them
        callbacks=[Watcher(search, display)],
        stop=CombinedStopper(Hopeless(search), UntilSignal(received)),
        verbose=0,
    )


def _last_words(search: Search) -> str:
    with contextlib.suppress(UserError, OSError):
        finish(search, interrupted=True)
    return f"{how_to_resume(search)}\n{top_trials(search)}"


def how_to_resume(search: Search) -> str:
    """Return how to resume a search that ended early, for messages.

    Args:
        search: The search.
    """
    parent, name = split(search.path)
    return f"finished epochs are kept: raydetr {f'confirm {parent}' if name == CONFIRM_FOLDER else f'tune --resume {search.path}'}"


def fit_until_full(tuner: ray.tune.Tuner, search: Search, scheduler: StudyScheduler) -> None:
    """Run ``tuner.fit()``, and say what to do if a disk is full or a file cannot be written.

    Args:
        tuner: Ray Tune's tuner.
        search: The search.
        scheduler: Its scheduler, which records a full disk that a trial reported.

    Raises:
        DiskFull: The disk of a trial or of the study is full. Running trials stay unfinished.
        UserError: A file of the search cannot be written.
    """
    try:
        tuner.fit()
    except Exception as error:
        if is_disk_full(error):
            scheduler.full = f"the disk of {search.folder} is full"
        elif file_error := _file_error(error):
            raise UserError(f"{file_error.filename or search.folder}: {file_error.strerror}; {how_to_resume(search)}") from error
        else:
            raise
    if scheduler.full:
        raise DiskFull(f"{scheduler.full}; trials under way were stopped: make room, then raydetr tune --resume {search.path}")


def _file_error(error: BaseException | None) -> OSError | None:
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def share_images(config: settings.Config) -> list[ray.ObjectRef]:
    """Decode the images of a search once, and put them into Ray's object store, where all trials of a node share them.

    Args:
        config: The settings of the search. ``data.cache_gb`` and the size of the object store limit how many images are decoded.

    Returns:
        One reference to a :class:`raydetr.data.cache.DecodedImages`.

    Raises:
        UserError: The data or an image cannot be read.
    """
    store = min(node["object_store_memory"] for node in nodes_resources())
    limit = min(cache_limit(config.data), int(store * STORE_SHARE))
    masks = config.model.masks
    splits = [CocoImages(find_split(config.data, split), lambda *sample: sample, masks=masks) for split in ("train", "val")]
    rles = [of_image for split in splits for of_image in split.rles or []] if masks else None
    images = DecodedImages([file for split in splits for file in split.files], limit, splits[0].split.read, rles)
    images.fill()
    return [ray.put(images)]


def finish(search: Search, interrupted: bool = False) -> None:
    """Write the results of a search that has ended, also if it ended early: best.yaml, best.pth and the tables.

    Args:
        search: The search.
        interrupted: Whether a signal ended it, so that more trials may follow.

    Raises:
        UserError: All trials failed, and no more will follow.
    """
    write_trials(search.folder)
    best = search.best()
    failed = [trial for trial in search.frozen() if "reason" in trial.user_attrs]
    if best is None:
        unfinished = any(not trial.state.is_finished() and trial.datetime_start for trial in search.frozen())
        if failed and not interrupted and not unfinished:
            raise UserError(f"all {len(failed)} trials failed, the first of them: {failed[0].user_attrs['reason']}")
        return
    write_best(search.folder)
    weights = fetch(trial_root(search, best.number), only="best.pth") / "best.pth"
    if weights.exists():
        copy_file(weights, search.folder / "best.pth")


def summary(search: Search) -> str:
    """Return a table of the best trials beside trial 0, and what to do next.

    Args:
        search: The search.
    """
    unfinished = search.trials - sum(trial.state.is_finished() for trial in search.frozen())
    lines = [top_trials(search)]
    if unfinished > 0:
        lines.append(f"{unfinished} of {search.trials} trials are not finished: raydetr tune --resume {search.path}")
    if search.also and search.front():
        lines.append(f"settings and weights of each trial: {join(search.path, TRIALS_FOLDER)}")
    if search.best():
        best = {name: join(search.path, name) for name in ("best.yaml", "best.pth")}
        lines.append(f"best settings: raydetr train --config {best['best.yaml']}; its weights: {best['best.pth']}")
    return "\n".join(lines)
