"""Every private part of Ray that raydetr relies on, in one file. Private means that Ray may change it without notice.

All of it was read in Ray 2.60.0, the version that ``pyproject.toml`` allows. ``HOOKS`` lists what must exist, by its full name and with the
reason for using it. A test resolves each name, and so reports those that a new version of Ray lacks. To move to another version of Ray,
change the bound in ``pyproject.toml``, run ``tests/launch/test_ray_private.py``, and read what changed around each hook that it reports.
"""

import contextlib
import functools
import importlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants, services, worker
from ray.util.placement_group import PlacementGroup

READ_IN = "2.60.0"  # the version of Ray in which every hook below was read

HOOKS = {
    "ray._private.ray_constants.ENABLE_RAY_CLUSTER": "a Ray of one's own listens on 127.0.0.1 only where this is False",
    "ray._private.services.ConsolePopen": "starts the processes of a Ray of one's own, which get process groups of their own",
    "ray._private.services.get_ray_address_from_environment": "what RAY_ADDRESS=auto means, to see first whether it answers",
    "ray._common.utils.get_ray_address_file": "names the address file that a killed Ray left",
    "ray._private.worker._global_node": "the node this driver is on, whose raylet may be lost",
    "ray._private.node.Node.all_processes": "the processes of a Ray of one's own, which may be lost",
    "ray._private.node.Node.raylet_socket_name": "where the raylet of this driver's node listens",
    "ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE": "puts the keys of object stores into runtime environments, which Ray logs",
    "ray.air._internal.usage.tag_callbacks": "imports mlflow and wandb at the start of a search, for seconds",
    "ray.tune.execution.tune_controller.TuneController.search_alg": "a trial that was lost too often is told to the study as failed",
    "ray.tune.execution.tune_controller.TuneController.stop_trial": "a trial that was lost too often is not started again",
    "ray.tune.execution.tune_controller.TuneController.request_stop_experiment": "a full disk ends the search",
    "ray.tune.execution.tune_controller.TuneController.pause_trial": "a member of a population gives its slot to another",
    "ray.tune.execution.tune_controller.TuneController.get_trials": "which member of a population is next",
    "ray.tune.experiment.trial.Trial.pickled_error_file": "why Ray Tune lost a trial",
    "ray.tune.experiment.trial.Trial.error_file": "why Ray Tune lost a trial, of errors that it does not pickle",
    "ray.tune.progress_reporter.TrialProgressCallback": "prints lines of its own unless the search has one",
    "ray.tune.experiment.trial.Trial.set_config": "a member of a population resumes with other settings",
    "ray.train.v2._internal.exceptions.WorkerHealthCheckFailedError": "wraps the loss of a training worker",
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer._create_default_callbacks": "two of them start processes that no run needs",
    "ray.train.v2._internal.callbacks.datasets.DatasetsCallback": "starts a process for data sets of Ray Data, of which there are none",
    "ray.train.v2._internal.callbacks.placement_group_callback.PlacementGroupCleanerCallback": "starts a process that asks the dashboard",
    "ray.PlacementGroupID": "what a killed controller of Ray Train had reserved is released",
    "ray.serve._private.replica.add_port_to_grpc_server": "a replica of Ray Serve on 127.0.0.1 listens there only",
    "ray.dashboard.modules.dashboard_sdk.SubmissionClient._do_request": "asks a cluster for its versions before a job is submitted",
}

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set where this process is a submitted job

# The environment of a Ray that this process starts, which leaves more of the machine to the training.
SPARING = {
    "RAY_prestart_worker_first_driver": "0",  # no idle worker process for each CPU
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no process that waits for a notice that the node is preempted
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # Ray's agent measures the load of the machine only once a minute
}

# What Ray Tune's environment variables are set to for a search. A trial's own ``fit`` writes its events, the study is the record of
# results (Ray Tune's snapshots would take a sixth of the driver's time), and a failed trial has no metric to report.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # launch/signals.py has the handlers
}
# How long a trial that was stopped may take to end before the next one starts in its process. It ends its loading processes first, which
# takes longer than Ray Tune's 2 s on a busy machine; its process would then be thrown away, and the next trial counted as lost.
STOP_TIMEOUT, STOP_TIMEOUT_S = "TUNE_FUNCTION_THREAD_TIMEOUT_S", "60"
PENDING_TRIALS = "TUNE_MAX_PENDING_TRIALS_PG"
TRAIN_POLL_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
TRAIN_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# How long a process waits for a lost head (its GCS) before Ray aborts it with a C++ stack trace, and Ray's default in seconds.
RECONNECT_TIMEOUT, RECONNECT_TIMEOUT_S = "RAY_gcs_rpc_server_reconnect_timeout_s", 60

LOGGERS = {"train": "ray.train.v2.api.config", "tune": "ray.tune"}


def missing_hooks() -> list[str]:
    """Return the names of ``HOOKS`` that the installed Ray lacks."""
    return [name for name in HOOKS if not _exists(name)]


def _exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                # An attribute that __init__ sets is only in its source.
                initializer = getattr(getattr(found, "__init__", None), "__code__", None)
                return initializer is not None and part in initializer.co_names
            found = getattr(found, part)
        return True
    return False


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Make a Ray that is started within the context listen on 127.0.0.1 only.

    On Linux, Ray opens its ports on every interface, and an address of 127.0.0.1 given to ``ray.init`` is replaced by the machine's outer
    address. Where Ray forms no clusters (macOS, Windows) it uses the loopback interface; this context selects the same behavior here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def replica_on_loopback() -> None:
    """Make this replica of Ray Serve listen on 127.0.0.1 only, where its node has that address; to be called while it is initialized.

    Replicas call each other through a server that Ray opens on every interface, and that unpickles what it is sent.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    if ray.util.get_node_ip_address() == "127.0.0.1":
        opened = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: opened(server, address.replace("[::]", "127.0.0.1"))


@contextlib.contextmanager
def in_own_process_groups() -> Iterator[None]:
    """Put the processes of a Ray that is started within the context into process groups of their own.

    A signal to this process's group (a closed terminal, ``kill -- -PGID``) then reaches only this process, which shuts Ray down gracefully.
    Ray's processes still end with this process: the kernel tells them (PR_SET_PDEATHSIG).
    """
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


def keep_keys_out_of_logs() -> None:
    """Remove the keys of object stores from each trial's runtime environment, which Ray's agent writes to its log.

    The processes of a Ray that this process started inherit the environment, and the nodes of a cluster have keys of their own.
    """
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if not name.startswith("AWS_")}


def count_no_callbacks() -> None:
    """Leave the callbacks of a search out of Ray's usage statistics, for which it would import every tracker that is installed."""
    from ray.air._internal import usage

    usage.tag_callbacks = lambda callbacks: False


def automatic_address() -> str | None:
    """Return the ``HOST:PORT`` that ``RAY_ADDRESS=auto`` means, or None if no Ray has left an address on this machine."""
    try:
        return services.get_ray_address_from_environment("auto", None)
    except ConnectionError:
        return None


def address_file() -> str:
    """Return the path of the file in which a Ray on this machine leaves its address."""
    return get_ray_address_file(None)


def without_idle_processes(trainer: Any) -> Any:
    """Return a trainer of Ray Train that starts no process for what a run does not have; each imports Ray Train, for seconds.

    One is for data sets of Ray Data. The other releases what a killed controller has reserved, which outside of an actor
    :func:`release_reserved` does.

    Args:
        trainer: Ray Train's trainer.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    unneeded = (DatasetsCallback,) if in_actor else (DatasetsCallback, PlacementGroupCleanerCallback)
    callbacks = trainer._create_default_callbacks
    trainer._create_default_callbacks = lambda: [each for each in callbacks() if not isinstance(each, unneeded)]
    return trainer


def release_reserved() -> None:
    """Remove the placement groups of this driver's job, which a killed controller of Ray Train left.

    Ray Train's own cleaner asks the dashboard whether the controller lives, and waits forever where there is none. Inside an actor this
    does nothing: other trials of the job have placement groups too, and a search has a dashboard.
    """
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        return
    for name, group in ray.util.placement_group_table().items():
        if group["state"] != "REMOVED" and name.endswith(context.get_job_id()):  # an id ends with that of its job
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def last_trial_error(trial: Any) -> str:
    """Return the text of the last error of a trial of Ray Tune.

    Args:
        trial: Ray Tune's trial.

    Returns:
        The text, which is empty if there was no error or its file cannot be read.
    """
    try:
        return Path(trial.error_file).read_text(errors="replace").rpartition("Failure # ")[2] if trial.error_file else ""
    except OSError:
        return ""


def lost_part(gcs_address: str, timeout_s: float) -> str | None:
    """Return what this driver has lost of Ray: ``"head"`` (its GCS), ``"node"`` (this node's raylet), or None where both answer.

    Args:
        gcs_address: ``HOST:PORT`` of the cluster's GCS.
        timeout_s: How long to wait for a connection, in seconds.
    """
    node = worker._global_node
    processes = node.all_processes if node else {}
    for name, part in ((ray_constants.PROCESS_TYPE_GCS_SERVER, "head"), (ray_constants.PROCESS_TYPE_RAYLET, "node")):
        if any(each.process.poll() is not None for each in processes.get(name, ())):
            return part
    if processes.get(ray_constants.PROCESS_TYPE_RAYLET):  # this process started both, and both run
        return None
    host, _, port = gcs_address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError:
        return "head"
    return None if node is None or _answers(node.raylet_socket_name, timeout_s) else "node"


def _answers(path: str, timeout_s: float) -> bool:
    """Return whether a process listens on a Unix socket; True if the path is not a socket, as on Windows."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return True
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
    except BlockingIOError:
        return True  # its queue of connections is full, so it exists
    except OSError:
        return False
    return True
