"""DETR's losses (Carion et al. 2020, section 3.1), computed for all decoder layers at once.

They follow ``SetCriterion`` in ``models/detr.py`` of the official DETR.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from raydetr.config import SETTINGS, Loss, Matcher, Model, find_setting, load_config
from raydetr.loss.boxes import generalized_iou
from raydetr.loss.masks import mask_numerators, matched_masks
from raydetr.loss.matcher import Matching, match

Targets = list[dict[str, Tensor]]
Number = TypeVar("Number", float, Tensor)


@dataclasses.dataclass(frozen=True)
class Normalizers:
    """The divisors of the losses of one optimizer step; they depend on the targets only and are known before the forward pass.

    Attributes:
        num_boxes: True boxes of the step, averaged over the workers, at least 1.
        class_weight: Sum of the classification loss's weights over this worker's queries.
        matched: True boxes of this worker that are matched with a query.
        images: Images of this worker.

    All of them are averages over the workers where the losses are to be those of one worker with all images.
    """

    num_boxes: float | Tensor
    class_weight: float | Tensor
    matched: float | Tensor
    images: float | Tensor

    def divisor(self, loss: str) -> float | Tensor:
        """Return the divisor of ``loss``, a loss's name without the suffix of a decoder layer."""
        return {"loss_ce": self.class_weight, "cardinality_error": self.images}.get(loss, self.num_boxes)


class Criterion(nn.Module):
    """Match queries with true boxes and compute the losses.

    The criterion has no parameters and no buffers and computes on the outputs' device: in float32, under autocast as well, or in
    float64 for float64 outputs. Targets are a list of dicts, one for each image, with ``labels`` int64 [n] from 0 to K - 1 and
    ``boxes`` float [n, 4] (cxcywh, relative to the image); n may be 0. If the network has masks, they also have ``masks`` bool
    [n, height, width], and may have ``has_mask`` bool [n], False for boxes that count nothing in the losses of masks.

    Args:
        num_classes: Number of classes K, without no-object.
        loss: Weights of the losses, already checked; :func:`build_criterion` makes them from keyword arguments.
        matcher: Weights of the matching cost.
        model: Settings of the network: with ``aux_loss``, the losses of all its decoder layers count, otherwise only the last one's;
            with ``masks``, those of the last layer's masks.

    Attributes:
        masks: Whether there are losses of masks.
        weight_dict: Weight of each loss by its name, with the suffixes ``_0``, ``_1``, ... of the auxiliary layers.
    """

    def __init__(self, num_classes: int, loss: Loss, matcher: Matcher, model: Model):
        super().__init__()
        self.num_classes = num_classes
        self.eos_coef = loss.eos_coef
        self.masks = model.masks
        self.costs = (matcher.set_cost_class, matcher.set_cost_bbox, matcher.set_cost_giou)
        weights = {"loss_ce": loss.cls_loss_coef, "loss_bbox": loss.bbox_loss_coef, "loss_giou": loss.giou_loss_coef}
        layers = range(model.dec_layers - 1 if model.aux_loss else 0)
        of_masks = {"loss_mask": loss.mask_loss_coef, "loss_dice": loss.dice_loss_coef} if model.masks else {}
        earlier = {f"{name}_{i}": weight for i in layers for name, weight in weights.items()}
        self.weight_dict: dict[str, float] = {**weights, **of_masks, **earlier}

    def forward(
        self, outputs: dict[str, Any], targets: Targets, normalizers: Normalizers | None = None, pairs: Matching | None = None
    ) -> dict[str, Tensor]:
        """Compute the unweighted losses under their official names.

        Args:
            outputs: Outputs of :class:`raydetr.model.detr.DETR`.
            targets: True boxes of each image.
            normalizers: Divisors of the losses. If several micro-batches make one optimizer step, pass :meth:`normalizers` of all of
                them: the losses then add up to those of the one big batch. By default they are those of ``targets``, and all workers
                must call this method together.
            pairs: The result of :meth:`match`, if it is known already.

        Returns:
            Scalars: ``loss_ce``, ``loss_bbox``, ``loss_giou``, and ``cardinality_error`` of the last decoder layer and, with the suffixes
            ``_0``, ``_1``, ..., of the earlier ones; ``class_error`` (per cent) of the last layer; with masks ``loss_mask`` and
            ``loss_dice`` of the last layer.

        Raises:
            NonFiniteCost: The outputs are not finite.
        """
        if normalizers is None:
            normalizers = self.normalizers([targets], outputs["pred_logits"].shape[1])
        numerators, wrong = self._numerators(outputs, targets, pairs or self.match(outputs, targets))
        losses = _by_layer({name: each / normalizers.divisor(name) for name, each in numerators.items()})
        return {**losses, "class_error": 100 * _class_error(wrong, len(targets), normalizers)}

    @torch.no_grad()
    def match(self, outputs: dict[str, Any], targets: Targets) -> Matching:
        """Match queries with true boxes, in every decoder layer.

        Args:
            outputs: Outputs of :class:`raydetr.model.detr.DETR`; masks are not needed.
            targets: True boxes of each image.

        Raises:
            NonFiniteCost: The outputs are not finite.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            return match(*_stacked(outputs), targets, self.costs)

    def weighted_sum(self, losses: Mapping[str, Number]) -> Number:
        """Return the scalar that training minimizes: the weighted sum of the losses that have a weight."""
        weighted = [losses[name] * weight for name, weight in self.weight_dict.items() if name in losses]
        return sum(weighted[1:], weighted[0])

    def normalizers(self, batches: list[Targets], num_queries: int, as_one: bool = False) -> Normalizers:
        """Return the divisors of the losses of one optimizer step.

        Workers average their number of boxes, so all of them must call this method together.

        Args:
            batches: Targets of all micro-batches of the step.
            num_queries: Number of object queries.
            as_one: Whether the mean of the workers' losses is to be what one worker computes from the images of all. Otherwise the
                classification loss and the class error are means over each worker's own queries, as in the official code.
        """
        boxes, class_weight, matched, images = self._count(batches, num_queries)
        if as_one and dist.is_available() and dist.is_initialized():
            return _shared_normalizers((boxes, class_weight, matched, images))
        return Normalizers(_averaged_over_workers(boxes), class_weight or 1.0, matched, images)

    @torch.no_grad()
    def sums(self, outputs: dict[str, Any], targets: Targets, pairs: Matching | None = None) -> dict[str, Tensor]:
        """Compute the sums of a batch for evaluation, to be added up over batches and workers and divided by :meth:`means`.

        Nothing is communicated, and nothing but the matching waits for the device.

        Args:
            outputs: Outputs of :class:`raydetr.model.detr.DETR`.
            targets: True boxes of each image.
            pairs: The result of :meth:`match`, if it is known already.

        Returns:
            Float64 scalars: the numerators of ``loss_ce``, ``loss_bbox``, and ``loss_giou`` (and those with a layer's suffix), of
            ``loss_mask`` and ``loss_dice`` with masks,
            ``num_boxes``, ``class_weight``, ``matched``, ``correct`` (matched with the right class), ``cardinality`` (sum of the absolute
            differences), and ``images``.

        Raises:
            NonFiniteCost: The outputs are not finite.
        """
        numerators, wrong = self._numerators(outputs, targets, pairs or self.match(outputs, targets))
        cardinality = numerators.pop("cardinality_error")[-1]
        counts = torch.tensor(self._count([targets], outputs["pred_logits"].shape[1]), dtype=torch.float64)
        boxes, class_weight, matched, images = counts.to(wrong.device, non_blocking=True).unbind()
        return {
            **{name: each.double() for name, each in _by_layer(numerators).items()},
            "correct": matched - wrong.double(),
            "cardinality": cardinality.double(),
            **{"num_boxes": boxes, "class_weight": class_weight, "matched": matched, "images": images},
        }

    def means(self, sums: Mapping[str, float | Tensor]) -> dict[str, float]:
        """Return the losses that sums amount to; they do not depend on how the images were spread over batches and workers.

        Args:
            sums: Sums of :meth:`sums`, added up.
        """
        total = {name: float(value) for name, value in sums.items()}
        matched = total["matched"]
        whole = Normalizers(max(total["num_boxes"], 1.0), total["class_weight"] or 1.0, int(matched), int(total["images"]))
        losses = {name: value / float(whole.divisor(_without_suffix(name))) for name, value in total.items() if name.startswith("loss_")}
        losses["class_error"] = 100 * (1 - total["correct"] / matched) if matched else 100.0
        losses["cardinality_error"] = total["cardinality"] / max(int(total["images"]), 1)
        return losses

    def _count(self, batches: list[Targets], num_queries: int) -> tuple[int, float, int, int]:
        # True boxes, sum of the classification loss's weights, matched boxes, images.
        counts = [len(target["labels"]) for targets in batches for target in targets]
        matched = sum(min(count, num_queries) for count in counts)
        return sum(counts), matched + self.eos_coef * (len(counts) * num_queries - matched), matched, len(counts)

    def _numerators(self, outputs: dict[str, Any], targets: Targets, pairs: Matching) -> tuple[dict[str, Tensor], Tensor]:
        """Return the sums over images and queries, [layers] by the name of their loss, the last decoder layer last, and the number of
        matched queries of the last layer with the wrong class (a scalar).
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            logits, boxes_cxcywh = _stacked(outputs)
            dtype = logits.dtype
            labels = torch.cat([target["labels"] for target in targets])[pairs.target]
            true_cxcywh = torch.cat([target["boxes"].to(dtype) for target in targets])[pairs.target]
            layer = torch.arange(len(logits), device=logits.device)[:, None]
            matched_cxcywh = boxes_cxcywh[layer, pairs.image, pairs.query]

            classes = torch.full(logits.shape[:-1], self.num_classes, dtype=torch.int64, device=logits.device)
            classes[layer, pairs.image, pairs.query] = labels
            entropy = F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none")
            weight = torch.where(classes == self.num_classes, self.eos_coef, 1.0)
            giou = generalized_iou(box_convert(matched_cxcywh, "cxcywh", "xyxy"), box_convert(true_cxcywh, "cxcywh", "xyxy"))
            best = logits.detach().argmax(-1)
            predicted = (best != self.num_classes).sum(-1)
            numerators = {
                "loss_ce": (entropy * weight).sum((1, 2)),
                "loss_bbox": (matched_cxcywh - true_cxcywh).abs().sum((1, 2)),
                "loss_giou": (1 - giou).sum(1),
                "cardinality_error": (predicted - pairs.boxes).abs().sum(1).to(dtype),
            }
            if self.masks:
                numerators |= _mask_numerators(outputs["pred_masks"], targets, pairs)
            wrong = (best[-1, pairs.image, pairs.query[-1]] != labels[-1]).sum().to(dtype)
        return numerators, wrong


def _stacked(outputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the logits and boxes of all decoder layers, the last one last, in float32 or float64."""
    layers = [*outputs.get("aux_outputs", []), outputs]
    dtype = torch.promote_types(outputs["pred_logits"].dtype, torch.float32)
    logits, boxes_cxcywh = (torch.stack([layer[name] for layer in layers]).to(dtype) for name in ("pred_logits", "pred_boxes"))
    return logits, boxes_cxcywh


def _mask_numerators(pred_masks: Tensor, targets: Targets, pairs: Matching) -> dict[str, Tensor]:
    """Return the sums of the mask losses, [1] by name, from the masks of all queries [B, Q, h, w] or of the matched ones [M, h, w]."""
    target = pairs.target[-1]
    logits = pred_masks[pairs.image, pairs.query[-1]] if pred_masks.dim() == 4 else pred_masks
    has_mask = [each.get("has_mask", torch.ones_like(each["labels"], dtype=torch.bool)) for each in targets]
    true = matched_masks([each["masks"] for each in targets], target)
    return {name: each[None] for name, each in mask_numerators(logits, true, torch.cat(has_mask)[target]).items()}


def _by_layer(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    # [layers] under one name become scalars: the last layer's under the name, the earlier ones' with their number as a suffix.
    last = {name: values[-1] for name, values in losses.items()}
    earlier = {f"{name}_{i}": value for name, values in losses.items() for i, value in enumerate(values[:-1].unbind())}
    return {**last, **earlier}


def _class_error(wrong: Tensor, images: int, normalizers: Normalizers) -> Tensor:
    # Where no box is matched the class error is 1, as in the official code; micro-batches share it by their images.
    matched = normalizers.matched
    if isinstance(matched, Tensor):  # on the device, whose answer the host must not wait for
        return torch.where(matched > 0, wrong / matched.clamp(min=1e-6), images / normalizers.images)
    return wrong / matched if matched else torch.full_like(wrong, images / float(normalizers.images))


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return stem if suffix.isdigit() else name


def _shared_normalizers(counts: tuple[float, ...]) -> Normalizers:
    # float64, in which counts are exact: their sum does not depend on how the images are spread over the workers.
    totals = torch.stack([torch.full((), float(each), dtype=torch.float64, device=_reduced_on()) for each in counts])
    dist.all_reduce(totals)
    boxes, class_weight, matched, images = (totals / dist.get_world_size()).float().unbind()
    least = 1 / dist.get_world_size()
    return Normalizers(boxes.clamp(min=least), torch.where(class_weight > 0, class_weight, least), matched, images)


def _reduced_on() -> str:
    return "cuda" if "nccl" in dist.get_backend() else "cpu"  # NCCL reduces tensors on the GPU only


def _averaged_over_workers(boxes: int) -> float | Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return max(float(boxes), 1.0)
    # torch.full fills on the device, torch.tensor would copy and wait for it first.
    total = torch.full((), float(boxes), device=_reduced_on())
    dist.all_reduce(total)
    return (total / dist.get_world_size()).clamp(min=1)


def build_criterion(num_classes: int, **settings: Any) -> Criterion:
    """Build the losses of a DETR.

    Args:
        num_classes: Number of classes, without no-object.
        **settings: Settings of the sections ``loss`` and ``matcher`` by their last name, such as ``eos_coef=0.2``, and ``aux_loss``,
            ``dec_layers`` and ``masks`` of ``model``.

    Returns:
        The criterion.

    Raises:
        UserError: A setting is unknown or out of bounds.
    """
    config = load_config({_dotted(name): value for name, value in settings.items()})
    return Criterion(num_classes, config.loss, config.matcher, config.model)


def _dotted(leaf: str) -> str:
    sections = {"aux_loss": "model", "dec_layers": "model", "masks": "model"}
    section = sections.get(leaf) or next((each for each in ("loss", "matcher") if f"{each}.{leaf}" in SETTINGS), "loss")
    return find_setting(f"{section}.{leaf}").name
