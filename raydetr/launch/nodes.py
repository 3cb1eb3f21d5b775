"""What the machines of a cluster must have in common before a run or a search starts: raydetr, the photographs, the folder of runs."""

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
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raydetr
from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.storage import is_uri, remove_tokens, write_token

PATIENCE_S = 5  # for an answer from the cluster's address
SOON_S = 5  # for places to be there that are not worth a word
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (~/.ray/auth_token)"
AUTOSCALED = "; with an autoscaler, --run.wait_for_machines_min says how long to wait for its machines"
LOSS_PATIENCE_S = 30  # for Ray to hear that a machine is gone (five questions, 3 s apart); the workers elsewhere notice at once
NODE_PATIENCE_S = 120  # for an answer from each machine; the first process on one has to be started


def check_listening(what: str, address: str) -> None:
    """Raises UserError where nothing listens at an address of Ray's; Ray itself would try for minutes. ``what`` says where it is from."""
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    if address in ("auto", "local") or parts.scheme not in ("http", "https", "ray"):
        return  # Ray finds it, or has a module for it
    try:
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise UserError(f"{what}: no address of a Ray cluster, which is HOST:6379 on its machines and http://HOST:8265 for jobs")
    try:
        socket.create_connection((host, port), timeout=PATIENCE_S).close()
    except OSError as error:
        raise UserError(f"{what}: nothing answers there ({error.strerror or error}); is the cluster up and its port forwarded?") from None


@contextlib.contextmanager
def awaited_machines(config: settings.Config, workers: int, gpus_each: float = 1.0) -> Iterator[None]:
    """Wait until the cluster has places for so many workers, and keep them for the length of a ``with``; nothing without
    ``run.wait_for_machines_min``.

    An autoscaler brings machines for what is reserved, and takes none away. Raises UserError where they do not come in time.
    """
    minutes, device = config.run.wait_for_machines_min, config.speed.device
    if not minutes:
        yield
        return
    if device == "auto" and not ray.cluster_resources().get("GPU"):
        raise UserError("run.wait_for_machines_min: no GPU is there yet, and machines without may be meant; say --speed.device cuda or cpu")
    place = {"CPU": 1} if device == "cpu" else {"CPU": 1, "GPU": gpus_each}
    what = f"{workers} x {', '.join(f'{number:g} {name}' for name, number in place.items())}"
    reserved = placement_group([place] * workers)
    try:
        if not reserved.wait(SOON_S):
            print(f"waiting for machines with {what}, up to {minutes:g} minutes", file=sys.stderr, flush=True)
            if not reserved.wait(60 * minutes):
                raise UserError(f"run.wait_for_machines_min: no machines with {what} came in {minutes:g} minutes; look at `ray status`")
        yield
    finally:
        remove_placement_group(reserved)


def check_nodes(config: settings.Config, probe: Callable[..., dict[str, Any]] | None = None) -> None:
    """Ask every machine of the cluster for what a run needs there; where there is only this one, whether a store takes the run.

    ``probe`` is what runs on each, :func:`look`. Raises UserError that names the machines without raydetr or with another version,
    those without the photographs, and those for which ``run.storage`` is another folder than it is here, or refuses what they write.
    """
    nodes = alive_nodes() if ray.is_initialized() else {}
    storage, alone = config.run.storage, len(nodes) < 2
    if alone and not is_uri(storage):
        return
    values = settings.flatten(settings.to_dict(config))
    paths = [values[name] for name in settings.PLACES if name.startswith("data.") and values[name]]
    token = secrets.token_hex(8)
    try:
        write_token(storage, f".probe-{token}", token, patience_s=0)
        try:
            seen = {} if alone else ask(nodes, probe or look, paths, storage, token)
        finally:
            written = set(remove_tokens(storage, f".probe-{token}", patience_s=0))
    except OSError as error:
        raise UserError(f"run.storage: cannot write in {storage}: {error.strerror}") from None
    judge([(nodes[node], answer) for node, answer in seen.items()], written, storage)


def judge(seen: Sequence[tuple[str, dict[str, Any]]], written: set[str], storage: str) -> None:
    """Raises UserError with the first thing that machines lack; ``seen`` has names and answers, ``written`` what they wrote here."""
    without = [name for name, answer in seen if answer["version"] is None]
    if without:
        raise UserError(f"no raydetr on the cluster's machines: {listed(without)}; take an image that has it, or pip install it there")
    others = [f"{answer['version']} on {name}" for name, answer in seen if answer["version"] != raydetr.__version__]
    if others:
        raise UserError(f"raydetr is {raydetr.__version__} here and {listed(others)}; install the same on all machines")
    lacked = next((answer["lacking"][0] for _, answer in seen if answer["lacking"]), None)
    if lacked:
        without = [name for name, answer in seen if lacked in answer["lacking"]]
        raise UserError(f"{lacked} is not on {listed(without)}; the photographs belong in a folder that all machines see")
    refused = next(((name, answer["refusal"]) for name, answer in seen if answer["refusal"]), None)
    if refused:
        raise UserError(f"{refused[0]}: {refused[1]}")
    apart = [name for name, answer in seen if not answer["token"] or answer["wrote"] not in written]
    if apart:
        raise UserError(
            f"run.storage: {storage} is another folder on {listed(apart)} than here; "
            "with several machines give --storage one that all of them share (NFS, a ReadWriteMany volume)"
        )


def ask(nodes: dict[str, str], probe: Callable[..., dict[str, Any]], paths: Sequence[str], *storage: str) -> dict[str, dict[str, Any]]:
    """The answers of ``probe`` by node id; raises UserError where a machine gives none."""
    module = importlib.import_module(probe.__module__)
    ray.cloudpickle.register_pickle_by_value(module)  # a machine without raydetr could not import it to find the function
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(probe)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths, *storage): node
            for node in nodes
        }
        _, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_PATIENCE_S)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    if silent:
        raise UserError(f"no answer in {NODE_PATIENCE_S} s from {listed([nodes[asked[each]] for each in silent])}; look at `ray status`")
    answers = {}
    for each, node in asked.items():
        try:
            answers[node] = ray.get(each)
        except ray.exceptions.RayError as error:
            if node not in alive_nodes():
                continue  # it went away meanwhile
            raise UserError(f"{nodes[node]} could not be asked: {str(error).strip().splitlines()[-1]}") from error
    return answers


def look(paths: Sequence[str], storage: str, token: str) -> dict[str, Any]:
    """What a machine has: its version of raydetr, the ``paths`` that it lacks, whether it reads the driver's token in ``storage``, the
    name of the one that it wrote there, and why a store refused it. Runs on each machine and uses nothing of this module, which may not
    be there."""
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
        if found["token"]:  # else the folder is another one, and is left as it is
            store.write_token(storage, wrote, token, patience_s=0)
            found["wrote"] = wrote
    except importlib.import_module("raydetr.errors").UserError as error:
        found["refusal"] = str(error)
    except OSError:
        found["token"] = False
    return found


def is_of_machine(error: BaseException) -> bool:
    """Whether a worker was lost with its machine, or with the way to it: no fault of what ran there."""
    error = getattr(error, "health_check_failure", error)  # what Ray Train wraps the loss of a worker in
    if not isinstance(error, ray.exceptions.RayActorError):
        return False
    # At first a machine that went without a word is one that cannot be reached; Ray calls those preempted that said they would go.
    if error.preempted or isinstance(error, ray.exceptions.ActorUnavailableError):
        return True
    return any(node in str(error) for node in lost_nodes())


def is_one_lost(since: Collection[str]) -> bool:
    """Whether a machine was lost that is not among ``since``, those that were lost before; Ray is given time to hear of it."""
    deadline = time.monotonic() + LOSS_PATIENCE_S
    while len(ray.nodes()) > 1 and time.monotonic() < deadline:
        if not lost_nodes() <= set(since):
            return True
        time.sleep(0.5)
    return False


def lost_nodes() -> set[str]:
    """The ids of machines that the cluster had and has no more."""
    return {node["NodeID"] for node in ray.nodes() if not node["Alive"]}


def alive_nodes() -> dict[str, str]:
    """The machines that the cluster has now: their names by node id."""
    return {node["NodeID"]: name_of(node) for node in ray.nodes() if node["Alive"]}


def name_of(node: dict[str, Any]) -> str:
    """What to call a machine in a message: its host name and address."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names in words, not too many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
