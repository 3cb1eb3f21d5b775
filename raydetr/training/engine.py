"""The training step, an epoch of them, and the evaluation."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from raydetr.config import Speed
from raydetr.errors import UserError
from raydetr.loss.criterion import Criterion
from raydetr.loss.matcher import NonFiniteCost
from raydetr.model.detr import postprocess
from raydetr.training.schedule import MovingAverage

# On a GPU the host reads losses only every so many steps, so that it stays ahead of the device; a CPU has nothing to wait for.
READ_EVERY = {"cuda": 20, "cpu": 1}
SMALLEST_SCALE = 1e-3  # of the losses in fp16

Batch = tuple[Tensor, Tensor | None, list[dict[str, Tensor]]]


@dataclasses.dataclass
class Training:
    """All that a training step uses and changes."""

    model: nn.Module  # what is called: the DETR, or DistributedDataParallel around it
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler  # enabled for fp16 only
    average: MovingAverage | None
    device: torch.device
    dtype: torch.dtype  # of the forward pass; the losses are float32
    accumulate: int = 1
    clip_max_norm: float = 0.0
    step: int = 0  # optimizer steps so far, over all epochs

    @property
    def detr(self) -> nn.Module:
        """The network itself, as it is trained."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average of the weights where there is one."""
        return self.average.module if self.average else self.detr


def choose_device(speed: Speed, local_rank: int = 0) -> torch.device:
    """The device of ``speed.device``; with GPUs the one of this process, ``local_rank`` counting the processes of the machine."""
    if speed.device == "cpu" or (speed.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("speed.device: cuda was asked for and PyTorch sees no GPU; cpu trains without")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def choose_dtype(speed: Speed, device: torch.device) -> torch.dtype:
    """The arithmetic of ``speed.precision`` for the forward pass."""
    if speed.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[speed.precision]


class Taken(NamedTuple):
    """An optimizer step whose losses the host has not read yet."""

    step: int
    losses: Tensor  # float32, as loss_names, on the device; of this worker
    image_ids: list[int]
    rates: list[float]


class Means:
    """Means of numbers by their name; those that are not finite (fp16's overflowing gradients) are left out."""

    def __init__(self):
        self._sums, self._counts = {}, {}

    def add(self, numbers: dict[str, float]) -> None:
        """One number for each name."""
        for name, number in numbers.items():
            finite = math.isfinite(number)
            self._sums[name] = self._sums.get(name, 0.0) + (number if finite else 0.0)
            self._counts[name] = self._counts.get(name, 0) + finite

    def values(self) -> dict[str, float]:
        """The means; NaN where no number was finite."""
        return {name: value / self._counts[name] if self._counts[name] else math.nan for name, value in self._sums.items()}


def train_one_epoch(training: Training, loader: Iterable[Batch], epoch: int, show: Callable[[dict], None]) -> dict[str, float]:
    """One pass over the training set; returns the means over its steps by :func:`loss_names`, of the rates ``lr_transformer`` and
    ``lr_backbone``, and ``images_per_second``.

    ``show`` is given every step's numbers (averaged over the workers), also ``step`` and ``images_per_second`` (of all workers).
    Raises UserError, on all workers, where a loss or gradient is not finite.
    """
    training.model.train()
    names, means, unread, began = loss_names(training.criterion), Means(), [], time.perf_counter()
    batches, images, since = iter(loader), 0, began
    while group := list(itertools.islice(batches, training.accumulate)):
        unread.append(take_step(training, names, group))
        images += len(unread[-1].image_ids)
        if len(unread) >= READ_EVERY[training.device.type]:
            since = _read(training, names, unread, means, epoch, since, show)
    if unread:
        _read(training, names, unread, means, epoch, since, show)
    if not images:
        raise UserError("the training set gives no batch: it has no image for each worker")
    if training.scaler.is_enabled() and training.scaler.get_scale() < SMALLEST_SCALE:
        raise UserError(f"the gradients overflow in fp16 whatever their scale (epoch {epoch}); take speed.precision bf16 or fp32")
    return {**means.values(), "images_per_second": images * workers() / (time.perf_counter() - began)}


def take_step(training: Training, names: list[str], batches: list[Batch]) -> Taken:
    """One optimizer step on the micro-batches ``batches``, whose gradients add up to that of the one big batch."""
    targets = [[_on_device(target, training.device) for target in batch[2]] for batch in batches]
    normalizers = training.criterion.normalizers(targets, training.detr.query_embed.num_embeddings)
    total = None
    for number, (images, mask, _) in enumerate(batches):
        more_to_come = number < len(batches) - 1 and isinstance(training.model, DistributedDataParallel)
        with training.model.no_sync() if more_to_come else contextlib.nullcontext():
            outputs = _forward(training.model, images, mask, training.device, training.dtype)
            losses = _losses(training.criterion, outputs, targets[number], normalizers, names)
            training.scaler.scale(losses["loss"]).backward()
        losses = torch.stack([losses[name].detach() for name in names[:-1]])
        total = losses if total is None else total + losses
    training.scaler.unscale_(training.optimizer)
    norm = nn.utils.clip_grad_norm_(training.detr.parameters(), training.clip_max_norm or math.inf)
    rates = training.scheduler.get_last_lr()
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad()
    training.scheduler.step()
    if training.average:
        training.average.update()
    training.step += 1
    image_ids = [int(target["image_id"]) for batch in batches for target in batch[2]]
    return Taken(training.step, torch.cat([total, norm[None]]), image_ids, rates)


def loss_names(criterion: Criterion) -> list[str]:
    """The numbers of a step in their order: ``loss`` (weighted sum), every unweighted loss and error, ``grad_norm`` (before clipping)."""
    cardinality = [name.replace("loss_ce", "cardinality_error") for name in criterion.weight_dict if name.startswith("loss_ce")]
    return ["loss", *criterion.weight_dict, "class_error", *cardinality, "grad_norm"]


def _on_device(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: target[name].to(device, non_blocking=True) for name in ("boxes", "labels")}


def _forward(model: nn.Module, images: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    images = images.to(device, non_blocking=True)
    mask = None if mask is None else mask.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(images, mask)


def _losses(criterion: Criterion, outputs: dict[str, Any], targets: list[dict], normalizers: Any, names: list[str]) -> dict[str, Tensor]:
    try:
        losses = criterion(outputs, targets, normalizers)
    except NonFiniteCost:
        # Go on to the backward pass, where the other workers wait for this one; all stop together when they read the losses.
        broken = (outputs["pred_logits"].sum() + outputs["pred_boxes"].sum()) * math.nan
        return dict.fromkeys(names, broken)
    return {**losses, "loss": criterion.weighted_sum(losses)}


def _read(training: Training, names: list[str], unread: list[Taken], means: Means, epoch: int, since: float, show: Callable) -> float:
    """Take the ``unread`` steps, averaged over the workers, into ``means`` and show them; returns the time now."""
    here = torch.stack([taken.losses for taken in unread])
    everywhere = here.clone()
    if workers() > 1:
        dist.all_reduce(everywhere)
        everywhere /= workers()
    values = everywhere.tolist()
    now = time.perf_counter()
    images_per_second = sum(len(taken.image_ids) for taken in unread) * workers() / (now - since)
    for taken, numbers in zip(unread, values, strict=True):
        row = dict(zip(names, numbers, strict=True))
        # With fp16 an infinite gradient is normal: the scaler leaves that step out and lowers its scale.
        if not math.isfinite(row["loss"]) or not (math.isfinite(row["grad_norm"]) or training.scaler.is_enabled()):
            raise _non_finite(row, taken, epoch)
        rates = dict(zip(("lr_transformer", "lr_backbone"), taken.rates, strict=True))
        row |= rates
        means.add(row)
        show({"step": taken.step, **row, "images_per_second": images_per_second})
    unread.clear()
    return now


def _non_finite(row: dict[str, float], taken: Taken, epoch: int) -> UserError:
    what = "loss" if not math.isfinite(row["loss"]) else "grad_norm"
    # The gradient is everybody's; a loss is of the worker that has it.
    mine = taken.image_ids if what == "grad_norm" or not torch.isfinite(taken.losses[0]) else []
    ids = sorted(set(itertools.chain.from_iterable(gathered(mine))))
    name = "loss" if what == "loss" else "gradient"
    return UserError(
        f"the {name} became {row[what]} in epoch {epoch}, step {taken.step}, on the images {_shown(ids)}; "
        "look at their boxes, lower optim.lr, or take speed.precision fp32"
    )


class Detections(NamedTuple):
    """What the network found in images [N], each of its Q queries."""

    image_ids: np.ndarray  # int64 [N], ascending, each once
    boxes_xywh: np.ndarray  # float32 [N, Q, 4], pixels of the original image
    scores: np.ndarray  # float32 [N, Q]
    labels: np.ndarray  # int64 [N, Q], 0..K-1

    def results(self, categories: list[dict]) -> list[dict]:
        """As COCO results, under the ids of ``categories`` (in label order)."""
        ids = np.array([category["id"] for category in categories])[self.labels]
        rows = zip(self.image_ids.tolist(), ids.tolist(), self.boxes_xywh.tolist(), self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category, "bbox": box_xywh, "score": score}
            for image_id, *per_query in rows
            for category, box_xywh, score in zip(*per_query, strict=True)
        ]


@torch.no_grad()
def evaluate(
    model: nn.Module, criterion: Criterion, loader: Iterable[Batch], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], Detections]:
    """Losses of the whole set (``loss`` weighted, the others not) and all workers' detections; the same on every worker.

    ``model`` is the network itself, not wrapped for distributed training: workers may have different numbers of batches, which
    should not share images. Raises UserError, on all workers, where the outputs are not finite.
    """
    model.eval()
    names, sums, found, broken = (), [], [], []
    for images, mask, targets in loader:
        outputs = _forward(model, images, mask, device, dtype)
        image_ids = [int(target["image_id"]) for target in targets]
        try:
            names, values = zip(*criterion.sums(outputs, [_on_device(target, device) for target in targets]).items(), strict=True)
        except NonFiniteCost:
            broken += image_ids
            continue
        sums.append(torch.stack(values))
        sizes = torch.stack([target["orig_size"] for target in targets]).to(device, non_blocking=True)
        per_image = postprocess(outputs, sizes)
        found.append((torch.tensor(image_ids), *(torch.stack([one[name] for one in per_image]) for name in ("boxes", "scores", "labels"))))
    sums = torch.stack(sums).tolist() if sums else []
    columns = [torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)]
    everyone = list(zip(*gathered((names, sums, columns, broken)), strict=True))
    if any(everyone[3]):
        ids = sorted(itertools.chain.from_iterable(everyone[3]))
        raise UserError(f"evaluation: the network's outputs are not finite on the images {_shown(ids)}; take speed.precision fp32")
    return _losses_of(criterion, everyone[0], everyone[1]), _detections_of(everyone[2])


def _losses_of(criterion: Criterion, names: list[tuple], sums: list[list]) -> dict[str, float]:
    names = next((each for each in names if each), ())
    # Summed exactly, so that the order, and with it the number of workers, does not matter.
    totals = [math.fsum(column) for column in zip(*itertools.chain.from_iterable(sums), strict=True)]
    if not totals:
        raise UserError("the validation set has no image")
    losses = criterion.means(dict(zip(names, totals, strict=True)))
    return {"loss": criterion.weighted_sum(losses), **losses}


def _detections_of(workers: list[list[np.ndarray]]) -> Detections:
    image_ids, boxes_xyxy, scores, labels = (np.concatenate(column) for column in zip(*filter(None, workers), strict=True))
    image_ids, first = np.unique(image_ids, return_index=True)
    low, high = np.split(boxes_xyxy[first], 2, axis=-1)
    return Detections(image_ids, np.concatenate([low, high - low], axis=-1), scores[first], labels[first])


def workers() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(mine: Any) -> list[Any]:
    """Every worker's object, by rank, on every worker."""
    if workers() == 1:
        return [mine]
    everyone = [None] * workers()
    dist.all_gather_object(everyone, mine)
    return everyone


def _shown(image_ids: list[int]) -> str:
    return ", ".join(map(str, image_ids[:20])) + (f" and {len(image_ids) - 20} more" if len(image_ids) > 20 else "")
