"""Run one fine-tuning on GPUs and nodes with Ray Train's TorchTrainer."""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import ray
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from raydetr import config as settings
from raydetr.data.check.check import check
from raydetr.data.coco import find_split, load_coco
from raydetr.errors import UserError
from raydetr.files import one_process
from raydetr.launch import ray_private
from raydetr.launch.mailbox import Mailbox
from raydetr.launch.nodes import (
    AUTOSCALED,
    check_nodes,
    is_node_failure,
    lost_another_node,
    lost_nodes,
    nodes_resources,
    out_of_memory,
    reserved_slots,
)
from raydetr.launch.reporter import TrainReporter
from raydetr.launch.session import ending_if_ray_is_lost, ray_session
from raydetr.launch.signals import Received, interruptible
from raydetr.launch.slots import cores_each
from raydetr.memory import without_collections
from raydetr.storage import absolute, fetch, join, split, working_folder
from raydetr.text import count, one_line
from raydetr.training.console import Display

RAY_FOLDER = "ray"  # in the folder of a run or a search: Ray's own records, of use only while it runs
SHOW_INTERVAL_S = 0.5  # between two requests for the events that the workers posted
# Between two polls of Ray Train's controller. A worker reports an epoch's metrics only after the last ones were polled. With Ray's default
# of 2 s, every epoch of a small data set would take that long.
POLL_INTERVAL_S = 0.5
RESIZE_INTERVAL_S = 20.0  # between two checks for nodes that a run of MIN:MAX workers could use
# How long a worker waits for the others in a collective operation (NCCL's and Gloo's time-out): while rank 0 evaluates the detections of
# all workers and saves, the others wait.
WORKERS_TIMEOUT_S = 1800
RESIZE_TIMEOUT_S = 10.0  # how long such a run waits for slots that Ray reported; Ray notices late that a node is lost
TWICE = "the same error twice without a finished epoch in between, so it is not retried again"
OUT_OF_MEMORY = (
    "the machine ran out of memory and Ray's memory monitor killed it: lower data.num_workers, data.cache_gb, optim.batch_size "
    "(optim.accumulate makes up for it) or data.max_size, or have fewer processes on a machine (--workers, --concurrent)"
)

# Settings that may change when a run is resumed; any other would make it another run.
RESUMABLE = {
    "optim.epochs",
    "optim.patience",
    *settings.PATH_SETTINGS,  # the data may have been moved; fit checks that it is the same
    "data.num_workers",
    "data.val_batch_size",
    "data.cache_gb",
    "data.batch_timeout_s",
    "data.exif",  # runs from before this setting ignored EXIF orientation unless the annotated size demanded it
    "data.max_megapixels",
    "run.max_failures",
    "run.tracker",
    "run.wait_for_machines_min",
    "run.workers",
    "speed.device",
    "speed.compile",
    "speed.graphs",
} - {"run.storage"}


def train(config: settings.Config, resume: bool = False, from_best: bool = False) -> dict[str, Any]:
    """Fine-tune with ``config.run.workers`` Ray Train workers; ``auto`` is one for each GPU of the cluster or of this machine.

    One worker without a cluster is this process itself (Ray Train's local mode). For more, Ray is started on this machine unless
    ``RAY_ADDRESS`` names a cluster. With ``MIN:MAX`` workers, there are as many as the cluster has resources for, also when nodes come and
    go. The run is kept in ``<run.storage>/<run.name>``.

    Args:
        config: The settings of the run.
        resume: Whether to resume the run that is there.
        from_best: Whether to resume it from ``best.pth`` instead of ``last.pth``, and train all later epochs again.

    Returns:
        The last epoch's metrics, as :func:`raydetr.training.fit.fit` returns them.

    Raises:
        UserError: Bad settings or data, an impossible request, or a run that failed; the message says how to resume.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP ended the run; the message says how to resume.
    """
    config = with_absolute_paths(config)
    check_data(config)
    in_cluster = ray.is_initialized() or "RAY_ADDRESS" in os.environ
    if not in_cluster:
        config = settings.with_workers(config, torch.cuda.device_count())
    busy = f"{run_root(config)}: another raydetr is training this run; wait for its end or stop it first"
    interrupted = interruptible(lambda: how_to_resume(config) if _has_begun(config) else "")
    with naming_the_file(), alone(run_folder(config) / ".lock", busy), interrupted as received:
        if not resume:
            claim_run_folder(config)
        elif from_best:
            from raydetr.training.resume import restart_from_best

            restart_from_best(run_root(config))
        try:
            if not in_cluster and settings.least_and_most_workers(config) == (1, 1):
                check_nodes(config)
                return _run_here(config)
            with ray_session(1 if in_cluster else settings.least_and_most_workers(config)[0]):
                config = settings.with_workers(config, _gpus(nodes_resources()))
                return _run(config, settings.least_and_most_workers(config)[0], received)
        finally:
            shutil.rmtree(run_folder(config) / RAY_FOLDER, ignore_errors=True)


@contextlib.contextmanager
def alone(lock_file: Path, busy: str) -> Iterator[None]:
    """Keep every other process of this machine out of a run or a search while the context is active.

    The lock of a killed process is free. A lock cannot keep apart two processes on two machines, with an object store, or on a file system
    without locks. Of these two, the one that started first stops after its epoch, because the other has become the owner of the run folder.

    Args:
        lock_file: The file to lock.
        busy: The error message if another process holds it.

    Raises:
        UserError: Another process holds the lock.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_process(lock_file, wait=False))
        except TimeoutError:
            raise UserError(busy) from None
        stack.callback(lock_file.unlink, missing_ok=True)
        yield


def run_root(config: settings.Config) -> str:
    """Return the path or URI of the run folder, ``<run.storage>/<run.name>``.

    Args:
        config: Settings with a name for the run.
    """
    return join(config.run.storage, str(config.run.name))


def run_folder(config: settings.Config) -> Path:
    """Return the local run folder: its working copy on this machine if the run is kept in an object store.

    Args:
        config: Settings with a name for the run.
    """
    return working_folder(run_root(config))


def with_absolute_paths(config: settings.Config) -> settings.Config:
    """Return the settings with absolute paths, because workers have other working directories, and with a name for the run.

    Args:
        config: The settings; they are not changed. Without ``run.name``, the name is made from the preset and the time.
    """
    values = settings.by_name(config)
    changed = {name: absolute(values[name]) for name in settings.PATH_SETTINGS if values[name]}
    weights = Path(config.model.weights).expanduser()
    if weights.is_file():
        changed["model.weights"] = str(weights.absolute())
    changed["run.name"] = config.run.name or f"{config.model.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return settings.with_settings(config, changed)


def claim_run_folder(config: settings.Config) -> Path:
    """Create the run folder.

    Args:
        config: The settings of the run.

    Returns:
        The local folder.

    Raises:
        UserError: There is a run in it already, or it cannot be created.
    """
    root, folder = run_root(config), fetch(run_root(config), only="config.yaml")
    try:
        if (folder / "config.yaml").exists():
            raise UserError(f"{root} holds a run already: resume it with --resume {root}, or choose another --name")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.storage: cannot make {folder}: {error.strerror}") from None
    return folder


def resume_config(run: str, *layers: Mapping[str, Any]) -> settings.Config:
    """Return the settings of an existing run, changed by ``layers``.

    Args:
        run: Path or URI of the run folder, or of a checkpoint in it.
        layers: Settings by dotted name that may change when a run is resumed; later ones override earlier ones.

    Raises:
        UserError: There is no run, or a changed setting would make it another run.
    """
    root = absolute(run)
    if names_checkpoint(run):
        root, _ = split(root)
    with naming_the_file():
        file = fetch(root, only="config.yaml") / "config.yaml"
        if not file.is_file():
            raise UserError(f"--resume: there is no run in {root} (no config.yaml)")
    before = settings.by_name(settings.read_config(file))
    after = {name: value for layer in layers for name, value in settings.flatten(layer).items()}
    for name, value in after.items():
        value = after[name] = settings.find_setting(name).parse(value)
        if name not in RESUMABLE and value != before.get(name):
            raise UserError(f"--resume: {name} is {before.get(name)!r} in {root} and {value!r} here; it may not change, start a new run")
    storage, name = split(root)
    return settings.load_config(before, after, {"run.storage": storage, "run.name": name})


def names_checkpoint(run: str, names: Collection[str] = ("best.pth", "last.pth")) -> bool:
    """Return whether the argument of ``--resume`` is one of the checkpoints of a run.

    Args:
        run: Path or URI given to ``--resume``.
        names: File names of the checkpoints.
    """
    return split(run)[1] in names


def how_to_resume(config: settings.Config) -> str:
    """Return how to resume a run that ended early, for messages.

    Args:
        config: The settings of the run.
    """
    return f"finished epochs are kept: raydetr train --resume {run_root(config)}"


def _has_begun(config: settings.Config) -> bool:
    return (run_folder(config) / "config.yaml").exists()


def check_data(config: settings.Config) -> None:
    """Run the quick part of the data check, and print its warnings to stderr.

    Args:
        config: The settings of the run.

    Raises:
        UserError: The data has errors, with which a run would fail or give wrong results; the message is the first of them.
    """
    report = check(config.data, quick=True, num_queries=config.model.num_queries)
    for line in report.summary() if report.ok else ():
        print(line, file=sys.stderr)
    if not report.ok:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise UserError(f"{report.errors[0]}{more}; `raydetr data check` tells all")
    if config.data.folds or config.data.copy_paste:
        from raydetr.data.sets import check_cut_outs, check_folds  # torchvision, which takes as long to import as torch

        split, masks = find_split(config.data, "train"), config.data.copy_paste > 0
        coco, _ = load_coco(split.annotations, split.images, split.exif, split.max_megapixels, masks=masks)
        if config.data.folds:
            check_folds(coco, config.data.folds)
        if masks:
            check_cut_outs(coco, split.annotations)


def scaling_config(config: settings.Config) -> ray.train.ScalingConfig:
    """Return the number of workers, and the GPUs and CPUs of each, for the resources that the cluster has.

    Args:
        config: The settings of the run, without ``auto`` in ``run.workers``.

    Raises:
        UserError: The cluster does not have the resources; the message has the numbers.
    """
    (workers, most), nodes = settings.least_and_most_workers(config), nodes_resources()
    gpus = _gpus(nodes)
    use_gpu = config.speed.device != "cpu" and gpus > 0
    if config.speed.device == "cuda" and not gpus:
        raise UserError(f"speed.device: cuda was asked for and Ray sees no GPU; --speed.device cpu trains without{AUTOSCALED}")
    if use_gpu and workers > gpus:
        raise UserError(
            f"run.workers: {workers} asked for, {gpus} GPUs there; one worker takes one GPU (--workers {gpus}, or --speed.device cpu)"
            f"{AUTOSCALED}"
        )
    cores = [int(node.get("CPU", 0)) for node in nodes]
    fitting = min(gpus, sum(cores)) if use_gpu else sum(cores)
    each = cores_each(cores, max(workers, min(most, fitting)))
    if each is None:
        raise UserError(f"run.workers: {workers} asked for, {sum(cores)} CPUs there; a worker takes at least one{AUTOSCALED}")
    resources = {"CPU": each, **({"GPU": 1} if use_gpu else {})}
    return ray.train.ScalingConfig(
        num_workers=workers if workers == most else (workers, most),
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
        use_gpu=use_gpu,
        resources_per_worker=resources,
    )


def _gpus(nodes: list[dict[str, float]]) -> int:
    return int(sum(node.get("GPU", 0) for node in nodes))


def _run_here(config: settings.Config) -> dict[str, Any]:
    logging.getLogger(ray_private.LOGGERS["train"]).setLevel("WARNING")  # Ray logs at INFO that the mode is local, as intended here
    with without_collections():
        from raydetr.training.fit import fit
    trainer = TorchTrainer(lambda: fit(config), scaling_config=ray.train.ScalingConfig(num_workers=0))
    try:
        return cast(dict[str, Any], trainer.fit().return_value)
    except UserError:
        raise
    except Exception as error:
        raise failed(reason_of(error), "training", config) from error


def _run(config: settings.Config, least: int, received: Received) -> dict[str, Any]:
    with ending_if_ray_is_lost(received, lambda: how_to_resume(config)):
        with reserved_slots(config, least):
            check_nodes(config)
            scaling = scaling_config(config)
        mailbox = Mailbox.remote()
        if scaling.elasticity_enabled:
            os.environ.setdefault(ray_private.TRAIN_START_TIMEOUT, str(RESIZE_TIMEOUT_S))
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"config": config, "mailbox": mailbox},
            torch_config=torch_config(),
            scaling_config=scaling,
            run_config=ray_run_config(config),
        )
        with Display() as display, showing(mailbox, display.show):
            return fit_with_retries(ray_private.without_idle_processes(trainer), mailbox, config)


def torch_config() -> TorchConfig:
    """Return how the workers of a run are connected: by NCCL if they have GPUs, by Gloo if not."""
    return TorchConfig(timeout_s=WORKERS_TIMEOUT_S)


def ray_run_config(config: settings.Config, callbacks: list | None = None) -> ray.train.RunConfig:
    """Return the options of Ray Train for a run: where it keeps its own records, and how often it replaces lost workers.

    Earlier records, which a killed process may have left, are deleted.

    Args:
        config: The settings of the run.
        callbacks: Ray Train's callbacks.
    """
    folder = run_folder(config)
    shutil.rmtree(folder / RAY_FOLDER, ignore_errors=True)  # left by a killed process; the run resumes from its own files
    return ray.train.RunConfig(
        name=RAY_FOLDER,
        storage_path=str(folder),
        failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
        logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        callbacks=callbacks,
    )


def fit_with_retries(trainer: TorchTrainer, mailbox: Any, config: settings.Config) -> dict[str, Any]:
    """Run ``trainer.fit()``, and start it again after losses that are not the fault of the run.

    Ray Train itself retries lost workers. It is started again after the loss of a node, which Ray would count as a failure of the run, and
    up to ``run.max_failures`` times after the loss of the process of its controller.

    Args:
        trainer: Ray Train's trainer, whose workers run :func:`train_worker`.
        mailbox: The run's :class:`raydetr.launch.mailbox.Mailbox`.
        config: The settings of the run.

    Returns:
        The last epoch's metrics.

    Raises:
        UserError: The run failed.
        KeyboardInterrupt: Ctrl-C ended the run.
    """
    os.environ.setdefault(ray_private.TRAIN_POLL_INTERVAL, str(POLL_INTERVAL_S))
    controllers_lost = 0
    while True:
        lost_before = lost_nodes()
        try:
            last = trainer.fit().return_value
        except SystemExit:  # Ray Train's answer to Ctrl-C
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            on_node = any(map(is_node_failure, getattr(error, "worker_failures", {}).values()))
            if user_error(mailbox) or not (on_node or lost_another_node(lost_before)):
                raise failure_of(error, mailbox, config) from error
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            ray_private.release_reserved()
            controllers_lost += not is_node_failure(error)
            if controllers_lost > config.run.max_failures:
                raise failed(f"{reason_of(error)} ({_retries(config)})", "Ray Train's controller", config) from error
        else:
            if last is None:
                raise user_error(mailbox) or UserError(f"the run ended without metrics; {how_to_resume(config)}")
            return last


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """Run ``fit`` in a Ray Train worker.

    Args:
        loop_config: ``config`` and ``mailbox``; in a search also ``objectives``, ``searched`` and ``images``, as in
            :class:`raydetr.launch.trial.Assignment`.

    Returns:
        The metrics of ``fit``; None if an error that the user must fix has ended the run before.

    Raises:
        UserError: The settings or the data are wrong; the error is posted to the mailbox as well.
        RuntimeError: The training failed. If it fails the same way twice, the error is posted to the mailbox.
    """
    with without_collections():
        from raydetr.training.fit import fit

    mailbox = loop_config["mailbox"]
    if user_error(mailbox):
        return None  # Ray Train retries every failure, but one that only the user can fix would occur again
    try:
        images: list[Any] = [ray.get(each) for each in loop_config.get("images", ())]
        return fit(
            loop_config["config"],
            TrainReporter(mailbox, loop_config.get("searched"), *images, objectives=loop_config.get("objectives", ())),
        )
    except UserError as error:
        _post_failure(mailbox, error)
        raise
    except RuntimeError as error:
        rank, text = ray.train.get_context().get_world_rank(), f"{type(error).__name__}: {one_line(error)}"
        with contextlib.suppress(ray.exceptions.RayActorError):
            if is_repeatable(error) and ray.get(mailbox.crash.remote(rank, text)):
                _post_failure(mailbox, failed(f"{text} ({TWICE})", f"worker {rank}", loop_config["config"]))
        raise


def _post_failure(mailbox: Any, error: UserError) -> None:
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(mailbox.fail.remote(error))


def is_repeatable(error: BaseException) -> bool:
    """Return whether an error may come from the program itself, so that a retry would fail as well.

    Args:
        error: The error.

    Returns:
        True for a plain RuntimeError (not a subclass of it) that does not mention CUDA.
    """
    return type(error) is RuntimeError and "CUDA" not in str(error)


def user_error(mailbox: Any) -> UserError | None:
    """Return the first error that the workers of a run posted for the user to fix.

    Args:
        mailbox: The run's :class:`raydetr.launch.mailbox.Mailbox`.

    Returns:
        The error, or None if there is none or the mailbox's process was just lost.
    """
    with contextlib.suppress(ray.exceptions.RayActorError):
        return cast(UserError | None, ray.get(mailbox.failure.remote()))
    return None


def failure_of(error: Exception, mailbox: Any, config: settings.Config) -> UserError:
    """Return the error to show for a failed run: one that the user must fix, or else what ended the first worker and how to resume.

    Args:
        error: The error that Ray Train raised.
        mailbox: The run's :class:`raydetr.launch.mailbox.Mailbox`.
        config: The settings of the run.
    """
    own = user_error(mailbox)
    if own:
        return own
    causes = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(causes.items()))
    return failed(f"{reason_of(cause)} ({_retries(config)})", f"worker {rank}", config)


def _retries(config: settings.Config) -> str:
    return f"after {count(config.run.max_failures, 'retry', 'retries')}, run.max_failures"


def failed(reason: str, what: str, config: settings.Config) -> UserError:
    """Return an error that says what failed, why, and how to resume.

    Args:
        reason: Why it failed.
        what: What failed, such as ``"worker 0"``.
        config: The settings of the run.
    """
    return UserError(f"{what} failed: {reason}; {how_to_resume(config)}")


def reason_of(error: BaseException) -> str:
    """Return on one line why a process ended.

    Args:
        error: The error that Ray raised for the process.
    """
    return OUT_OF_MEMORY if out_of_memory(error) else (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def naming_the_file() -> Iterator[None]:
    """Turn an OSError about a file, such as a folder without permission, into a UserError that names the file.

    Raises:
        UserError: Such an error occurred in the context.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; what was finished is kept") from error


@contextlib.contextmanager
def showing(mailbox: Any, show: Callable[[dict], None]) -> Iterator[None]:
    """Show the events that the workers post while the context is active.

    Args:
        mailbox: The run's :class:`raydetr.launch.mailbox.Mailbox`.
        show: Called with every event, in the order in which they were posted.
    """
    done = threading.Event()

    def show_posted() -> None:
        # A lost mailbox is restarted; otherwise the run ends for the same reason, which is reported there.
        with contextlib.suppress(ray.exceptions.RayError):
            for event in ray.get(mailbox.take.remote()):
                show(event)

    def until_done() -> None:
        while not done.wait(SHOW_INTERVAL_S):
            show_posted()

    thread = threading.Thread(target=until_done, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show_posted()
