"""What the nodes of a cluster must have in common before a run or a search starts: raydetr, the images, and the folder of runs."""

import contextlib
import importlib
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.exceptions
from ray import cloudpickle
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raydetr
from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.launch import ray_private
from raydetr.storage import is_uri, remove_tokens, write_token
from raydetr.text import shortlist

CONNECT_TIMEOUT_S = 5  # for an answer from the cluster's address
QUIET_S = 5  # no message announces a wait for slots that ends sooner
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (~/.ray/auth_token)"
AUTOSCALED = "; with an autoscaler, --run.wait_for_machines_min says how long to wait for its machines"
LOSS_TIMEOUT_S = 30  # for Ray to notice that a node is gone (five health checks, 3 s apart); workers elsewhere notice at once
NO_MEMORY = "running low on memory"  # in the error of a process that Ray's memory monitor killed
PROBE_TIMEOUT_S = 120  # for an answer from each node; its first worker process has to be started


def check_listening(what: str, address: str) -> None:
    """Check that something listens at the address of a Ray cluster, because Ray itself would try to connect for minutes.

    Args:
        what: Where the address comes from, for the error message.
        address: ``HOST:PORT``, a URL, or ``auto``.

    Raises:
        UserError: Nothing listens there, or it is not the address of a Ray cluster.
    """
    stale = ""
    if address == "auto":
        found = ray_private.automatic_address()
        if found is None:
            raise UserError(f"{what}: no Ray runs on this machine; start one (`ray start --head`), or unset RAY_ADDRESS")
        address = found
        stale = f" ({found}, from {ray_private.address_file()}: a Ray that was killed leaves it; delete the file, or unset RAY_ADDRESS)"
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if address == "local" or parts.scheme not in ("http", "https", "ray"):
        return  # Ray starts a cluster, or a module of Ray handles the address
    try:
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"{what}: no address of a Ray cluster, which is HOST:6379 on its machines and http://HOST:8265 for jobs")
    try:
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{what}: nothing answers there ({reason}){stale}; is the cluster up and its port forwarded?") from None


@contextlib.contextmanager
def reserved_slots(config: settings.Config, workers: int, gpus_per_worker: float = 1.0) -> Iterator[None]:
    """Wait until the cluster has resources for some workers, and reserve them while the context is active.

    An autoscaler adds nodes for what is reserved, and does not remove them while it is. Without ``run.wait_for_machines_min`` this does
    nothing.

    Args:
        config: Settings, of which ``run.wait_for_machines_min`` and ``speed.device`` are used.
        workers: Number of workers. Each gets a CPU and, unless ``speed.device`` is ``cpu``, GPUs.
        gpus_per_worker: GPUs of each worker; may be a fraction.

    Raises:
        UserError: The nodes do not come in time, or it is not clear whether the workers need GPUs.
    """
    minutes, device = config.run.wait_for_machines_min, config.speed.device
    if not minutes:
        yield
        return
    if device == "auto" and not ray.cluster_resources().get("GPU"):
        raise UserError("run.wait_for_machines_min: no GPU is there yet, and machines without may be meant; say --speed.device cuda or cpu")
    bundle: dict[str, float] = {"CPU": 1} if device == "cpu" else {"CPU": 1, "GPU": gpus_per_worker}
    what = f"{workers} x {', '.join(f'{number:g} {name}' for name, number in bundle.items())}"
    reserved = placement_group([bundle] * workers)
    try:
        if not reserved.wait(QUIET_S):
            print(f"waiting for machines with {what}, up to {minutes:g} minutes", file=sys.stderr, flush=True)
            if not reserved.wait(60 * minutes):
                raise UserError(f"run.wait_for_machines_min: no machines with {what} came in {minutes:g} minutes; look at `ray status`")
        yield
    finally:
        remove_placement_group(reserved)


def check_nodes(config: settings.Config, probe: Callable[..., dict[str, Any]] | None = None) -> None:
    """Check that every node of the cluster has what a run needs. With a single node, check only that an object store accepts the run.

    Args:
        config: Settings with absolute paths.
        probe: The function that runs on each node, :func:`probe_node` by default.

    Raises:
        UserError: Some nodes lack raydetr, have another version of it, do not have the images, or have another folder as ``run.storage``;
            or the store refuses what they write. The message names the nodes.
    """
    nodes = alive_nodes() if ray.is_initialized() else {}
    storage, alone = config.run.storage, len(nodes) < 2
    if alone and not is_uri(storage):
        return
    values = settings.by_name(config)
    paths = [values[name] for name in settings.PATH_SETTINGS if name.startswith("data.") and values[name]]
    token = secrets.token_hex(8)
    try:
        write_token(storage, f".probe-{token}", token, patience_s=0)
        try:
            answers = {} if alone else probe_nodes(nodes, probe or probe_node, paths, storage, token)
        finally:
            written = set(remove_tokens(storage, f".probe-{token}", patience_s=0))
    except OSError as error:
        raise UserError(f"run.storage: cannot write in {storage}: {error.strerror}") from None
    check_answers([(nodes[node], answer) for node, answer in answers.items()], written, storage)


def check_answers(answers: Sequence[tuple[str, dict[str, Any]]], written: set[str], storage: str) -> None:
    """Raise a UserError about the first requirement that some nodes do not meet.

    Args:
        answers: The name of each node and what :func:`probe_node` returned there.
        written: Names of the files that the nodes wrote into ``storage``, as this machine sees them.
        storage: The folder or URI of runs.

    Raises:
        UserError: Nodes lack raydetr, have another version of it, do not see a file, or have another folder as ``storage``.
    """
    without = [name for name, answer in answers if answer["version"] is None]
    if without:
        raise UserError(f"no raydetr on the cluster's machines: {shortlist(without)}; take an image that has it, or pip install it there")
    others = [f"{answer['version']} on {name}" for name, answer in answers if answer["version"] != raydetr.__version__]
    if others:
        raise UserError(f"raydetr is {raydetr.__version__} here and {shortlist(others)}; install the same on all machines")
    lacked = next((answer["lacking"][0] for _, answer in answers if answer["lacking"]), None)
    if lacked:
        without = [name for name, answer in answers if lacked in answer["lacking"]]
        raise UserError(f"{lacked} is not on {shortlist(without)}; the photographs belong in a folder that all machines see")
    refused = next(((name, answer["refusal"]) for name, answer in answers if answer["refusal"]), None)
    if refused:
        raise UserError(f"{refused[0]}: {refused[1]}")
    apart = [name for name, answer in answers if not answer["token"] or answer["wrote"] not in written]
    if apart:
        raise UserError(
            f"run.storage: {storage} is another folder on {shortlist(apart)} than here; "
            "with several machines give --storage one that all of them share (NFS, a ReadWriteMany volume)"
        )


def probe_nodes(
    nodes: dict[str, str], probe: Callable[..., dict[str, Any]], paths: Sequence[str], *storage: str
) -> dict[str, dict[str, Any]]:
    """Run a function on each node, and return what it returns there.

    Args:
        nodes: Names of the nodes by id.
        probe: A function such as :func:`probe_node`. It is sent by value, since a node may lack raydetr.
        paths: The first argument of ``probe``.
        storage: Its other arguments.

    Returns:
        What ``probe`` returned, by node id. Nodes that were lost meanwhile are left out.

    Raises:
        UserError: A node does not answer for ``PROBE_TIMEOUT_S``, or ``probe`` fails there.
    """
    module = importlib.import_module(probe.__module__)
    cloudpickle.register_pickle_by_value(module)  # a node without raydetr could not import it to find the function
    try:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(probe)
        node_of = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths, *storage): node
            for node in nodes
        }
        _, silent = ray.wait(list(node_of), num_returns=len(node_of), timeout=PROBE_TIMEOUT_S)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    if silent:
        names = shortlist([nodes[node_of[each]] for each in silent])
        raise UserError(f"no answer in {PROBE_TIMEOUT_S} s from {names}; look at `ray status`")
    answers = {}
    for reference, node in node_of.items():
        try:
            answers[node] = ray.get(reference)
        except ray.exceptions.RayError as error:
            if node not in alive_nodes():
                continue
            raise UserError(f"{nodes[node]} could not be asked: {str(error).strip().splitlines()[-1]}") from error
    return answers


def probe_node(paths: Sequence[str], storage: str, token: str) -> dict[str, Any]:
    """Return what the node that runs this has: raydetr, the images and the folder of runs.

    The function uses nothing of this module, because the node may not have it.

    Args:
        paths: Files and folders that the node must see.
        storage: The folder or URI of runs.
        token: What the driver wrote there.

    Returns:
        ``version`` of raydetr (None without it), ``lacking`` (those of ``paths`` that do not exist there), ``token`` (whether the driver's
        token can be read), ``wrote`` (the name of the file that this node wrote into ``storage``, or None) and ``refusal`` (why an object
        store refused it, or None).
    """
    import importlib
    import secrets

    found = {"version": None, "lacking": [], "token": False, "wrote": None, "refusal": None}
    try:
        found["version"] = importlib.import_module("raydetr").__version__
        store = importlib.import_module("raydetr.storage")
    except ImportError:
        return found
    try:
        found["lacking"] = [path for path in paths if not store.exists(path, patience_s=0)]
        found["token"] = store.read_token(storage, f".probe-{token}", patience_s=0) == token
        wrote = f".probe-{token}-{secrets.token_hex(8)}"
        if found["token"]:  # otherwise this is another folder, in which nothing is written
            store.write_token(storage, wrote, token, patience_s=0)
            found["wrote"] = wrote
    except importlib.import_module("raydetr.errors").UserError as error:
        found["refusal"] = str(error)
    except OSError:
        found["token"] = False
    return found


def is_node_failure(error: BaseException) -> bool:
    """Return whether a worker was lost because its node, or the network to it, failed.

    Such a loss is not the fault of the code that ran there, so it does not count as a failure of the run.

    Args:
        error: The error that Ray raised for the worker, or Ray Train's error that wraps it.
    """
    error = getattr(error, "health_check_failure", error)  # Ray Train wraps the loss of a worker
    if not isinstance(error, ray.exceptions.RayActorError):
        return False
    # A lost node first counts as unreachable. Ray calls an actor preempted if its node announced that it would shut down.
    if error.preempted or isinstance(error, ray.exceptions.ActorUnavailableError):
        return True
    return any(node in str(error) for node in lost_nodes())


def lost_another_node(before: Collection[str]) -> bool:
    """Return whether the cluster has lost a node, giving Ray up to ``LOSS_TIMEOUT_S`` to notice it.

    Args:
        before: Ids of the nodes that were lost before, which do not count.
    """
    deadline = time.monotonic() + LOSS_TIMEOUT_S
    while len(ray.nodes()) > 1 and time.monotonic() < deadline:
        if not lost_nodes() <= set(before):
            return True
        time.sleep(0.5)
    return False


def out_of_memory(error: BaseException | None) -> bool:
    """Return whether Ray's memory monitor killed the process whose loss an error reports.

    Args:
        error: The error or None; the errors that it wraps are examined as well.
    """
    while error is not None:
        if isinstance(error, ray.exceptions.OutOfMemoryError) or NO_MEMORY in str(error):
            return True
        error = getattr(error, "health_check_failure", None) or error.__cause__
    return False


def lost_nodes() -> set[str]:
    """Return the ids of the nodes that the cluster has lost."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def alive_nodes() -> dict[str, str]:
    """Return the names of the cluster's nodes by their ids."""
    return {node["NodeID"]: node_name(node) for node in ray.nodes() if node["Alive"]}


def node_name(node: dict[str, Any]) -> str:
    """Return the host name and the address of a node, for messages.

    Args:
        node: An entry of ``ray.nodes()``.
    """
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def nodes_resources() -> list[dict[str, float]]:
    """Return the resources of each node of the cluster that is alive, such as ``{"CPU": 8.0, "GPU": 1.0}``."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
