"""A training run: its data, network and progress, built from the settings and, to resume, from a checkpoint."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from raydetr.config import Config, Data, Optim, asked_batch_size, batches_per_step, check_batch_total, images_per_step, with_settings
from raydetr.data.cache import cache_limit
from raydetr.data.coco import CocoImages
from raydetr.data.fingerprint import data_fingerprint
from raydetr.data.loader import build_loader, draw_weights
from raydetr.data.sets import check_cut_outs, describe_sets, load_sets
from raydetr.data.splits import box_counts
from raydetr.errors import UserError
from raydetr.loss.criterion import build_criterion
from raydetr.model.backbone import Bottleneck, TinyBlock
from raydetr.model.detr import DETR
from raydetr.model.transformer import DecoderLayer, EncoderLayer
from raydetr.storage import working_folder
from raydetr.text import count
from raydetr.training.batch_size import with_batch_size
from raydetr.training.engine import Training, choose_dtype
from raydetr.training.failures import BestEffort
from raydetr.training.graphs import GraphedNetwork
from raydetr.training.random_state import seed_everything, set_random_state
from raydetr.training.reporter import Reporter
from raydetr.training.resume import check_same_data, check_same_network, read_resumable
from raydetr.training.schedule import USUAL_BATCH, MovingAverage, build_optimizer, build_scheduler, scaled_rates
from raydetr.weights.fitting import load_weights

GPU_VAL_BATCH_SIZE = 8
# A GPU takes more images than two processes decode. On a CPU the network uses the cores.
GPU_LOADING_PROCESSES, CPU_LOADING_PROCESSES = 8, 2
# Multi-scale training has nearly as many shapes as batches. On a GPU libraries plan, and the allocator reserves, for each of them.
GPU_PAD_TO = 64
MOST_COMPILED = 1024  # shapes and variants of a block: with sides rounded up to 64 a block of a ResNet comes in hundreds


@dataclasses.dataclass
class Progress:
    """How far a run has come. AP is None if the validation set has no objects."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_AP: float | None = None
    best_loss: float = math.inf  # the validation loss, which decides between epochs of equal AP
    stale: int = 0  # epochs since AP last rose

    def update(self, ap: float | None, loss: float) -> bool:
        """Count an epoch, and return whether it is the best so far. Without an AP, every epoch counts as the best.

        Args:
            ap: AP on the validation set, or None.
            loss: Weighted loss on the validation set, which decides between epochs of equal AP.
        """
        self.epoch += 1
        higher = ap is None or self.best_AP is None or ap > self.best_AP
        best = higher or (ap == self.best_AP and loss < self.best_loss)
        self.stale = 0 if higher else self.stale + 1
        if best:
            self.best_epoch, self.best_AP, self.best_loss = self.epoch, ap, loss
        return best


@dataclasses.dataclass
class Run:
    """A training run on one of its workers."""

    config: Config
    reporter: Reporter
    root: str  # the run folder: a path, or a URI in an object store
    train_set: CocoImages
    val_set: CocoImages
    train: DataLoader
    val: DataLoader
    training: Training
    progress: Progress
    data: dict[str, dict[str, Any]]  # fingerprints of the training and the validation set
    best_effort: BestEffort
    metrics: dict[str, Any]  # of the last epoch that is finished
    batches: Iterator = iter(())  # of the next epoch; loading starts while the last epoch is still being saved

    @property
    def folder(self) -> Path:
        """The run folder on this node."""
        return working_folder(self.root)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return math.ceil(len(self.train) / self.training.accumulate)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or AP has not risen for ``optim.patience`` epochs."""
        optim = self.config.optim
        return self.progress.epoch >= optim.epochs or (optim.patience > 0 and self.progress.stale >= optim.patience)

    def show(self, event: dict[str, Any]) -> None:
        """Show an event. If the terminal fails, the run continues.

        Args:
            event: One of the events that :mod:`raydetr.training.console` describes.
        """
        with self.best_effort("the terminal"):
            self.reporter.show(event)

    def load_ahead(self) -> None:
        """Start to load the first batches of the next epoch."""
        self.train_set.set_epoch(self.progress.epoch + 1)
        self.batches = iter(self.train)


def build_run(config: Config, reporter: Reporter, root: str, device: torch.device, start: Path | None, best_effort: BestEffort) -> Run:
    """Build a run from its settings and, to resume, from a checkpoint.

    Args:
        config: The settings.
        reporter: The reporter of this worker, which knows its rank.
        root: Path or URI of the run folder.
        device: Where to train.
        start: The checkpoint to resume from; None to start a run.
        best_effort: Shows warnings.

    Raises:
        UserError: The data, the weights or the checkpoint cannot be used, or the checkpoint is of another network or of other data.
    """
    check_batch_total(config.optim, reporter.world_size, reporter.world_size)
    content = read_resumable(start, root) if start else None
    train_set, val_set = _data_sets(config, reporter, device, content)
    categories = train_set.categories

    def build() -> Training:
        tried = with_settings(config, {"optim.batch_size": 1, "optim.scale_lr": "none"})  # which take no memory
        return _training(tried, 1, DETR(config.model, len(categories)).to(device), len(categories), steps_per_epoch=1, content=None)

    config, notes = with_batch_size(config, device, content and content["settings"], build, train_set, pad_to(config, device))
    train, val = _loaders(config, reporter, device, train_set, val_set)
    data = {"train": data_fingerprint(train_set.coco), "val": data_fingerprint(val_set.coco)}
    if start and content:
        check_same_network(config, content, start)
        check_same_data(data, content, root)
    seed_everything(config.run.seed)  # every worker initializes the same network
    model = DETR(config.model, len(categories))
    if content:
        message = f"resuming after epoch {content['epoch']} from {start}"
        model.load_state_dict(content["trained"] or content["model"])
    else:
        message = load_weights(model, config.model.weights, categories)
    steps_per_epoch = math.ceil(len(train) / batches_per_step(config.optim, reporter.world_size))
    training = _training(config, reporter.world_size, model.to(device), len(categories), steps_per_epoch, content)
    progress = Progress(**content["progress"]) if content else Progress()
    _restore_random_state(config, reporter.rank, progress.epoch, device, content)
    metrics = content["metrics"] if content else {}
    run = Run(config, reporter, root, train_set, val_set, train, val, training, progress, data, best_effort, metrics)
    about = [describe_sets(config.data), *step_messages(config.optim, reporter.world_size)]
    for text in filter(None, dict.fromkeys((*train_set.warnings, *val_set.warnings, *notes, message, *about))):
        run.show({"kind": "message", "text": text})
    return run


def _data_sets(config: Config, reporter: Reporter, device: torch.device, content: dict[str, Any] | None) -> tuple[CocoImages, CocoImages]:
    train, val = load_sets(
        config.data,
        config.run.seed,
        normalized=device.type == "cpu",  # a GPU normalizes the bytes itself
        categories=content["categories"] if content else None,
        decoded=reporter.images,
        limit=cache_limit(config.data) // reporter.world_size,  # as if all workers were on one node
        masks=config.model.masks,
    )
    if config.data.copy_paste:
        check_cut_outs(train.coco, train.split.annotations)
    for each in (train, val) if config.model.masks else ():
        if not each.has_masks:
            raise UserError(
                f"model.masks: {each.split.annotations} has no mask, neither polygons nor RLE; annotate outlines, or set model.masks false"
            )
    return train, val


def step_messages(optim: Optim, workers: int) -> list[str]:
    """Return what to say about the images and the learning rates of an optimizer step; nothing where the settings say it all.

    Args:
        optim: The ``optim`` section of the settings.
        workers: The number of workers.
    """
    lines, images = [], images_per_step(optim, workers)
    if optim.batch_total:
        split = f"{images // workers} in {count(batches_per_step(optim, workers), 'batch', 'batches')}"
        where = f"{'each of ' if workers > 1 else ''}{count(workers, 'worker')}"
        lines.append(f"optim.batch_total: each step takes {images} images, {split} on {where}")
    if optim.scale_lr != "none":
        scaled = scaled_rates(optim, images)
        lines.append(
            f"optim.scale_lr {optim.scale_lr}: steps of {images} images instead of {USUAL_BATCH}, "
            f"so learning rates of {scaled.lr:.3g} and {scaled.lr_backbone:.3g} (backbone)"
        )
    return lines


def _loaders(config: Config, reporter: Reporter, device: torch.device, train: CocoImages, val: CocoImages) -> tuple[DataLoader, DataLoader]:
    data = config.data
    processes = loading_processes(data, device, reporter.cores)
    common = {"num_workers": processes, "seed": config.run.seed, "device": device, "timeout_s": data.batch_timeout_s}
    share = {"rank": reporter.rank, "world_size": reporter.world_size}
    batches: dict[str, Any] = {"batch_total": config.optim.batch_total, "group_sizes": data.group_sizes, "pad_to": pad_to(config, device)}
    if data.balance:
        batches["weights"] = draw_weights(box_counts(train.coco), data.balance)
    return (
        build_loader(train, asked_batch_size(config), **share, shuffle=True, **batches, **common),
        build_loader(val, val_batch_size(config, device), **share, **common),
    )


def val_batch_size(config: Config, device: torch.device) -> int:
    """Return the number of images in a batch of the validation set.

    It is ``data.val_batch_size`` if that is set, else 8 on a GPU and ``optim.batch_size`` on a CPU. It changes AP and losses by rounding
    errors at most.

    Args:
        config: The settings.
        device: Where the model is.
    """
    return config.data.val_batch_size or (GPU_VAL_BATCH_SIZE if device.type == "cuda" else asked_batch_size(config))


def loading_processes(data: Data, device: torch.device, cores: int) -> int:
    """Return the number of processes that load images for a worker.

    It is ``data.num_workers`` if that is set, else the worker's cores (at most 8) on a GPU and 2 on a CPU.

    Args:
        data: The settings ``data.*``.
        device: Where the model is.
        cores: CPU cores that the worker may use.
    """
    if data.num_workers is not None:
        return data.num_workers
    return min(cores, GPU_LOADING_PROCESSES) if device.type == "cuda" else CPU_LOADING_PROCESSES


def pad_to(config: Config, device: torch.device) -> int:
    """Return the number of pixels to whose multiples the height and width of training batches are rounded up.

    It is ``speed.pad_to`` if that is set, else 64 on a GPU and 1 on a CPU. Batches of evaluation are not rounded up.

    Args:
        config: The settings.
        device: Where the model is.
    """
    return config.speed.pad_to or (GPU_PAD_TO if device.type == "cuda" else 1)


def _training(
    config: Config, world_size: int, model: DETR, num_classes: int, steps_per_epoch: int, content: dict[str, Any] | None
) -> Training:
    optim, device = scaled_rates(config.optim, images_per_step(config.optim, world_size)), next(model.parameters()).device
    dtype = choose_dtype(config.speed, device)
    if config.speed.compile == "on":
        compile_blocks(model, dynamic=pad_to(config, device) == 1)
    if config.loss.query_groups > 1:
        _add_query_groups(model, config, content)
    losses = dataclasses.asdict(config.loss) | dataclasses.asdict(config.matcher)
    network = {name: getattr(config.model, name) for name in ("aux_loss", "dec_layers", "masks")}
    criterion = build_criterion(num_classes, **network, **losses)
    optimizer = build_optimizer(model, optim)
    average = MovingAverage(model, optim.ema_decay) if optim.ema_decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    epoch, step = 0, 0
    if content:
        epoch = content["epoch"]
        step = epoch * steps_per_epoch if content["step"] is None else content["step"]
        _load_optimizer(optimizer, content["optimizer"], optim)
        if content["scaler"]:
            scaler.load_state_dict(content["scaler"])
        if average:
            average.module.load_state_dict(content["ema"] or content["model"])
            average.updates = content["ema_updates"]
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch, epoch * steps_per_epoch)
    graphs = _graphed(model, device, world_size) if config.speed.graphs else None
    trained = _distributed(model, device) if world_size > 1 else model
    return Training(
        trained,
        criterion,
        optimizer,
        scheduler,
        scaler,
        average,
        device,
        dtype,
        accumulate=batches_per_step(optim, world_size),
        clip_max_norm=optim.clip_max_norm,
        step=step,
        as_one=optim.batch_total is not None,
        graphs=graphs,
    )


def _add_query_groups(model: DETR, config: Config, content: dict[str, Any] | None) -> None:
    model.add_query_groups(config.loss.query_groups)
    if content and content.get("groups") is not None:
        weights = content["groups"]
        if weights.shape != model.group_embed.weight.shape:
            raise UserError(f"loss.query_groups: the run has {1 + len(weights) // config.model.num_queries}, which may not change")
        with torch.no_grad():
            model.group_embed.weight.copy_(weights)


def compile_blocks(network: nn.Module, dynamic: bool) -> None:
    """Compile the blocks that a network repeats, in place: the names in checkpoints stay.

    Equal blocks share what is compiled, which takes a fraction of the time that the whole network would.

    Args:
        network: The network, or a part of it.
        dynamic: Whether to compile once for batches of all shapes, instead of once for each shape.
    """
    import torch._dynamo.config  # which torch itself loads late

    # Otherwise PyTorch stops to compile after eight shapes and variants of a block.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_COMPILED
    for block in network.modules():
        if isinstance(block, (Bottleneck, TinyBlock, EncoderLayer, DecoderLayer)):
            block.compile(dynamic=dynamic)


def _graphed(model: DETR, device: torch.device, world_size: int) -> GraphedNetwork:
    if device.type != "cuda":
        raise UserError("speed.graphs: a CPU has no CUDA graphs; leave it off there")
    if world_size > 1:
        raise UserError("speed.graphs: works with one worker only; leave it off, or give --workers 1")
    return GraphedNetwork(model)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any] | None, optim: Optim) -> None:
    if state is None:  # resumed from weights alone
        return
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        raise UserError(
            "last.pth trains other parameters than these settings: optim.freeze_backbone, optim.freeze_detr, optim.freeze_layers, "
            "optim.layer_decay, optim.lr_backbone and loss.query_groups may not change"
        ) from None
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay


def _distributed(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    # The buffers are constants and need not be sent at every step. Older versions of torch have the other name for that.
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"
    )
    options: dict[str, Any] = {name: False}
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True, **options)


def _restore_random_state(config: Config, rank: int, epoch: int, device: torch.device, content: dict[str, Any] | None) -> None:
    # Seed first, because the checkpoint may have the states of fewer workers, or of a CPU while this is a GPU.
    seed_everything(config.run.seed, rank, epoch)
    states = content["random"] if content else []
    if rank < len(states):
        set_random_state(states[rank], device)
