"""One fine-tuning over GPUs and nodes with Ray Train's TorchTrainer."""

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
from ray.train.torch import TorchTrainer

from raydetr import config as settings
from raydetr.data.check.check import check
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
SHOW_INTERVAL_S = 0.5  # between two looks at what the workers posted
# Between two polls of Ray Train's controller. A worker waits with its next epoch's metrics until the last ones were polled; with Ray's
# 2 s no epoch of a small data set would take less.
POLL_INTERVAL_S = 0.5
RESIZE_INTERVAL_S = 20.0  # between two looks for nodes that a run of MIN:MAX workers could use
RESIZE_TIMEOUT_S = 10.0  # how long such a run waits for slots that it believed to be there; Ray notices late that a node is gone
TWICE = "the same error twice without a finished epoch in between, so it is not retried again"
OUT_OF_MEMORY = (
    "the machine ran out of memory and Ray's memory monitor killed it: lower data.num_workers, data.cache_gb, optim.batch_size "
    "(optim.accumulate makes up for it) or data.max_size, or have fewer processes on a machine (--workers, --concurrent)"
)

# Settings that may change when a run is resumed; any other would make it another run.
RESUMABLE = {
    "optim.epochs",
    "optim.patience",
    *settings.PATH_SETTINGS,  # where the data is now; fit checks that it is the run's own
    "data.num_workers",
    "data.val_batch_size",
    "data.cache_gb",
    "data.batch_timeout_s",
    "data.exif",  # runs begun before this setting read images whose size does not tell as they are stored
    "data.max_megapixels",
    "run.max_failures",
    "run.tracker",
    "run.wait_for_machines_min",
    "run.workers",
    "speed.device",
    "speed.compile",
} - {"run.storage"}


def train(config: settings.Config, resume: bool = False, from_best: bool = False) -> dict[str, Any]:
    """Fine-tune with ``config.run.workers`` Ray Train workers; ``auto`` is one for each GPU of the cluster or of this machine.

    One worker without a cluster is this process itself (Ray Train's local mode). For more, Ray is started on this machine unless
    ``RAY_ADDRESS`` names a cluster. Of ``MIN:MAX`` workers there are as many as the cluster has resources for, also when nodes come
    and go. The run is kept in ``<run.storage>/<run.name>``.

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
    """Keep every other process of this machine out of a run or a search for the length of the context.

    The lock of a killed process is free. Of two that a lock cannot keep apart (on two machines, with an object store or a file system
    without locks), the one that started first ends after its epoch, since the other one has become the owner of the run folder.

    Args:
        lock_file: The file to lock.
        busy: The error message where another process holds it.

    Raises:
        UserError: Another process runs it.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(one_process(lock_file, wait=False))
        except TimeoutError:
            raise UserError(busy) from None
        stack.callback(lock_file.unlink, missing_ok=True)
        yield


def run_root(config: settings.Config) -> str:
    """Return ``<run.storage>/<run.name>``, a folder or a URI."""
    return join(config.run.storage, str(config.run.name))


def run_folder(config: settings.Config) -> Path:
    """Return the folder of the run; where it is kept in an object store, its working copy on this machine."""
    return working_folder(run_root(config))


def with_absolute_paths(config: settings.Config) -> settings.Config:
    """Return the same settings with every path absolute (a worker has another working directory) and the run named."""
    values = settings.by_name(config)
    changed = {name: absolute(values[name]) for name in settings.PATH_SETTINGS if values[name]}
    weights = Path(config.model.weights).expanduser()
    if weights.is_file():
        changed["model.weights"] = str(weights.absolute())
    changed["run.name"] = config.run.name or f"{config.model.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return settings.with_settings(config, changed)


def claim_run_folder(config: settings.Config) -> Path:
    """Create the run's folder.

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
        run: The folder or URI of the run, or of a checkpoint in it.
        layers: Settings by dotted name that may change when a run is resumed; later ones win.

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
    """Return how to resume a run that ended early, in words."""
    return f"finished epochs are kept: raydetr train --resume {run_root(config)}"


def _has_begun(config: settings.Config) -> bool:
    return (run_folder(config) / "config.yaml").exists()


def check_data(config: settings.Config) -> None:
    """Run the quick part of the data check.

    Raises:
        UserError: With the first error, so that nothing starts that would fail or give wrong results.
    """
    report = check(config.data, quick=True, num_queries=config.model.num_queries)
    for line in report.summary() if report.ok else ():
        print(line, file=sys.stderr)
    if not report.ok:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise UserError(f"{report.errors[0]}{more}; `raydetr data check` tells all")


def scaling_config(config: settings.Config) -> ray.train.ScalingConfig:
    """Return the number of workers, and the GPUs and CPUs of each, by what the cluster has.

    Raises:
        UserError: The cluster has too little; the message has the numbers.
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
    logging.getLogger(ray_private.LOGGERS["train"]).setLevel("WARNING")  # it says that the mode is local, which is meant here
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
            scaling_config=scaling,
            run_config=ray_run_config(config),
        )
        with Display() as display, showing(mailbox, display.show):
            return fit_with_retries(trainer, mailbox, config)


def ray_run_config(config: settings.Config, callbacks: list | None = None) -> ray.train.RunConfig:
    """Return Ray Train's side of a run: where its own records are and how often lost workers are replaced."""
    folder = run_folder(config)
    shutil.rmtree(folder / RAY_FOLDER, ignore_errors=True)  # what a killed process left; the run folder has all that is needed
    return ray.train.RunConfig(
        name=RAY_FOLDER,
        storage_path=str(folder),
        failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
        logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        callbacks=callbacks,
    )


def fit_with_retries(trainer: TorchTrainer, mailbox: Any, config: settings.Config) -> dict[str, Any]:
    """Return the last epoch's metrics of ``trainer.fit()``.

    Ray Train retries lost workers itself. It is started again where a node was lost, which Ray counts as the run's own failure, and up
    to ``run.max_failures`` times where the process of its controller was lost.

    Raises:
        UserError: The run failed.
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
        loop_config: ``config`` and ``mailbox``; in a search also ``searched`` and ``images``, as in
            :func:`raydetr.launch.trial.run_trial`.

    Returns:
        The metrics of ``fit``; None where a user error ended the run before.
    """
    with without_collections():
        from raydetr.training.fit import fit

    mailbox = loop_config["mailbox"]
    if user_error(mailbox):
        return None  # Ray Train retries every failure; one that only the user can fix would come again
    try:
        images: list[Any] = [ray.get(each) for each in loop_config.get("images", ())]
        return fit(loop_config["config"], TrainReporter(mailbox, loop_config.get("searched"), *images))
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
    """Return whether an error may be the program's own, so that it would come again: a plain RuntimeError, and none of CUDA's."""
    return type(error) is RuntimeError and "CUDA" not in str(error)


def user_error(mailbox: Any) -> UserError | None:
    """Return the first error that the workers of a run posted for the user to fix; None also of a mailbox that was just lost."""
    with contextlib.suppress(ray.exceptions.RayActorError):
        return cast(UserError | None, ray.get(mailbox.failure.remote()))
    return None


def failure_of(error: Exception, mailbox: Any, config: settings.Config) -> UserError:
    """Return the error to show for a failed run: the user's to fix, or what the workers died of and how to resume."""
    own = user_error(mailbox)
    if own:
        return own
    causes = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(causes.items()))
    return failed(f"{reason_of(cause)} ({_retries(config)})", f"worker {rank}", config)


def _retries(config: settings.Config) -> str:
    return f"after {count(config.run.max_failures, 'retry', 'retries')}, run.max_failures"


def failed(reason: str, what: str, config: settings.Config) -> UserError:
    """Return the error to show where ``what`` ended for that reason, and how to resume."""
    return UserError(f"{what} failed: {reason}; {how_to_resume(config)}")


def reason_of(error: BaseException) -> str:
    """Return in one line what a process ended with."""
    return OUT_OF_MEMORY if out_of_memory(error) else (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def naming_the_file() -> Iterator[None]:
    """Turn an OSError about a file, such as a folder without permission, into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; what was finished is kept") from error


@contextlib.contextmanager
def showing(mailbox: Any, show: Callable[[dict], None]) -> Iterator[None]:
    """Show the events that the workers post, as long as the ``with`` block runs.

    Args:
        mailbox: The Ray actor that collects the workers' events.
        show: Called with every event, in the order in which they were posted.
    """
    done = threading.Event()

    def show_posted() -> None:
        # A mailbox that was lost comes back, or the run ends for the same reason and says so.
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
