"""One fine-tuning over GPUs and machines with Ray Train's TorchTrainer."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from raydetr import config as settings
from raydetr.console import Display
from raydetr.data.check import check
from raydetr.errors import UserError
from raydetr.launch.mailbox import Mailbox
from raydetr.launch.nodes import check_listening, check_nodes
from raydetr.launch.reporter import TrainReporter

DRIVER = "trial_driver"  # the resource that keeps the drivers of inner trainers off the CPUs
SHOW_INTERVAL_S = 0.2  # between two looks at what the workers posted

# What may change when a run goes on; anything else would make it another run.
RESUMABLE = {"optim.epochs", "optim.patience", "data.num_workers", "data.cache_gb", "run.max_failures", "run.workers", "speed.device"}


def train(config: settings.Config, resume: bool = False) -> dict[str, Any]:
    """Fine-tune with ``config.run.workers`` Ray Train workers; returns the last epoch's metrics.

    Starts Ray on this machine unless ``RAY_ADDRESS`` names a cluster. The run folder is ``<run.storage>/<run.name>``.
    Raises UserError for bad settings, data or an impossible request, and for what a worker found wrong with them.
    """
    config = with_absolute_paths(config)
    check_data(config)
    if not resume:
        claim_run_folder(config)
    with ray_session(config.run.workers):
        check_nodes(config)
        scaling = scaling_config(config)
        with Display() as display:
            return _run(config, scaling, display)


def run_folder(config: settings.Config) -> Path:
    """``<run.storage>/<run.name>``."""
    return Path(config.run.storage) / config.run.name


def with_absolute_paths(config: settings.Config) -> settings.Config:
    """The same settings with every path absolute (a worker has another working directory) and the run named."""
    values = settings.flatten(settings.to_dict(config))
    for name in ("data.path", "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations", "run.storage"):
        if values[name] and "://" not in values[name]:
            values[name] = str(Path(values[name]).expanduser().absolute())
    weights = Path(values["model.weights"]).expanduser()
    if weights.is_file():
        values["model.weights"] = str(weights.absolute())
    values["run.name"] = values["run.name"] or f"{config.model.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    return settings.load_config(values)


def check_name(config: settings.Config) -> None:
    """Raises UserError where ``run.name`` cannot name a folder."""
    name = config.run.name
    if name in (".", "..") or "/" in name or "\\" in name:
        raise UserError(f"run.name: {name!r} is not the name of a folder")


def claim_run_folder(config: settings.Config) -> Path:
    """Make the run's folder; raises UserError where a run is in it already or its name is no folder's name."""
    check_name(config)
    folder = run_folder(config)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run already: go on with it by --resume {folder}, or choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.storage: cannot make {folder}: {error.strerror}") from None
    return folder


def resume_config(run: str, *layers: Mapping[str, Any]) -> settings.Config:
    """The settings of the run in folder ``run``, with what ``layers`` change; raises UserError where that makes it another run."""
    folder = Path(run).expanduser().absolute()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: there is no run in {folder} (no config.yaml)")
    before = settings.read_yaml(folder / "config.yaml")
    after = {name: value for layer in layers for name, value in settings.flatten(layer).items()}
    for name, value in after.items():
        value = after[name] = settings.find_setting(name).parse(value)
        if name not in RESUMABLE and value != before.get(name):
            raise UserError(f"--resume: {name} is {before.get(name)!r} in {folder} and {value!r} here; it may not change, start a new run")
    return settings.load_config(before, after, {"run.storage": str(folder.parent), "run.name": folder.name})


def check_data(config: settings.Config) -> None:
    """The quick part of the data check; raises UserError with the first error, so that nothing starts that would fail or lie."""
    report = check(config.data, quick=True, num_queries=config.model.num_queries)
    if not report.ok:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise UserError(f"{report.errors[0]}{more}; `raydetr data check` tells all")


@contextlib.contextmanager
def ray_session(workers: int, drivers: bool = False) -> Iterator[None]:
    """Ray for the length of a ``with``: the cluster at ``RAY_ADDRESS``, or one of its own on this machine, shut down at the end.

    ``drivers`` says whether trials will start workers of their own. Raises UserError where the cluster cannot be reached.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    # The dashboard's server is what frees the places of an inner trainer whose trial was stopped.
    own = {"address": "local", "num_cpus": max(os.cpu_count() or 1, workers), "include_dashboard": drivers, "resources": {DRIVER: 64}}
    where = {"address": address} if address else own
    if address:
        check_listening(f"RAY_ADDRESS {address}", address)
    try:
        # What a run has to say comes by its mailbox; the workers' own output is Ray's and the libraries' chatter, kept in Ray's log files.
        ray.init(**where, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        place = f"the Ray cluster at {address} (RAY_ADDRESS)" if address else "Ray on this machine"
        raise UserError(f"cannot reach {place}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def scaling_config(config: settings.Config) -> ray.train.ScalingConfig:
    """Workers, and the GPUs and CPUs of each, from what the cluster has; raises UserError with the numbers where it has too little."""
    workers, nodes = config.run.workers, nodes_resources()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    use_gpu = config.speed.device != "cpu" and gpus > 0
    if config.speed.device == "cuda" and not gpus:
        raise UserError("speed.device: cuda was asked for and Ray sees no GPU; --speed.device cpu trains without")
    if use_gpu and workers > gpus:
        raise UserError(
            f"run.workers: {workers} asked for, {gpus} GPUs there; one worker takes one GPU (--workers {gpus}, or --speed.device cpu)"
        )
    cores = [int(node.get("CPU", 0)) for node in nodes]
    each = cores_each(cores, workers)
    if each is None:
        raise UserError(f"run.workers: {workers} asked for, {sum(cores)} CPUs there; a worker takes at least one")
    resources = {"CPU": each, **({"GPU": 1} if use_gpu else {})}
    return ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources)


def nodes_resources() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cores_each(cores: list[int], processes: int) -> int | None:
    """The most CPUs that each of so many processes can have on machines with that many cores; None where they do not fit."""
    return max((each for each in range(1, max(cores) + 1) if sum(node // each for node in cores) >= processes), default=None)


def _run(config: settings.Config, scaling: ray.train.ScalingConfig, display: Display) -> dict[str, Any]:
    mailbox = Mailbox.remote()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings.to_dict(config), "mailbox": mailbox},
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(run_folder(config)),
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with showing(mailbox, display.show):
        try:
            result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise failure_of(error, mailbox, config) from error
    if result.return_value is None:
        raise UserError(ray.get(mailbox.failure.remote()))
    return result.return_value


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """What every Ray Train worker runs: ``fit``. Returns its metrics; None where a user error ended the run before."""
    from raydetr.fit import fit

    mailbox = loop_config["mailbox"]
    if ray.get(mailbox.failure.remote()):
        return None  # Ray Train tries every failure again; what only the user can mend would fail again
    try:
        images = [ray.get(each) for each in loop_config.get("images", ())]
        return fit(settings.load_config(loop_config["settings"]), TrainReporter(mailbox, loop_config.get("searched"), *images))
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


def failure_of(error: Exception, mailbox, config: settings.Config) -> UserError:
    """The error to show for a failed run: the user's own to mend, or what the workers died of and how to go on."""
    message = ray.get(mailbox.failure.remote())
    if message:
        return UserError(message)
    causes = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(causes.items()))
    last_line = str(cause).strip().splitlines()[-1]
    return UserError(f"worker {rank} failed: {last_line}; finished epochs are kept: raydetr train --resume {run_folder(config)}")


@contextlib.contextmanager
def showing(mailbox, show: Callable[[dict], None]) -> Iterator[None]:
    """For the length of a ``with``: what the workers post is shown on this terminal."""
    done = threading.Event()

    def show_posted() -> None:
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
