"""How fast what learns: the optimizer's two groups, the learning rates' way through the run, the moving average of the weights."""

import copy
import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from raydetr.config import Optim

GROUPS = ("transformer", "backbone")


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW, fused, with the groups ``transformer`` (rate ``lr``) and ``backbone`` (``lr_backbone``).

    ``freeze_backbone`` or a rate of 0 for the backbone takes it out of the training altogether (as the official ``main.py``).
    """
    if optim.freeze_backbone or optim.lr_backbone == 0:
        model.backbone.requires_grad_(False)
    parameters = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameters["backbone" if name.startswith("backbone.") else "transformer"].append(parameter)
    rates = {"transformer": optim.lr, "backbone": optim.lr_backbone}
    groups = [{"params": parameters[name], "lr": rates[name], "name": name} for name in GROUPS]
    return torch.optim.AdamW(groups, weight_decay=optim.weight_decay, fused=True)


def build_scheduler(optimizer: torch.optim.Optimizer, optim: Optim, steps_per_epoch: int, done: int = 0) -> LambdaLR:
    """The schedule of ``optim``, to be stepped after every optimizer step; it stands after ``done`` steps already taken."""
    for group in optimizer.param_groups:
        group["initial_lr"] = optim.lr if group["name"] == "transformer" else optim.lr_backbone
    return LambdaLR(optimizer, lambda step: lr_factor(optim, step, steps_per_epoch), last_epoch=done - 1)


def lr_factor(optim: Optim, step: int, steps_per_epoch: int) -> float:
    """What the learning rates are multiplied by in step ``step`` (from 0) of the run.

    ``step`` divides by 10 after every ``lr_drop`` (the official ``StepLR``; 0: never), ``cosine`` goes to 0 at the end of the
    run, ``constant`` stays. Before it the rates rise linearly during ``warmup``. Both lengths are fractions of the run below
    1, else epochs.
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
    """An exponential moving average of a model's trained weights, itself a model: ``module``.

    The decay rises to its full value as (1 + n) / (10 + n) over the first n updates, so that a short run does not end with its
    starting weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.module.parameters(), model.parameters(), strict=True)
        self._averages, self._weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights as they are now; the device is not waited for."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self._averages), list(self._weights), None)
        self.updates += 1
