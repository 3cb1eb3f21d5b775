"""Slots: the resources that each trial of a search takes, and how many of them a cluster has."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.launch.nodes import AUTOSCALED, nodes_resources
from raydetr.launch.session import DRIVER


@dataclasses.dataclass(frozen=True)
class Demands:
    """The resources that the trials of a search request from the cluster.

    Attributes:
        workers: Number of training workers of each trial.
        gpus: GPUs of a trial of one worker; below 1, trials share a GPU. Ignored if there are no GPUs.
        concurrent: Number of trials at a time; None: as many as fit, also when nodes come and go.
        placement: ``"pack"`` puts trials on as few nodes as possible, ``"spread"`` distributes them over all nodes.
    """

    workers: int = 1
    gpus: float = 1.0
    concurrent: int | None = None
    placement: str = "pack"

    def gpus_per_worker(self) -> float:
        """Return the number of GPUs of each worker, provided that the cluster has GPUs."""
        return 1.0 if self.workers > 1 else self.gpus


ONE_WORKER_EACH = Demands()


@dataclasses.dataclass(frozen=True)
class Slots:
    """The resources that each trial, or each worker of a trial, gets.

    Attributes:
        concurrent: Number of trials at a time.
        cpus: CPUs of each trial, or of each of its workers.
        gpus: GPUs of each; 0 without GPUs.
        placement: As in :class:`Demands`.
    """

    concurrent: int
    cpus: int
    gpus: float
    placement: str = "pack"


def find_slots(config: settings.Config, demands: Demands, trials: int) -> Slots:
    """Return how many trials run at a time, and which resources each of them gets.

    Args:
        config: Settings of the trials, of which ``speed.device`` and ``run.wait_for_machines_min`` are used.
        demands: What each trial requests from the cluster.
        trials: Number of trials in all.

    Raises:
        UserError: The cluster does not have the resources; the message has the numbers.
    """
    nodes = nodes_resources()
    gpus = [node.get("GPU", 0) for node in nodes]
    use_gpu = config.speed.device != "cpu" and sum(gpus) > 0
    _check_gpus(config, demands, gpus if use_gpu else [])
    drivers = int(sum(node.get(DRIVER, 0) for node in nodes))
    if demands.workers > 1 and not drivers:
        start = f"""ray start --head --resources='{{"{DRIVER}": 64}}'"""
        raise UserError(f"--workers-per-trial {demands.workers}: the cluster has no slots for their drivers; start it with {start}")
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus_per_worker = demands.gpus_per_worker()
    workers = sum(int(count / gpus_per_worker + 1e-9) for count in gpus) if use_gpu else sum(cores)
    fitting = workers // demands.workers
    available = f"{sum(gpus):g} GPUs" if use_gpu else f"{sum(cores)} CPUs"
    if fitting < 1:
        raise UserError(f"--workers-per-trial {demands.workers}: asked for that many workers, the cluster has {available}{AUTOSCALED}")
    if demands.concurrent is not None and demands.concurrent > fitting and not config.run.wait_for_machines_min:
        raise UserError(f"--concurrent {demands.concurrent}: {available} hold {fitting} trials of {demands.workers} worker(s) at a time")
    concurrent = min(demands.concurrent or fitting, trials, drivers if demands.workers > 1 else trials)
    # Trials that are packed on a node leave its share of the CPUs to each of the node's other GPUs.
    packed = cores_each(cores, fitting * demands.workers) if use_gpu and demands.placement == "pack" else None
    cpus = packed or cores_each(cores, min(concurrent, fitting) * demands.workers)
    if cpus is None:
        raise UserError(
            f"{concurrent} trials of {demands.workers} worker(s) need a CPU each, the cluster has {sum(cores)}; lower --concurrent"
        )
    return Slots(concurrent, cpus, gpus_per_worker if use_gpu else 0.0, demands.placement)


def _check_gpus(config: settings.Config, demands: Demands, gpus: list[float]) -> None:
    if config.speed.device == "cuda" and not gpus:
        raise UserError(f"speed.device: cuda was asked for and Ray sees no GPU; --speed.device cpu searches without{AUTOSCALED}")
    if demands.workers > 1 and demands.gpus < 1:
        raise UserError(
            f"a fraction of a GPU ({demands.gpus}) is for trials of one worker; NCCL wants a whole one for each of {demands.workers}"
        )
    if gpus and demands.gpus < 1 and isinstance(config.optim.batch_size, str):
        raise UserError(
            f"optim.batch_size {config.optim.batch_size}: a trial cannot tell how much memory the others on its GPU will take; give a "
            "number, or whole GPUs (--gpus-per-trial 1)"
        )
    if gpus and demands.gpus > max(gpus):
        raise UserError(f"--gpus-per-trial {demands.gpus}: no machine has more than {max(gpus):g} GPUs")


def cores_each(cores: list[int], processes: int) -> int | None:
    """Return the largest number of CPUs that each process can have.

    Args:
        cores: Number of CPU cores of each node.
        processes: Number of processes that must fit on the nodes together.

    Returns:
        The number of CPUs, or None where the processes do not fit.
    """
    return max((each for each in range(1, max(cores) + 1) if sum(node // each for node in cores) >= processes), default=None)


def slots_on(node: Mapping[str, float], slots: Slots) -> int:
    """Return how many trials of one worker, or workers of trials, fit on a node.

    Args:
        node: The resources of the node in all, such as ``{"CPU": 8.0, "GPU": 1.0}``.
        slots: The resources of each trial or worker.
    """
    cpus = int(node.get("CPU", 0) // slots.cpus)
    return min(cpus, int(node.get("GPU", 0) / slots.gpus + 1e-9)) if slots.gpus else cpus


def check_disk(config: settings.Config, folder: Path, trials: int, concurrent: int, pauses: bool = False) -> str:
    """Check that the disk has room for the checkpoints of a search.

    Args:
        config: Settings of the trials.
        folder: Folder of the search, which need not exist yet.
        trials: Number of trials in all.
        concurrent: Number of trials at a time.
        pauses: Whether trials are paused, which keep what they need to resume.

    Returns:
        A forecast of what the search keeps, for messages.

    Raises:
        UserError: The disk of ``folder`` has too little free space.
    """
    weights = weights_bytes(config)
    unfinished = trials if pauses else concurrent
    needed = trials * 2 * weights + unfinished * 3 * weights  # best.pth and last.pth; optimizer (2) and moving average of unfinished trials
    forecast = f"{trials} trials x 2 x {weights / 1e6:.0f} MB"
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        less = "; --scheduler half keeps less, since it pauses no trial" if pauses else ""
        here = f"{parent} has {free / 1e9:.1f} GB free{less}"
        raise UserError(f"run.storage: {forecast} and what unfinished trials need are {needed / 1e9:.1f} GB, {here}")
    return forecast


def weights_bytes(config: settings.Config) -> int:
    """Return the size of a model's weights in bytes, as float32.

    Args:
        config: Settings of the model. The head is counted with the 91 classes of COCO.
    """
    from raydetr.model.detr import DETR

    with torch.device("meta"):
        return sum(tensor.numel() for tensor in DETR(config.model, num_classes=91).state_dict().values()) * 4
