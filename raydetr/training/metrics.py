"""The metrics that a run reports after every epoch, by name.

This module does not import torch, so that the report of a search starts quickly.
"""

from collections.abc import Mapping

from raydetr.evaluate.coco import METRICS

# Unweighted terms of the loss, and what the official DETR logs beside them; "loss" is their weighted sum.
LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
MASK_LOSSES = ("loss_mask", "loss_dice")  # with model.masks only
MASK_METRICS = {f"segm_{name}": name for name in METRICS}  # the twelve numbers of masks, with model.masks only, and those of boxes
REPORTED = (
    *METRICS,
    "AP_low",  # the ends of its 95 % interval over the validation images
    "AP_high",
    *MASK_METRICS,
    *(f"train_{name}" for name in (*LOSSES, *MASK_LOSSES, "grad_norm")),
    *(f"val_{name}" for name in (*LOSSES, *MASK_LOSSES)),
    "best_AP",
    "best_epoch",
    "images_per_second",
    "seconds",
)
LATENCY = "latency"  # seconds of one image through the evaluated model, where a search asks for it; known after the last epoch
LAST_EPOCH = "last_epoch"  # True in the report of the last epoch, also where optim.patience ends the run
WHERE = ("node", "cards")  # of a trial: the Ray node that it ran on last, and its GPUs there


def losses_in(numbers: Mapping[str, float]) -> tuple[str, ...]:
    """Return those of ``LOSSES`` and ``MASK_LOSSES`` that ``numbers`` has: without masks there are no losses of them."""
    return tuple(name for name in (*LOSSES, *MASK_LOSSES) if name in numbers)
