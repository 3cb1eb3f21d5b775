"""What the trials of a search take of a cluster, and what it has."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.tune
import torch

from raydetr import config as settings
from raydetr.errors import UserError
from raydetr.launch.nodes import AUTOSCALED
from raydetr.launch.train import DRIVER, cores_each, nodes_resources


@dataclasses.dataclass(frozen=True)
class Demands:
    """What the trials of a search ask of the cluster."""

    workers: int = 1  # training workers per trial
    gpus: float = 1.0  # per trial of one worker; below 1 trials share a card. Nothing where there are no GPUs
    concurrent: int | None = None  # trials at a time; None: as many as fit, also when machines come and go
    placement: str = "pack"  # trials on as few machines as hold them, or "spread" over all

    def gpus_each(self) -> float:
        """GPUs of each worker, where there are GPUs."""
        return 1.0 if self.workers > 1 else self.gpus


ONE_WORKER_EACH = Demands()


@dataclasses.dataclass(frozen=True)
class Places:
    """What the cluster gives each of ``concurrent`` trials, or each of its workers."""

    concurrent: int
    cpus: int
    gpus: float
    placement: str = "pack"


def find_places(config: settings.Config, demands: Demands, trials: int) -> Places:
    """How many trials run at a time and what each gets; raises UserError with the numbers where the cluster cannot hold them."""
    nodes = nodes_resources()
    gpus = [node.get("GPU", 0) for node in nodes]
    use_gpu = config.speed.device != "cpu" and sum(gpus) > 0
    if config.speed.device == "cuda" and not use_gpu:
        raise UserError(f"speed.device: cuda was asked for and Ray sees no GPU; --speed.device cpu searches without{AUTOSCALED}")
    if demands.workers > 1 and demands.gpus < 1:
        raise UserError(
            f"a fraction of a GPU ({demands.gpus}) is for trials of one worker; NCCL wants a whole one for each of {demands.workers}"
        )
    if use_gpu and demands.gpus > max(gpus):
        raise UserError(f"--gpus-per-trial {demands.gpus}: no machine has more than {max(gpus):g} GPUs")
    drivers = int(sum(node.get(DRIVER, 0) for node in nodes))
    if demands.workers > 1 and not drivers:
        start = f"""ray start --head --resources='{{"{DRIVER}": 64}}'"""
        raise UserError(f"--workers-per-trial {demands.workers}: the cluster has no place for their drivers; start it with {start}")
    cores = [int(node.get("CPU", 0)) for node in nodes]
    each = demands.gpus_each()
    slots = sum(int(count / each + 1e-9) for count in gpus) if use_gpu else sum(cores)
    fitting = slots // demands.workers
    what = f"{sum(gpus):g} GPUs" if use_gpu else f"{sum(cores)} CPUs"
    if fitting < 1:
        raise UserError(f"--workers-per-trial {demands.workers}: asked for that many workers, the cluster has {what}{AUTOSCALED}")
    if demands.concurrent is not None and demands.concurrent > fitting and not config.run.wait_for_machines_min:
        raise UserError(f"--concurrent {demands.concurrent}: {what} hold {fitting} trials of {demands.workers} worker(s) at a time")
    concurrent = min(demands.concurrent or fitting, trials, drivers if demands.workers > 1 else trials)
    # Trials that are packed on a card's machine leave the others there their share of its CPUs.
    packed = cores_each(cores, fitting * demands.workers) if use_gpu and demands.placement == "pack" else None
    cpus = packed or cores_each(cores, min(concurrent, fitting) * demands.workers)
    if cpus is None:
        raise UserError(
            f"{concurrent} trials of {demands.workers} worker(s) need a CPU each, the cluster has {sum(cores)}; lower --concurrent"
        )
    return Places(concurrent, cpus, each if use_gpu else 0.0, demands.placement)


def holds(machine: Mapping[str, float], places: Places) -> int:
    """How many trials of one worker, or workers of trials, a machine has places for."""
    cpus = int(machine.get("CPU", 0) // places.cpus)
    return min(cpus, int(machine.get("GPU", 0) / places.gpus + 1e-9)) if places.gpus else cpus


def resources_of(assigned: Mapping[str, Any]) -> ray.tune.PlacementGroupFactory:
    """What a trial takes of the cluster; one of several workers only a driver's place, its workers come by themselves."""
    places = assigned["places"]
    if assigned["settings"]["run"]["workers"] > 1:
        return ray.tune.PlacementGroupFactory([{DRIVER: 1}])
    # Whatever the strategy, a group of one bundle goes to the emptiest machine; only this hint packs. Where the machine is gone or full
    # the trial goes to another.
    return ray.tune.PlacementGroupFactory(
        [{"CPU": places["cpus"], "GPU": places["gpus"]}], "STRICT_PACK", _soft_target_node_id=assigned["machine"]
    )


def check_disk(config: settings.Config, folder: Path, trials: int, concurrent: int) -> str:
    """What the search will keep, in words; raises UserError where the disk of ``folder`` cannot hold it."""
    weights = weights_bytes(config)
    needed = trials * 2 * weights + concurrent * 3 * weights  # best and last; optimizer and average of the unfinished
    forecast = f"{trials} trials x 2 x {weights / 1e6:.0f} MB"
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"run.storage: {forecast} and what runs need {needed / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free")
    return forecast


def weights_bytes(config: settings.Config) -> int:
    """Bytes of a network's weights, in float32."""
    from raydetr.model.detr import build_model

    leaves = {name: value for name, value in settings.to_dict(config)["model"].items() if name not in ("preset", "weights")}
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in build_model(config.model.preset, **leaves).state_dict().values()) * 4
