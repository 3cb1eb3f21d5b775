"""DETR's losses (Carion et al. 2020, section 3.1), of all decoder layers in one batched computation."""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from raydetr.config import SETTINGS, find_setting, load_config
from raydetr.loss.boxes import generalized_iou
from raydetr.loss.matcher import match

Targets = list[dict[str, Tensor]]


@dataclasses.dataclass(frozen=True)
class Normalizers:
    """What the sums over a step's images are divided by; known before the forward pass."""

    num_boxes: float | Tensor  # true boxes of the step, averaged over the workers, at least 1
    class_weight: float  # sum of the classification loss's weights over this worker's queries
    matched: int  # true boxes of this worker that get a query
    images: int  # images of this worker

    def divisor(self, loss: str) -> float | Tensor:
        """What the numerator of ``loss`` (its name without a layer's suffix) is divided by."""
        return {"loss_ce": self.class_weight, "cardinality_error": self.images}.get(loss, self.num_boxes)


class Criterion(nn.Module):
    """Matches queries with true boxes and computes the losses. Build it with :func:`build_criterion`.

    It has no parameters and no buffers, and computes on the outputs' device, in float32 under autocast as well (of float64 outputs
    in float64). Targets are a list of dicts, one per image, with ``labels`` int64 [n] in 0..K-1 and ``boxes`` [n, 4] (cxcywh,
    relative to the image); n may be 0.
    """

    def __init__(self, num_classes: int, eos_coef: float, costs: tuple[float, float, float], weight_dict: dict[str, float]):
        super().__init__()
        self.num_classes = num_classes
        self.eos_coef = eos_coef
        self.costs = costs
        self.weight_dict = weight_dict

    def forward(self, outputs: dict[str, Any], targets: Targets, normalizers: Normalizers | None = None) -> dict[str, Tensor]:
        """Unweighted losses under the official names, each a scalar.

        ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``cardinality_error`` of the last decoder layer and, with a suffix ``_0``, ``_1``,
        ..., of the earlier ones; ``class_error`` (per cent) of the last. Raises NonFiniteCost where the outputs are not finite.

        Without ``normalizers`` they are those of ``targets``, and all workers must call it together. For several micro-batches
        that make one step pass :meth:`normalizers` of all of them: the losses then add up to those of the one big batch.
        """
        if normalizers is None:
            normalizers = self.normalizers([targets], outputs["pred_logits"].shape[1])
        numerators, wrong = self._numerators(outputs, targets)
        losses = _by_layer({name: each / normalizers.divisor(name) for name, each in numerators.items()})
        # Where no box is matched the class error is 100, as in the official code; micro-batches share it by their images.
        share = wrong / normalizers.matched if normalizers.matched else torch.full_like(wrong, len(targets) / normalizers.images)
        return {**losses, "class_error": 100 * share}

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """The scalar that training minimizes: the losses that have a weight, weighted."""
        return sum(losses[name] * weight for name, weight in self.weight_dict.items() if name in losses)

    def normalizers(self, batches: list[Targets], num_queries: int) -> Normalizers:
        """Of all micro-batches of one step. Workers average their number of boxes: all of them must call it together."""
        boxes, class_weight, matched, images = self._count(batches, num_queries)
        return Normalizers(_averaged_over_workers(boxes), class_weight or 1.0, matched, images)

    @torch.no_grad()
    def sums(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """For evaluation: local sums (float64 scalars, no communication) to add up over batches and workers; :meth:`means` divides.

        The numerators of ``loss_ce``, ``loss_bbox``, ``loss_giou`` and their copies with a layer's suffix, and ``num_boxes``,
        ``class_weight``, ``matched``, ``correct`` (matched with the right class), ``cardinality`` (sum of the absolute differences)
        and ``images``.
        """
        boxes, class_weight, matched, images = self._count([targets], outputs["pred_logits"].shape[1])
        numerators, wrong = self._numerators(outputs, targets)
        cardinality = numerators.pop("cardinality_error")[-1]
        counts = {"num_boxes": boxes, "class_weight": class_weight, "matched": matched, "images": images}
        sums = {name: wrong.new_full((), value, dtype=torch.float64) for name, value in counts.items()}
        return {
            **{name: each.double() for name, each in _by_layer(numerators).items()},
            "correct": matched - wrong.double(),
            "cardinality": cardinality.double(),
            **sums,
        }

    def means(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """The losses that sums (of :meth:`sums`, added up) amount to; the same however the images were spread over batches."""
        total = {name: float(value) for name, value in sums.items()}
        matched = total["matched"]
        whole = Normalizers(max(total["num_boxes"], 1.0), total["class_weight"] or 1.0, int(matched), int(total["images"]))
        losses = {name: value / whole.divisor(_without_suffix(name)) for name, value in total.items() if name.startswith("loss_")}
        losses["class_error"] = 100 * (1 - total["correct"] / matched) if matched else 100.0
        losses["cardinality_error"] = total["cardinality"] / max(whole.images, 1)
        return losses

    def _count(self, batches: list[Targets], num_queries: int) -> tuple[int, float, int, int]:
        """True boxes, the classification loss's weight, matched boxes, images."""
        counts = [len(target["labels"]) for targets in batches for target in targets]
        matched = sum(min(count, num_queries) for count in counts)
        return sum(counts), matched + self.eos_coef * (len(counts) * num_queries - matched), matched, len(counts)

    def _numerators(self, outputs: dict[str, Any], targets: Targets) -> tuple[dict[str, Tensor], Tensor]:
        """Sums over images and queries [layers] by the name of their loss, and how many matched queries of the last layer
        have the wrong class (a scalar). The last entry of [layers] is the last decoder layer.
        """
        layers = [*outputs.get("aux_outputs", []), outputs]
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            dtype = torch.promote_types(outputs["pred_logits"].dtype, torch.float32)
            logits = torch.stack([layer["pred_logits"] for layer in layers]).to(dtype)
            boxes_cxcywh = torch.stack([layer["pred_boxes"] for layer in layers]).to(dtype)
            pairs = match(logits.detach(), boxes_cxcywh.detach(), targets, self.costs)
            labels = torch.cat([target["labels"] for target in targets])[pairs.target]
            true_cxcywh = torch.cat([target["boxes"].to(dtype) for target in targets])[pairs.target]
            layer = torch.arange(len(layers), device=logits.device)[:, None]
            matched_cxcywh = boxes_cxcywh[layer, pairs.image, pairs.query]

            classes = torch.full(logits.shape[:-1], self.num_classes, dtype=torch.int64, device=logits.device)
            classes[layer, pairs.image, pairs.query] = labels
            entropy = F.cross_entropy(logits.movedim(-1, 1), classes, reduction="none")
            weight = torch.where(classes == self.num_classes, self.eos_coef, 1.0)
            giou = generalized_iou(box_convert(matched_cxcywh, "cxcywh", "xyxy"), box_convert(true_cxcywh, "cxcywh", "xyxy"))
            best = logits.detach().argmax(-1)
            counts = torch.tensor([len(target["labels"]) for target in targets], device=logits.device)
            predicted = (best != self.num_classes).sum(-1)
            numerators = {
                "loss_ce": (entropy * weight).sum((1, 2)),
                "loss_bbox": (matched_cxcywh - true_cxcywh).abs().sum((1, 2)),
                "loss_giou": (1 - giou).sum(1),
                "cardinality_error": (predicted - counts).abs().sum(1).to(dtype),
            }
            wrong = (best[-1, pairs.image, pairs.query[-1]] != labels[-1]).sum().to(dtype)
        return numerators, wrong


def _by_layer(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """[layers] under one name to scalars, the earlier layers' with their number as a suffix."""
    last = {name: values[-1] for name, values in losses.items()}
    earlier = {f"{name}_{i}": value for name, values in losses.items() for i, value in enumerate(values[:-1].unbind())}
    return {**last, **earlier}


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return stem if suffix.isdigit() else name


def _averaged_over_workers(boxes: int) -> float | Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return max(float(boxes), 1.0)
    # NCCL can only reduce what lies on the GPU; nobody waits for the result on the host.
    device = "cuda" if "nccl" in dist.get_backend() else "cpu"
    total = torch.tensor(float(boxes), device=device)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).clamp(min=1)


def build_criterion(num_classes: int, **settings: Any) -> Criterion:
    """The losses of a DETR with that many classes (no-object not counted).

    ``settings`` are the leaf names of the sections ``loss`` and ``matcher`` (``eos_coef=0.2``), and ``aux_loss`` and ``dec_layers``
    of ``model``. Raises UserError for an unknown name or a value out of bounds.
    """
    config = load_config({_dotted(name): value for name, value in settings.items()})
    loss, matcher = config.loss, config.matcher
    weights = {"loss_ce": loss.cls_loss_coef, "loss_bbox": loss.bbox_loss_coef, "loss_giou": loss.giou_loss_coef}
    auxiliary = range(config.model.dec_layers - 1 if config.model.aux_loss else 0)
    weight_dict = {**weights, **{f"{name}_{i}": weight for i in auxiliary for name, weight in weights.items()}}
    costs = (matcher.set_cost_class, matcher.set_cost_bbox, matcher.set_cost_giou)
    return Criterion(num_classes, loss.eos_coef, costs, weight_dict)


def _dotted(leaf: str) -> str:
    sections = {"aux_loss": "model", "dec_layers": "model"}
    section = sections.get(leaf) or next((each for each in ("loss", "matcher") if f"{each}.{leaf}" in SETTINGS), "loss")
    return find_setting(f"{section}.{leaf}").name
