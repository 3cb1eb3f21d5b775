"""The metrics that a run reports after every epoch, by name.

This module does not import torch, so that the report of a search starts quickly.
"""

from raydetr.evaluate.coco import METRICS

# Unweighted terms of the loss, and what the official DETR logs beside them; "loss" is their weighted sum.
LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error")
REPORTED = (
    *METRICS,
    "AP_low",  # the ends of its 95 % interval over the validation images
    "AP_high",
    *(f"train_{name}" for name in (*LOSSES, "grad_norm")),
    *(f"val_{name}" for name in LOSSES),
    "best_AP",
    "best_epoch",
    "images_per_second",
    "seconds",
)
WHERE = ("node", "cards")  # of a trial: the Ray node that it ran on last, and its GPUs there
