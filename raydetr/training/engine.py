"""One optimizer step, one epoch of steps, and one pass over the validation set."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from raydetr.config import Speed
from raydetr.data.masks import RLE
from raydetr.data.transforms import normalize
from raydetr.errors import UserError
from raydetr.evaluate.matches import MOST_DETECTIONS
from raydetr.loss.criterion import Criterion
from raydetr.loss.matcher import Matching, NonFiniteCost
from raydetr.model.detr import DETR, postprocess
from raydetr.model.masks import MaskFeatures
from raydetr.text import shortlist
from raydetr.training.graphs import GraphedNetwork
from raydetr.training.masks import counted_queries, detected_masks, logits_in_chunks
from raydetr.training.schedule import MovingAverage

# Reading a loss makes the host wait for the device. On a GPU the host reads the losses of many steps at once and stays ahead of it.
READ_EVERY = {"cuda": 20, "cpu": 1}
MIN_LOSS_SCALE = 1e-3  # with fp16; a scale this small means that the gradients overflow whatever the scale
MOST_IDS = 20  # of images in an error message

Batch = tuple[Tensor, Tensor | None, list[dict[str, Tensor]]]  # images, padding mask, targets: what data.loader.collate returns


@dataclasses.dataclass
class Training:
    """The state that optimizer steps use and change."""

    model: DETR | DistributedDataParallel  # which wraps a DETR
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler  # enabled with fp16 only
    average: MovingAverage | None
    device: torch.device
    dtype: torch.dtype  # of the forward pass; the losses are always computed in float32
    accumulate: int = 1  # batches per optimizer step
    clip_max_norm: float = 0.0  # 0 turns clipping off
    step: int = 0  # optimizer steps taken so far, over all epochs
    graphs: GraphedNetwork | None = None  # calls the model by CUDA graphs
    as_one: bool = False  # the losses are normalized over the images of all workers, not over those of each

    @property
    def detr(self) -> DETR:
        """The trained network, without the wrapper for several workers."""
        return cast(DETR, self.model.module) if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved as the best: the moving average of the weights if there is one."""
        return self.average.module if self.average else self.detr


def choose_device(speed: Speed, local_rank: int = 0) -> torch.device:
    """Return the device of ``speed.device`` and, for a GPU, make it this process's current device.

    Args:
        speed: The ``speed`` section of the settings.
        local_rank: Index of this process among the worker processes of its node.

    Raises:
        UserError: ``speed.device`` is ``cuda`` and PyTorch finds no GPU.
    """
    if speed.device == "cpu" or (speed.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("speed.device: cuda was asked for and PyTorch sees no GPU; cpu trains without")
    configure_cuda(speed)
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def configure_cuda(speed: Speed) -> None:
    """Configure the CUDA libraries for ``speed.precision``. This affects the whole process.

    Args:
        speed: The ``speed`` section of the settings.
    """
    # cuDNN's attention builds a plan for every new shape of a batch, which takes longer than the step itself.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # By default PyTorch uses TF32 in convolutions also for float32, with a relative error of 1e-3.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = speed.precision == "tf32"


def choose_dtype(speed: Speed, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass.

    Args:
        speed: The ``speed`` section of the settings.
        device: Where the model is.

    Returns:
        The dtype that ``speed.precision`` names. ``auto`` is bfloat16 on GPUs that compute with it, and float32 elsewhere.
    """
    if speed.precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[speed.precision]


class StepRecord(NamedTuple):
    """What is kept of an optimizer step until its losses are read from the device."""

    step: int  # counted over the whole run, from 1
    losses: Tensor  # float32 on the device, one for each of loss_names; those of this worker
    image_ids: list[int]
    learning_rates: list[float]  # transformer, backbone


def train_one_epoch(training: Training, loader: Iterable[Batch], epoch: int, show: Callable[[dict], None]) -> dict[str, float]:
    """Train on every batch of ``loader`` once.

    Args:
        training: The model, optimizer and so on; changed in place.
        loader: Batches as :func:`raydetr.data.loader.collate` makes them. Every worker must have the same number.
        epoch: Number of the epoch, from 1; used in error messages.
        show: Called with the numbers of every optimizer step, averaged over the workers: ``step``, those of :func:`loss_names`,
            ``lr_transformer``, ``lr_backbone`` and ``images_per_second`` (of all workers together).

    Returns:
        The means over the epoch of what ``show`` is called with, except ``step``.

    Raises:
        UserError: On every worker, if a loss or a gradient is not finite, or if ``loader`` is empty.
    """
    training.model.train()
    losses = EpochLosses(training, epoch, show)
    batches = sent_ahead(loader, training.device)
    while group := list(itertools.islice(batches, training.accumulate)):
        losses.add(take_step(training, group))
    losses.read()
    if not losses.images:
        raise UserError("the training set gives no batch: it has no image for each worker")
    if training.scaler.is_enabled() and training.scaler.get_scale() < MIN_LOSS_SCALE:
        raise UserError(f"the gradients overflow in fp16 at every loss scale (epoch {epoch}); use speed.precision bf16 or fp32")
    return losses.means()


def sent_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Iterate over batches, copying them to a GPU while it computes the step before.

    On a GPU, the copies run on a stream of their own, and the host is ahead of the GPU.

    Args:
        batches: Batches as :func:`raydetr.data.loader.collate` makes them. Copies are asynchronous only from pinned memory.
        device: Where the model is.

    Yields:
        The batches. On a GPU, images and padding masks are on the GPU, and targets still on the CPU; on a CPU, the batches are unchanged.
    """
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)
    for images, mask, targets in batches:
        with torch.cuda.stream(copies):
            images = images.to(device, non_blocking=True)
            mask = None if mask is None else mask.to(device, non_blocking=True)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        # Keep their memory from being reused for other copies before the step has used it.
        images.record_stream(compute)
        if mask is not None:
            mask.record_stream(compute)
        yield images, mask, targets


def take_step(training: Training, batches: list[Batch]) -> StepRecord:
    """Take one optimizer step on several batches, whose gradients add up to the gradient of one large batch.

    Args:
        training: The model, optimizer and so on; changed in place.
        batches: One batch for each of ``optim.accumulate`` forward and backward passes.

    Returns:
        The step's losses, still on the device, with the ids of its images and its learning rates.
    """
    names = loss_names(training.criterion)
    groups = training.detr.query_groups  # each of which predicts the boxes of the image
    on_device = [[_boxes_and_labels(target, training.device) for target in batch[2]] for batch in batches]
    targets = [[target for target in of_batch for _ in range(groups)] for of_batch in on_device]
    normalizers = training.criterion.normalizers(targets, training.detr.query_embed.num_embeddings, training.as_one)
    model, values = training.model, []
    for number, (images, mask, _) in enumerate(batches):
        last = number == len(batches) - 1  # only this backward pass averages the gradients over the workers
        with contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync():
            matched = MatchedQueries(training.criterion, targets[number]) if training.criterion.masks else None
            network = functools.partial(model, choose=matched) if matched else training.graphs or model
            outputs = _forward(network, images, mask, training.device, training.dtype)
            losses = _losses(training.criterion, outputs, targets[number], normalizers, matched and matched.pairs)
            training.scaler.scale(losses["loss"]).backward()
        values.append(torch.stack([losses[name].detach() for name in names[:-1]]))
    training.scaler.unscale_(training.optimizer)
    norm = nn.utils.clip_grad_norm_(training.detr.parameters(), training.clip_max_norm or math.inf)
    learning_rates = [float(each) for each in training.scheduler.get_last_lr()[:2]]  # those of layers with smaller rates follow
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=training.graphs is None)
    training.scheduler.step()
    if training.average:
        training.average.update()
    training.step += 1
    image_ids = [int(target["image_id"]) for batch in batches for target in batch[2]]
    return StepRecord(training.step, torch.cat([sum(values[1:], values[0]), norm[None]]), image_ids, learning_rates)


class MatchedQueries:
    """Chooses the queries that are matched in the last decoder layer: the losses need no masks of others.

    Args:
        criterion: Matches queries and true boxes.
        targets: True boxes of each image of the batch.

    Attributes:
        pairs: The matching of all layers, once the queries are chosen; None if the outputs are not finite.
    """

    def __init__(self, criterion: Criterion, targets: list[dict[str, Tensor]]):
        self._criterion, self._targets = criterion, targets
        self.pairs: Matching | None = None

    def __call__(self, outputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the positions in the batch of the matched queries' images, and the queries, both int64 [M]."""
        try:
            self.pairs = self._criterion.match(outputs, self._targets)
        except NonFiniteCost:  # the criterion will raise it once more, when the forward pass is complete
            nothing = torch.zeros(0, dtype=torch.int64, device=outputs["pred_logits"].device)
            return nothing, nothing
        return self.pairs.image, self.pairs.query[-1]


def loss_names(criterion: Criterion) -> list[str]:
    """Return the names of a step's numbers, in order.

    These are ``loss`` (the weighted sum), every unweighted loss, ``class_error`` and ``cardinality_error`` with their copies for the
    earlier decoder layers, and ``grad_norm`` (before clipping).

    Args:
        criterion: The criterion, whose ``weight_dict`` names the losses.
    """
    cardinality = [name.replace("loss_ce", "cardinality_error") for name in criterion.weight_dict if name.startswith("loss_ce")]
    return ["loss", *criterion.weight_dict, "class_error", *cardinality, "grad_norm"]


class EpochLosses:
    """Reads the losses of optimizer steps from the device, ``READ_EVERY`` steps at a time, and averages them over an epoch.

    Args:
        training: The training, from which the names of the losses, the device and whether fp16 is in use are taken.
        epoch: Number of the epoch, from 1.
        show: Called with the numbers of every step that is read; see :func:`train_one_epoch`.
    """

    def __init__(self, training: Training, epoch: int, show: Callable[[dict], None]):
        self.images = 0  # of this worker
        self._training, self._epoch, self._show = training, epoch, show
        self._names = loss_names(training.criterion)
        self._unread: list[StepRecord] = []
        self._means = Means()
        self._started = self._last_read = time.perf_counter()

    def add(self, record: StepRecord) -> None:
        """Keep the losses of a step, and read those of all kept steps once there are ``READ_EVERY``.

        Args:
            record: The result of :func:`take_step`.

        Raises:
            UserError: As for :meth:`read`.
        """
        self._unread.append(record)
        self.images += len(record.image_ids)
        if len(self._unread) >= READ_EVERY[self._training.device.type]:
            self.read()

    def read(self) -> None:
        """Read the losses of the steps that were not read yet, average them over the workers, check and show them.

        Raises:
            UserError: On every worker, if a loss or a gradient is not finite. With fp16 an infinite gradient is normal: the scaler skips
                that step and lowers its scale.
        """
        if not self._unread:
            return
        values = _mean_over_workers(torch.stack([record.losses for record in self._unread])).tolist()
        now = time.perf_counter()
        images_per_second = sum(len(record.image_ids) for record in self._unread) * workers() / (now - self._last_read)
        for record, numbers in zip(self._unread, values, strict=True):
            row = dict(zip(self._names, numbers, strict=True))
            if not math.isfinite(row["loss"]) or not (math.isfinite(row["grad_norm"]) or self._training.scaler.is_enabled()):
                raise _non_finite(row, record, self._epoch)
            row |= zip(("lr_transformer", "lr_backbone"), record.learning_rates, strict=True)
            self._means.add(row)
            self._show({"step": record.step, **row, "images_per_second": images_per_second})
        self._unread, self._last_read = [], now

    def means(self) -> dict[str, float]:
        """Return the means over the steps read so far, and ``images_per_second`` since the epoch started."""
        return {**self._means.values(), "images_per_second": self.images * workers() / (time.perf_counter() - self._started)}


class Means:
    """Running means of named numbers. Numbers that are not finite are left out."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, numbers: dict[str, float]) -> None:
        """Add a number to the mean of each name.

        Args:
            numbers: The numbers by name. Those that are not finite are left out.
        """
        for name, number in numbers.items():
            finite = math.isfinite(number)
            self._sums[name] = self._sums.get(name, 0.0) + (number if finite else 0.0)
            self._counts[name] = self._counts.get(name, 0) + finite

    def values(self) -> dict[str, float]:
        """Return the means by name; NaN for a name without a finite number."""
        return {name: value / self._counts[name] if self._counts[name] else math.nan for name, value in self._sums.items()}


def _boxes_and_labels(target: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    names = ("boxes", "labels", "masks", "has_mask")
    return {name: target[name].to(device, non_blocking=True) for name in names if name in target}


def _forward(network: Callable[..., Any], images: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype) -> Any:
    images = images.to(device, non_blocking=True)
    mask = None if mask is None else mask.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = normalize(images, mask)
    # A graph must not use weights that were converted outside of it.
    cached = not isinstance(network, GraphedNetwork)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cached):
        return network(images, mask)


def _losses(
    criterion: Criterion, outputs: dict[str, Any], targets: list[dict], normalizers: Any, pairs: Matching | None
) -> dict[str, Tensor]:
    try:
        losses = criterion(outputs, targets, normalizers, pairs)
    except NonFiniteCost:
        # The other workers wait for this one in the backward pass. All of them stop together when they read the losses.
        predictions = [outputs[name].sum() for name in ("pred_logits", "pred_boxes", "pred_masks") if name in outputs]
        broken: Tensor = torch.stack(predictions).sum() * math.nan
        return dict.fromkeys(loss_names(criterion), broken)
    return {**losses, "loss": criterion.weighted_sum(losses)}


def _mean_over_workers(values: Tensor) -> Tensor:
    if workers() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / workers()


def _non_finite(row: dict[str, float], record: StepRecord, epoch: int) -> UserError:
    what = "loss" if not math.isfinite(row["loss"]) else "grad_norm"
    # All workers share the gradient; a loss is that of one worker.
    mine = record.image_ids if what == "grad_norm" or not torch.isfinite(record.losses[0]) else []
    ids = sorted(set(itertools.chain.from_iterable(gathered(mine))))
    name = "loss" if what == "loss" else "gradient"
    return UserError(
        f"the {name} became {row[what]} in epoch {epoch}, step {record.step}, on the images {shortlist(ids, MOST_IDS)}; "
        "look at their boxes, lower optim.lr, or use speed.precision fp32"
    )


class Detections(NamedTuple):
    """The detections of a network in N images, one for each of its Q object queries."""

    image_ids: np.ndarray  # int64 [N], ascending, each once
    boxes_xywh: np.ndarray  # float32 [N, Q, 4], pixels of the original image
    scores: np.ndarray  # float32 [N, Q]
    labels: np.ndarray  # int64 [N, Q], 0..K-1
    rles: list[list[RLE | None]] | None = None  # [N][Q] masks of the original images, None where a detection cannot count; with masks only

    def results(self, categories: list[dict]) -> list[dict]:
        """Return them as COCO results: a list of dicts with ``image_id``, ``category_id``, ``bbox`` (xywh, pixels) and ``score``, and with
        ``segmentation`` (RLE) where there is a mask.

        Args:
            categories: Dicts with ``id``, in label order.
        """
        ids = np.array([category["id"] for category in categories])[self.labels]
        rles = self.rles or [[None] * self.scores.shape[1]] * len(self.image_ids)
        rows = zip(self.image_ids.tolist(), ids.tolist(), self.boxes_xywh.tolist(), self.scores.tolist(), rles, strict=True)
        return [
            {"image_id": image_id, "category_id": category, "bbox": box_xywh, "score": score} | ({"segmentation": rle} if rle else {})
            for image_id, *per_query in rows
            for category, box_xywh, score, rle in zip(*per_query, strict=True)
        ]


@torch.no_grad()
def evaluate(
    model: nn.Module, criterion: Criterion, loader: Iterable[Batch], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], Detections]:
    """Compute the losses and detections of a whole data set.

    Masks are computed if the criterion has losses of masks: of the matched queries for these, and of the detections that can count.

    Args:
        model: The network itself, not wrapped in DistributedDataParallel, because workers may have different numbers of batches.
        criterion: Computes the losses.
        loader: This worker's batches. An image should be in the batches of one worker only.
        device: Where ``model`` is.
        dtype: Dtype of the forward pass.

    Returns:
        The losses by name (``loss`` is the weighted sum, the others are not weighted) and the detections in the images of all workers.
        Every worker gets the same.

    Raises:
        UserError: On every worker, if the network's outputs are not finite or the data set is empty.
    """
    model.eval()
    names: tuple[str, ...] = ()
    sums, found, broken = [], [], []
    rles: dict[int, list[RLE | None]] = {}  # by image id
    for images, mask, targets in sent_ahead(loader, device):
        outputs, masks_of = network_outputs(model, criterion, images, mask, device, dtype)
        image_ids = [int(target["image_id"]) for target in targets]
        try:
            on_device = [_boxes_and_labels(target, device) for target in targets]
            pairs = criterion.match(outputs, on_device)
            if masks_of:
                outputs["pred_masks"] = masks_of.logits(pairs.image, pairs.query[-1])
            names, values = zip(*criterion.sums(outputs, on_device, pairs).items(), strict=True)
        except NonFiniteCost:
            broken += image_ids
            continue
        sums.append(torch.stack(values))
        per_image = postprocess(outputs, _sent(torch.stack([target["orig_size"] for target in targets]), device))
        boxes, scores, labels = (torch.stack([one[name] for one in per_image]) for name in ("boxes", "scores", "labels"))
        found.append((torch.tensor(image_ids), boxes, scores, labels))
        if masks_of:
            rles |= zip(image_ids, masks_of.detections(scores, labels, targets), strict=True)
    sums = torch.stack(sums).tolist() if sums else []
    columns = [torch.cat(column).cpu().numpy() for column in zip(*found, strict=True)]
    everyone = list(zip(*gathered((names, sums, columns, broken, rles)), strict=True))
    if any(everyone[3]):
        ids = shortlist(sorted(itertools.chain.from_iterable(everyone[3])), MOST_IDS)
        raise UserError(f"evaluation: the network's outputs are not finite on the images {ids}; use speed.precision fp32")
    detections = _combined_detections(everyone[2])
    if criterion.masks:
        rles = {image_id: of_image for of_worker in everyone[4] for image_id, of_image in of_worker.items()}
        detections = detections._replace(rles=[rles[image_id] for image_id in detections.image_ids.tolist()])
    return _combined_losses(criterion, everyone[0], everyone[1]), detections


class BatchMasks(NamedTuple):
    """What computes masks of a batch in evaluation, in chunks."""

    predict: Callable[..., Tensor]
    features: MaskFeatures
    padded_size: tuple[int, int]

    def logits(self, image: Tensor, query: Tensor) -> Tensor:
        """Return the mask logits of queries in images of the batch."""
        return logits_in_chunks(self.predict, self.features, image, query, self.padded_size)

    def detections(self, scores: Tensor, labels: Tensor, targets: list[dict[str, Tensor]]) -> list[list[RLE | None]]:
        """Return for each image the mask of every query whose detection can count, and None for the others."""
        chosen = counted_queries(scores, labels, MOST_DETECTIONS)
        inside, original = (torch.stack([target[name] for target in targets]) for name in ("size", "orig_size"))
        found = detected_masks(self.predict, self.features, chosen, self.padded_size, inside, original)
        by_query = [dict(zip(queries, rles, strict=True)) for queries, rles in zip(chosen, found, strict=True)]
        return [[of_image.get(query) for query in range(scores.shape[1])] for of_image in by_query]


def network_outputs(
    model: nn.Module, criterion: Criterion, images: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], BatchMasks | None]:
    """Compute the outputs of a batch for evaluation.

    Args:
        model: The network itself, not wrapped in DistributedDataParallel, in evaluation mode.
        criterion: Says whether masks are wanted.
        images: Images of :func:`raydetr.data.loader.collate`.
        mask: Their padding mask, or None.
        device: Where ``model`` is.
        dtype: Dtype of the forward pass.

    Returns:
        The outputs without masks, and what computes these; None if the criterion has no losses of masks.
    """
    if not criterion.masks:
        return _forward(box_network(model), images, mask, device, dtype), None
    network = cast(DETR, model)
    outputs, features = _forward(network.forward_features, images, mask, device, dtype)

    def predict(*which: Any) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return network.predict_masks(*which)

    return outputs, BatchMasks(predict, features, (images.shape[-2], images.shape[-1]))


def box_network(model: nn.Module) -> Callable[..., dict[str, Any]]:
    """Return what computes the outputs of a network without masks: the network itself unless it has masks."""
    return model.forward_boxes if isinstance(model, DETR) and model.settings["masks"] else model


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host does not wait for the copy.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _combined_losses(criterion: Criterion, names_of_workers: Sequence[tuple], sums_of_workers: Sequence[list]) -> dict[str, float]:
    names: tuple[str, ...] = next((names for names in names_of_workers if names), ())
    # fsum is exact, so that neither the order of the batches nor the number of workers changes the result.
    totals = [math.fsum(column) for column in zip(*itertools.chain.from_iterable(sums_of_workers), strict=True)]
    if not totals:
        raise UserError("the validation set has no image")
    losses = criterion.means(dict(zip(names, totals, strict=True)))
    return {"loss": criterion.weighted_sum(losses), **losses}


def _combined_detections(columns_of_workers: Sequence[list[np.ndarray]]) -> Detections:
    columns = zip(*filter(None, columns_of_workers), strict=True)
    image_ids, boxes_xyxy, scores, labels = (np.concatenate(column) for column in columns)
    image_ids, first = np.unique(image_ids, return_index=True)
    low, high = np.split(boxes_xyxy[first], 2, axis=-1)
    return Detections(image_ids, np.concatenate([low, high - low], axis=-1), scores[first], labels[first])


def workers() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(mine: Any) -> list[Any]:
    """Gather one object from every worker. All workers must call this together.

    Args:
        mine: The object of this worker; it must be picklable.

    Returns:
        The objects of all workers, in order of their rank.
    """
    if workers() == 1:
        return [mine]
    everyone: list[Any] = [None] * workers()
    dist.all_gather_object(everyone, mine)
    return everyone
