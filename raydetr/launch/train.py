"""One fine-tuning over GPUs and machines with Ray Train's TorchTrainer."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._private import ray_constants
from ray.train.torch import TorchTrainer

from raydetr import config as settings
from raydetr.data.check.check import check
from raydetr.errors import UserError
from raydetr.launch.mailbox import Mailbox
from raydetr.launch.nodes import AUTOSCALED, TOKEN, awaited_machines, check_listening, check_nodes, is_of_machine, is_one_lost, lost_nodes
from raydetr.launch.reporter import TrainReporter
from raydetr.memory import without_collections
from raydetr.storage import absolute, fetch, join, split, store_environment, working_folder
from raydetr.training.console import Display

DRIVER = "trial_driver"  # the resource that keeps the drivers of inner trainers off the CPUs
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set where this process is a submitted job
SHOW_INTERVAL_S = 0.5  # between two looks at what the workers posted
# Between two questions of Ray Train to its workers. One of them waits with its next epoch's metrics until it was asked for the last
# one's; with Ray's 2 s no epoch of a small set would take less.
POLL_INTERVAL_S = 0.5
RESIZE_INTERVAL_S = 20.0  # between two looks for machines that a run of MIN:MAX workers could use
RESIZE_PATIENCE_S = 10.0  # how long such a run waits for places that it believed to be there; Ray hears late that a machine is gone

# The environment of a Ray of one's own, which leaves more of the machine to the training.
SPARING = {
    "RAY_prestart_worker_first_driver": "0",  # a process less for each CPU, that would not be used
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # and for each run: nobody takes this machine away with notice
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # nobody looks at what Ray's agent counts of the machine
}

# What may change when a run goes on; anything else would make it another run.
RESUMABLE = {
    "optim.epochs",
    "optim.patience",
    "data.num_workers",
    "data.cache_gb",
    "data.batch_timeout_s",
    "data.max_megapixels",
    "run.max_failures",
    "run.wait_for_machines_min",
    "run.workers",
    "speed.device",
    "speed.compile",
}


def train(config: settings.Config, resume: bool = False) -> dict[str, Any]:
    """Fine-tune with ``config.run.workers`` Ray Train workers; returns the last epoch's metrics.

    One worker where there is no cluster is this process: Ray Train's local mode, which starts no other. For more, Ray is started on this
    machine unless ``RAY_ADDRESS`` names a cluster. Of ``MIN:MAX`` workers there are as many as the cluster has places for, also when
    machines come and go. The run's place is ``<run.storage>/<run.name>``.
    Raises UserError for bad settings, data or an impossible request, and for what a worker found wrong with them.
    """
    config = with_absolute_paths(config)
    check_data(config)
    if not resume:
        claim_run_folder(config)
    least, most = settings.least_and_most_workers(config)
    with telling_the_way_on(config):
        if most == 1 and not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
            check_nodes(config)
            return _run_here(config)
        with ray_session(least):
            with awaited_machines(config, least):
                check_nodes(config)
                scaling = scaling_config(config)
            return _run(config, scaling)


def run_place(config: settings.Config) -> str:
    """``<run.storage>/<run.name>``, a folder or an address."""
    return join(config.run.storage, config.run.name)


def run_folder(config: settings.Config) -> Path:
    """The folder of the run; where it is kept in an object store, its working copy on this machine."""
    return working_folder(run_place(config))


def with_absolute_paths(config: settings.Config) -> settings.Config:
    """The same settings with every path absolute (a worker has another working directory) and the run named."""
    values = settings.flatten(settings.to_dict(config))
    for name in settings.PLACES:
        if values[name]:
            values[name] = absolute(values[name])
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
    place, folder = run_place(config), fetch(run_place(config), only="config.yaml")
    if (folder / "config.yaml").exists():
        raise UserError(f"{place} holds a run already: go on with it by --resume {place}, or choose another --name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.storage: cannot make {folder}: {error.strerror}") from None
    return folder


def resume_config(run: str, *layers: Mapping[str, Any]) -> settings.Config:
    """The settings of the run at the place ``run``, with what ``layers`` change; raises UserError where that makes it another run."""
    place = absolute(run)
    file = fetch(place, only="config.yaml") / "config.yaml"
    if not file.is_file():
        raise UserError(f"--resume: there is no run in {place} (no config.yaml)")
    before = settings.by_name(settings.read_config(file))
    after = {name: value for layer in layers for name, value in settings.flatten(layer).items()}
    for name, value in after.items():
        value = after[name] = settings.find_setting(name).parse(value)
        if name not in RESUMABLE and value != before.get(name):
            raise UserError(f"--resume: {name} is {before.get(name)!r} in {place} and {value!r} here; it may not change, start a new run")
    storage, name = split(place)
    return settings.load_config(before, after, {"run.storage": storage, "run.name": name})


@contextlib.contextmanager
def telling_the_way_on(config: settings.Config) -> Iterator[None]:
    """A KeyboardInterrupt within says how to go on with the run, once it has begun."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (run_folder(config) / "config.yaml").exists()
        raise KeyboardInterrupt(way_on(config) if begun else "") from None


def way_on(config: settings.Config) -> str:
    """How to go on with a run that ended before its time."""
    return f"finished epochs are kept: raydetr train --resume {run_place(config)}"


def check_data(config: settings.Config) -> None:
    """The quick part of the data check; raises UserError with the first error, so that nothing starts that would fail or lie."""
    report = check(config.data, quick=True, num_queries=config.model.num_queries)
    for line in report.summary() if report.ok else ():
        print(line, file=sys.stderr)
    if not report.ok:
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise UserError(f"{report.errors[0]}{more}; `raydetr data check` tells all")


@contextlib.contextmanager
def ray_session(workers: int, drivers: bool = False) -> Iterator[None]:
    """Ray for the length of a ``with``: the cluster at ``RAY_ADDRESS``, or one of its own on this machine, shut down at the end.

    One of its own listens on 127.0.0.1 alone. ``drivers`` says whether trials will start workers of their own. Raises UserError where
    the cluster cannot be reached or has another Ray or Python; the line says both versions.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    # The dashboard's server is what frees the places of an inner trainer whose trial was stopped.
    own = {"address": "local", "num_cpus": max(os.cpu_count() or 1, workers), "include_dashboard": drivers, "resources": {DRIVER: 64}}
    where = {"address": address, **workers_environment()} if address else own
    if not address:
        os.environ |= {**SPARING, **os.environ}
    if address:
        check_listening(f"RAY_ADDRESS {address}", address)
    try:
        with contextlib.nullcontext() if address else on_loopback():
            # What a run has to say comes by its mailbox; the workers' own output is Ray's and the libraries' chatter, kept in Ray's log
            # files.
            ray.init(**where, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        what = " ".join(str(error).split())
        if what.startswith("Version mismatch"):
            raise UserError(f"RAY_ADDRESS {address}: {what}; take the cluster's versions of Ray and Python here") from error
        place = f"the Ray cluster at {address} (RAY_ADDRESS)" if address else "Ray on this machine"
        token = f"; if it wants its token, {TOKEN}" if address else ""
        raise UserError(f"cannot reach {place}: {what}{token}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Ray that is started within listens on 127.0.0.1 only.

    On Linux it opens its ports on every interface, and an address of 127.0.0.1 given to ``ray.init`` is replaced by the machine's outer
    one. Where Ray forms no clusters (macOS, Windows) it stays on loopback: that is what is chosen here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def workers_environment() -> dict[str, Any]:
    """What ``ray.init`` is told so that workers on other machines find the same object store as this process."""
    known = store_environment()
    # Ray gives a job's workers the environment of the job, and refuses to be told anything twice.
    return {"runtime_env": {"env_vars": known}} if known and JOB not in os.environ else {}


def scaling_config(config: settings.Config) -> ray.train.ScalingConfig:
    """Workers, and the GPUs and CPUs of each, from what the cluster has; raises UserError with the numbers where it has too little."""
    (workers, most), nodes = settings.least_and_most_workers(config), nodes_resources()
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
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


def nodes_resources() -> list[dict[str, float]]:
    """What each machine of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cores_each(cores: list[int], processes: int) -> int | None:
    """The most CPUs that each of so many processes can have on machines with that many cores; None where they do not fit."""
    return max((each for each in range(1, max(cores) + 1) if sum(node // each for node in cores) >= processes), default=None)


def _run_here(config: settings.Config) -> dict[str, Any]:
    logging.getLogger("ray.train.v2.api.config").setLevel("WARNING")  # that the mode is local is no news to who runs it here
    with without_collections():
        from raydetr.training.fit import fit
    trainer = TorchTrainer(lambda: fit(config), scaling_config=ray.train.ScalingConfig(num_workers=0))
    try:
        return trainer.fit().return_value
    except UserError:
        raise
    except Exception as error:
        raise failed(error, "training", config) from error


def _run(config: settings.Config, scaling: ray.train.ScalingConfig) -> dict[str, Any]:
    mailbox = Mailbox.remote()
    if scaling.elasticity_enabled:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(RESIZE_PATIENCE_S))
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
    with Display() as display, showing(mailbox, display.show):
        return fit_on_machines(trainer, mailbox, config)


def fit_on_machines(trainer: TorchTrainer, mailbox, config: settings.Config) -> dict[str, Any]:
    """The last epoch's metrics of ``trainer.fit()``, begun again where a machine was lost, which Ray counts as the run's own failure.

    Raises UserError where the run failed.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_INTERVAL_S))
    while True:
        lost_before = lost_nodes()
        try:
            last = trainer.fit().return_value
        except SystemExit:  # Ray Train's answer to Ctrl-C
            raise KeyboardInterrupt from None
        except ray.train.TrainingFailedError as error:
            of_machine = any(map(is_of_machine, getattr(error, "worker_failures", {}).values()))
            if ray.get(mailbox.failure.remote()) or not (of_machine or is_one_lost(lost_before)):
                raise failure_of(error, mailbox, config) from error
        else:
            if last is None:
                raise ray.get(mailbox.failure.remote())
            return last


def train_worker(loop_config: dict[str, Any]) -> dict[str, Any] | None:
    """What every Ray Train worker runs: ``fit``. Returns its metrics; None where a user error ended the run before."""
    with without_collections():
        from raydetr.training.fit import fit

    mailbox = loop_config["mailbox"]
    if ray.get(mailbox.failure.remote()):
        return None  # Ray Train tries every failure again; what only the user can mend would fail again
    try:
        images = [ray.get(each) for each in loop_config.get("images", ())]
        return fit(settings.load_config(loop_config["settings"]), TrainReporter(mailbox, loop_config.get("searched"), *images))
    except UserError as error:
        ray.get(mailbox.fail.remote(error))
        raise


def failure_of(error: Exception, mailbox, config: settings.Config) -> UserError:
    """The error to show for a failed run: the user's own to mend, or what the workers died of and how to go on."""
    own = ray.get(mailbox.failure.remote())
    if own:
        return own
    causes = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = next(iter(causes.items()))
    return failed(cause, f"worker {rank}", config)


def failed(error: BaseException, what: str, config: settings.Config) -> UserError:
    """The error to show where ``what`` ended by ``error``, and how to go on."""
    last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return UserError(f"{what} failed: {last_line}; {way_on(config)}")


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
