"""One training run: epochs, checkpoints, reports. The same for a plain process, a torchrun or Ray Train worker and a search's trial.

The run's place ``<run.storage>/<run.name>/`` gets ``config.yaml``, ``log.txt``, ``tb/``, ``best.pth`` (the evaluated weights with
the highest AP) and ``last.pth`` (all that is needed to go on). A run that finds its own ``last.pth`` goes on from there: on a CPU
with the very same result as without the stop. Where the place is in an object store, its working copy on this machine is the folder
here: fetched before the first epoch, pushed after every one.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from raydetr.config import Config, Optim, to_dict, write_yaml
from raydetr.data.cache import DecodedImages, cache_limit
from raydetr.data.coco import CocoImages, build_loader, find_split
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.evaluate.coco import METRICS, precision_recall, run_coco_eval, summarize
from raydetr.evaluate.intervals import with_intervals
from raydetr.loss.criterion import build_criterion
from raydetr.memory import kept_memory
from raydetr.model.detr import build_model
from raydetr.storage import OWNER, become_owner, check_owner, fetch, join, push, remove_tokens, working_folder
from raydetr.training.console import Display
from raydetr.training.engine import Detections, Training, choose_device, choose_dtype, evaluate, gathered, train_one_epoch
from raydetr.training.schedule import MovingAverage, build_optimizer, build_scheduler
from raydetr.training.tracking import LOSSES, Pictures, Tracker, log_line, write_log
from raydetr.weights.checkpoint import read_checkpoint, save_checkpoint
from raydetr.weights.fitting import load_weights

PICTURE_SETS = 10  # how often in a run the validation pictures are drawn, at most


class LocalReporter:
    """The reporter of a run that nobody watches from outside: a plain process, or one of several under torchrun.

    It says what a reporter is: ``rank``, ``world_size``, ``local_rank``; ``checkpoint()`` is the file to start from where it is not the
    run folder's own ``last.pth``; ``report`` is called by every worker after every epoch, with the file ``last.pth`` on rank 0; ``show``
    is given the events that :mod:`raydetr.training.console` describes. ``searched`` are the settings that a search varies, with their
    domains, for TensorBoard's HPARAMS page; None where there is no search.
    ``images`` reads pictures that were decoded for several runs; None where
    a run decodes its own.
    """

    searched: Mapping[str, tuple | list] | None = None
    images: DecodedImages | None = None

    def __init__(self, checkpoint: Path | None = None, display: Display | None = None):
        together = dist.is_available() and dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self._checkpoint = checkpoint
        self._display = display or Display()

    def checkpoint(self) -> Path | None:
        """The checkpoint given at the start."""
        return self._checkpoint

    def report(self, metrics: dict[str, Any], checkpoint: Path | None = None) -> None:
        """Nobody asks."""

    def show(self, event: dict[str, Any]) -> None:
        """On this terminal, by rank 0."""
        if self.rank == 0:
            self._display.show(event)


@dataclasses.dataclass
class Progress:
    """How far a run is. AP is None where the validation set has no object to find."""

    epoch: int = 0  # epochs finished
    best_epoch: int = 0
    best_AP: float | None = None
    best_loss: float = float("inf")  # the validation loss, which decides between equal AP
    stale: int = 0  # epochs since AP last rose

    def take(self, ap: float | None, loss: float) -> bool:
        """Count an epoch; returns whether it is the best so far. Where AP is undefined the last epoch is."""
        self.epoch += 1
        higher = ap is None or self.best_AP is None or ap > self.best_AP
        best = higher or (ap == self.best_AP and loss < self.best_loss)
        self.stale = 0 if higher else self.stale + 1
        if best:
            self.best_epoch, self.best_AP, self.best_loss = self.epoch, ap, loss
        return best


@dataclasses.dataclass
class Run:
    """What the parts of a run share."""

    config: Config
    reporter: Any
    place: str  # where the run is kept: the folder, or its address in an object store
    train: DataLoader
    val: DataLoader
    training: Training
    progress: Progress
    owner: str = ""  # of the folder, on rank 0
    batches: Iterator | None = None  # of the epoch to come: its first are loaded while the last one is still written down
    tracker: Tracker | None = None  # on rank 0
    pictures: Pictures | None = None

    @property
    def folder(self) -> Path:
        """Where this machine writes it."""
        return working_folder(self.place)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or AP has not risen for ``optim.patience`` of them."""
        optim = self.config.optim
        return self.progress.epoch >= optim.epochs or (optim.patience > 0 and self.progress.stale >= optim.patience)


def fit(config: Config, reporter: Any = None) -> dict[str, Any]:
    """Train, evaluate and keep what comes of it; every worker of a run calls it. Returns the last epoch's metrics.

    ``torch.distributed`` is initialised by whoever starts several workers; ``reporter`` (default: :class:`LocalReporter`) tells each
    its rank. Metrics are flat: ``epoch`` (from 1), the twelve COCO numbers, losses as ``train_loss`` (weighted), ``val_loss_ce`` (not
    weighted) and so on, ``best_AP``, ``best_epoch``, ``images_per_second``, ``seconds``; AP is None where the validation set has no
    object. A run that is finished already reports its last metrics again and returns at once. Raises UserError for what the user can mend.
    """
    if reporter is None:
        with Display() as display:
            return fit(config, LocalReporter(display=display))
    if config.run.name is None:
        raise UserError("run.name is not set: it names the run's folder in run.storage")
    place = join(config.run.storage, config.run.name)
    folder = working_folder(place)
    device = choose_device(config.speed, reporter.local_rank)
    with _in_one_line(folder), kept_memory(device.type):
        fetch(place)
        start = _start_file(folder, reporter)
        run, metrics = _prepare(config, reporter, place, device, start)
        if not run.finished:
            return _epochs(run)
        reporter.report(metrics, start if reporter.rank == 0 else None)
        return metrics


def _epochs(run: Run) -> dict[str, Any]:
    config, folder, show = run.config, run.folder, run.reporter.show
    _load_ahead(run)
    if run.reporter.rank == 0:
        run.tracker = _open_folder(config, folder, run.training.step, run.reporter.searched)
        run.owner = become_owner(run.place)
        run.pictures = Pictures(run.val.dataset, config.run.pictures)
    steps = math.ceil(len(run.train) / config.optim.accumulate)
    show({"kind": "start", "epochs": config.optim.epochs, "steps": steps, "done": run.progress.epoch})
    try:
        while not run.finished:
            metrics = _one_epoch(run)
        if run.tracker:
            run.tracker.finish()
            push(run.place)
            remove_tokens(run.place, OWNER)
    finally:
        if run.tracker:
            run.tracker.close()
    best = {"best_AP": run.progress.best_AP, "best_epoch": run.progress.best_epoch, "checkpoint": join(run.place, "best.pth")}
    show({"kind": "end", "epochs": run.progress.epoch, **best})
    return metrics


def _one_epoch(run: Run) -> dict[str, Any]:
    """Train, evaluate, write down, report: in this order, so that whatever stops it leaves a whole earlier epoch in last.pth."""
    training, progress, began, epoch = run.training, run.progress, time.perf_counter(), run.progress.epoch + 1
    train = train_one_epoch(training, run.batches, epoch, _step_shower(run, epoch))
    run.reporter.show({"kind": "evaluate", "epoch": epoch})
    val, detections = evaluate(training.evaluated, training.criterion, run.val, training.device, training.dtype)
    scores, curve = gathered(_score(run, detections) if run.reporter.rank == 0 else None)[0]
    best = progress.take(scores["AP"], val["loss"])
    if not run.finished:
        _load_ahead(run)
    metrics = _metrics(progress, train, val, scores) | {"seconds": time.perf_counter() - began}
    states = gathered(_random_state(training.device))
    if run.tracker:
        check_owner(run.place, run.owner)
        _write_down(run, train, val, scores, curve)
        _draw(run, detections)
        run.tracker.flush()
        _save(run, metrics, best, states)
        push(run.place)
    run.reporter.report(metrics, run.folder / "last.pth" if run.reporter.rank == 0 else None)
    run.reporter.show({"kind": "epoch", "epoch": epoch, "metrics": metrics, "seconds": time.perf_counter() - began, "best": best})
    return metrics


def _load_ahead(run: Run) -> None:
    run.train.dataset.set_epoch(run.progress.epoch + 1)
    run.batches = iter(run.train)


def _step_shower(run: Run, epoch: int) -> Callable[[dict[str, float]], None]:
    first = run.training.step

    def show(numbers: dict[str, float]) -> None:
        if run.tracker:
            run.tracker.log_step(numbers)
        shown = {name: numbers[name] for name in ("loss", "images_per_second")}
        run.reporter.show({"kind": "step", "epoch": epoch, "step": numbers["step"] - first, **shown})

    return show


def _score(run: Run, detections: Detections) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    coco = run.val.dataset.coco
    evaluation = run_coco_eval(coco, detections.results(run.val.dataset.categories))
    scores = with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"], ["AP"])
    return scores, precision_recall(evaluation)


def _metrics(progress: Progress, train: dict[str, float], val: dict[str, float], scores: dict[str, Any]) -> dict[str, Any]:
    return {
        "epoch": progress.epoch,
        **{name: scores[name] for name in METRICS},
        **{f"train_{name}": train[name] for name in LOSSES},
        **{f"val_{name}": val[name] for name in LOSSES},
        "best_AP": progress.best_AP,
        "best_epoch": progress.best_epoch,
        "images_per_second": train["images_per_second"],
    }


def _write_down(run: Run, train: dict[str, float], val: dict[str, float], scores: dict[str, Any], curve: dict[str, np.ndarray]) -> None:
    training, epoch = run.training, run.progress.epoch
    run.tracker.log_epoch(training.step, epoch, train, val, scores, curve)
    trained = sum(parameter.numel() for parameter in training.detr.parameters() if parameter.requires_grad)
    # The official log counts epochs from 0.
    write_log(run.folder / "log.txt", log_line(epoch - 1, train, val, scores, training.criterion.weight_dict, trained))


def _draw(run: Run, detections: Detections) -> None:
    epoch, epochs = run.progress.epoch, run.config.optim.epochs
    sets = 1 if run.reporter.searched else PICTURE_SETS  # trials are short, and many
    if epoch % math.ceil(epochs / sets) == 0 or epoch in (1, epochs):
        run.tracker.log_pictures(run.training.step, run.pictures.draw(detections))


def _save(run: Run, metrics: dict[str, Any], best: bool, random_states: list[dict]) -> None:
    training, average = run.training, run.training.average
    about = {"settings": to_dict(run.config), "categories": run.train.dataset.categories, "epoch": run.progress.epoch, "metrics": metrics}
    if best:
        save_checkpoint(run.folder / "best.pth", {"model": training.evaluated.state_dict(), **about})
    to_go_on = {
        "optimizer": training.optimizer.state_dict(),
        "lr_scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
        # With a moving average "model", what is to be used, is the average: naming it twice takes no room in the file.
        "ema": average.module.state_dict() if average else None,
        "ema_updates": average.updates if average else 0,
        "trained": training.detr.state_dict() if average else None,
        "random": random_states,
        "step": training.step,
        "progress": dataclasses.asdict(run.progress),
    }
    save_checkpoint(run.folder / "last.pth", {"model": training.evaluated.state_dict(), **about, **to_go_on})


# ------------------------------------------------------------------------------------------------- from settings to a run


def _start_file(folder: Path, reporter: Any) -> Path | None:
    """The checkpoint to go on from; all workers take the same."""
    last = folder / "last.pth"
    return reporter.checkpoint() or (last if gathered(last.exists())[0] else None)


def _prepare(config: Config, reporter: Any, place: str, device: torch.device, start: Path | None) -> tuple[Run, dict[str, Any] | None]:
    """Everything built as the settings say and put where the checkpoint ``start`` left off, and that checkpoint's metrics."""
    content = read_checkpoint(start) if start else None
    _seed(config.run.seed)  # the same network on every worker
    train, val = _loaders(config, reporter, device, content)
    categories = train.dataset.categories
    leaves = {name: value for name, value in to_dict(config)["model"].items() if name not in ("preset", "weights")}
    model = build_model(config.model.preset, len(categories), **leaves)
    if content is None:
        message = load_weights(model, config.model.weights, categories)
    else:
        message = f"going on after epoch {content['epoch']} of {start}"
        _check_same_run(config, content, start)
        model.load_state_dict(content["trained"] or content["model"])
    for text in (*train.dataset.warnings, *val.dataset.warnings, message):
        reporter.show({"kind": "message", "text": text})
    training = _training(config, reporter, model.to(device), len(categories), math.ceil(len(train) / config.optim.accumulate), content)
    progress = Progress(**content["progress"]) if content else Progress()
    states = content["random"] if content else []
    if reporter.rank < len(states):
        _set_random_state(states[reporter.rank], device)
    else:
        _seed(config.run.seed, reporter.rank, progress.epoch)
    return Run(config, reporter, place, train, val, training, progress), content and content["metrics"]


def _loaders(config: Config, reporter: Any, device: torch.device, content: dict[str, Any] | None) -> tuple[DataLoader, DataLoader]:
    data, batch_size = config.data, config.optim.batch_size
    known = content["categories"] if content else None
    train = CocoImages(find_split(data, "train"), train_transforms(data), config.run.seed, known)
    val = CocoImages(find_split(data, "val"), val_transforms(data), config.run.seed, train.categories)
    limit = cache_limit(data) // reporter.world_size  # as if all workers were on one machine
    train.images = val.images = reporter.images or DecodedImages(train.files + val.files, limit)
    common = {"num_workers": data.num_workers, "seed": config.run.seed, "device": device}
    share = (batch_size, reporter.rank, reporter.world_size)
    return build_loader(train, *share, shuffle=True, group_sizes=data.group_sizes, **common), build_loader(val, *share, **common)


def _training(config: Config, reporter: Any, model: nn.Module, num_classes: int, steps_per_epoch: int, content: dict | None) -> Training:
    optim, device = config.optim, next(model.parameters()).device
    dtype = choose_dtype(config.speed, device)
    if config.speed.compile == "on":
        # In place: the names of what is stored stay. Compiled once for all sizes of batches.
        model.backbone[0].body.compile(dynamic=True)
    losses = dataclasses.asdict(config.loss) | dataclasses.asdict(config.matcher)
    criterion = build_criterion(num_classes, aux_loss=config.model.aux_loss, dec_layers=config.model.dec_layers, **losses)
    optimizer = build_optimizer(model, optim)
    average = MovingAverage(model, optim.ema_decay) if optim.ema_decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if content:
        _load_optimizer(optimizer, content["optimizer"], optim)
        scaler.load_state_dict(content["scaler"])
        if average:
            average.module.load_state_dict(content["ema"] or content["model"])
            average.updates = content["ema_updates"]
    scheduler = build_scheduler(optimizer, optim, steps_per_epoch, (content["epoch"] if content else 0) * steps_per_epoch)
    if reporter.world_size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # The buffers are constants: no need to send them round at every step. Older versions of torch have the other name for it.
        name = (
            "forward_sync_buffers"
            if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            else "broadcast_buffers"
        )
        model = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True, **{name: False})
    step = content["step"] if content else 0
    return Training(model, criterion, optimizer, scheduler, scaler, average, device, dtype, optim.accumulate, optim.clip_max_norm, step)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], optim: Optim) -> None:
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        raise UserError(
            "last.pth trains other parameters than these settings: optim.freeze_backbone and optim.lr_backbone may not change"
        ) from None
    for group in optimizer.param_groups:
        group["weight_decay"] = optim.weight_decay


def _check_same_run(config: Config, content: dict[str, Any], start: Path) -> None:
    if not {"optimizer", "progress", "random"} <= content.keys():
        raise UserError(f"{start} holds weights only, no run to go on with; start a new one from it by model.weights")
    before, now = content["settings"]["model"], to_dict(config)["model"]
    for name in now:
        if name not in ("preset", "weights") and before.get(name) != now[name]:
            raise UserError(f"{start} is of a network with model.{name} {before.get(name)}, not {now[name]}; choose another run.name")


def _open_folder(config: Config, folder: Path, step: int, searched: Mapping[str, tuple | list] | None) -> Tracker:
    temporary = folder / "config.yaml.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, temporary)
        os.replace(temporary, folder / "config.yaml")
    except OSError as error:
        with contextlib.suppress(OSError):  # it may not be there
            temporary.unlink()
        if is_disk_full(error):
            raise
        raise UserError(f"run.storage: cannot write to {folder}: {error.strerror}") from None
    return Tracker(folder / "tb", config, step, searched)


# ---------------------------------------------------------------------------------------------- random numbers, and errors


def _seed(*numbers: int) -> None:
    """Every generator from ``numbers`` alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _random_state(device: torch.device) -> dict[str, Any]:
    """This worker's generators, as plain data."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    """What the user can mend, as a UserError."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(f"the disk of {folder} is full; finished epochs are kept: make room and go on") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        said = " ".join(str(error).split("\n\n")[0].split())  # what follows is advice on debugging the compiler
        raise UserError(f"speed.compile: torch.compile fails here, --speed.compile off trains without ({said})") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory does not suffice: lower optim.batch_size (optim.accumulate makes up for it), data.max_size and "
            f"data.train_sizes, or take speed.precision bf16 ({str(error).splitlines()[0]})"
        ) from error
