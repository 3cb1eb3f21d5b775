"""The optimizer with its two parameter groups, the learning-rate schedules, and the moving average of the weights."""

import copy
import dataclasses
import math
import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raydetr.config import Optim
from raydetr.errors import UserError
from raydetr.model.detr import MASK_PARTS

GROUPS = ("transformer", "backbone")
LAYER = re.compile(r"(?:backbone\.0\.body\.layers?\.?(\d)|transformer\.(encoder|decoder)\.layers\.(\d+))\.")
USUAL_BATCH = 16  # images of an optimizer step for which the learning rates are meant where optim.scale_lr scales them


def scaled_rates(optim: Optim, images: int) -> Optim:
    """Return ``optim`` with its learning rates scaled as ``scale_lr`` says.

    Args:
        optim: The ``optim`` section of the settings.
        images: Images of one optimizer step over all workers.
    """
    factor = {"none": 1.0, "linear": images / USUAL_BATCH, "sqrt": math.sqrt(images / USUAL_BATCH)}[optim.scale_lr]
    return dataclasses.replace(optim, lr=factor * optim.lr, lr_backbone=factor * optim.lr_backbone)


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Return a fused AdamW with the groups ``transformer`` (learning rate ``lr``) and ``backbone`` (``lr_backbone``).

    With ``layer_decay`` below 1, further groups of the same two names follow, one for each layer that has a smaller rate.

    Args:
        model: The DETR. Its backbone is frozen, as in the official ``main.py``, if ``freeze_backbone`` is set or ``lr_backbone`` is 0,
            everything but its segmentation head if ``freeze_detr`` is set, and the first ``freeze_layers`` layers.
        optim: The ``optim`` section of the settings.

    Raises:
        UserError: ``freeze_layers`` is more than the layers before the decoder.
    """
    layers = sorted({layer for name, each in model.named_parameters() if each.requires_grad and (layer := _layer_of(name))})
    if optim.freeze_backbone or optim.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    if optim.freeze_detr:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(MASK_PARTS))
    _freeze_layers(model, layers, optim.freeze_layers)
    scales = _layer_scales(layers, optim.layer_decay)
    parameters: dict[tuple[str, float], list[nn.Parameter]] = {(name, 1.0): [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = "backbone" if name.startswith("backbone.") else "transformer"
            parameters.setdefault((group, scales.get(_layer_of(name), 1.0)), []).append(parameter)
    rates = {"transformer": optim.lr, "backbone": optim.lr_backbone}
    groups = [{"params": each, "lr": scale * rates[name], "name": name, "scale": scale} for (name, scale), each in parameters.items()]
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)


def _layer_of(name: str) -> tuple[int, int] | None:
    """Return the layer that a parameter is in, sortable from the image to the boxes; None for projections, heads and queries."""
    found = LAYER.match(name)
    if not found:
        return None
    stage, kind, number = found.groups()
    return (0, int(stage)) if stage else (1 + ("encoder", "decoder").index(kind), int(number))


def _freeze_layers(model: nn.Module, layers: list[tuple[int, int]], number: int) -> None:
    before = [layer for layer in layers if layer < (2, 0)]
    if number > len(before):
        raise UserError(f"optim.freeze_layers: {number} is more than the {len(before)} layers of backbone and encoder")
    for name, parameter in model.named_parameters():
        if _layer_of(name) in before[:number]:
            parameter.requires_grad_(False)


def _layer_scales(layers: list[tuple[int, int]], decay: float) -> dict[tuple[int, int] | None, float]:
    """Return the learning rate of each layer relative to that of its group: heads, or the last stage of the backbone, have 1."""
    stages, others = [each for each in layers if each < (1, 0)], [each for each in layers if each >= (1, 0)]
    scales: dict[tuple[int, int] | None, float] = {layer: decay**above for above, layer in enumerate(reversed(stages))}
    return scales | {layer: decay**above for above, layer in enumerate(reversed(others), 1)}


def build_scheduler(optimizer: torch.optim.Optimizer, optim: Optim, steps_per_epoch: int, done: int = 0) -> LambdaLR:
    """Return the learning-rate schedule of ``optim``, which must be stepped after every optimizer step.

    Args:
        optimizer: The optimizer from :func:`build_optimizer`.
        optim: The ``optim`` section of the settings.
        steps_per_epoch: Number of optimizer steps in an epoch.
        done: Number of optimizer steps of the schedule that are already taken.
    """
    for group in optimizer.param_groups:
        # Checkpoints of earlier versions have no scale.
        group["initial_lr"] = group.get("scale", 1.0) * (optim.lr if group["name"] == "transformer" else optim.lr_backbone)
    return LambdaLR(optimizer, lambda step: lr_factor(optim, step, steps_per_epoch), last_epoch=done - 1)


def lr_factor(optim: Optim, step: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rates in an optimizer step.

    The schedule ``step`` divides by 10 after every ``lr_drop`` (the official ``StepLR``; 0 means never), ``cosine`` falls to 0 at the
    end of the run, and ``constant`` is 1. During ``warmup``, the factor also rises linearly to 1. Both lengths are fractions of the
    run if they are below 1, and epochs otherwise.

    Args:
        optim: The ``optim`` section of the settings.
        step: Number of the step in the run, from 0.
        steps_per_epoch: Optimizer steps in an epoch.
    """
    total = optim.epochs * steps_per_epoch
    warmup, drop = (round(each * (total if each < 1 else steps_per_epoch)) for each in (optim.warmup, optim.lr_drop))
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if optim.schedule == "cosine":
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / max(1, total - warmup))))
    if optim.schedule == "step" and drop:
        return rise * 0.1 ** (step // drop)
    return rise


class MovingAverage:
    """An exponential moving average of the trained weights of a model.

    After n updates the decay is the smaller of ``decay`` and (1 + n) / (10 + n), as in TensorFlow's ``ExponentialMovingAverage``, so
    that the average of a short run does not stay close to the initial weights.

    Args:
        model: The trained model.
        decay: Weight of the previous average in an update.

    Attributes:
        module: A copy of the model with the averaged weights, in eval mode.
        updates: Number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        self._averages, self._weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current weights. The host does not wait for the device."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self._averages), list(self._weights), None)
        self.updates += 1
