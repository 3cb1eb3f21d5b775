"""DETR (Carion et al. 2020): backbone, transformer, and the heads that read class and box off every object query."""

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from raydetr.config import Model, load_config
from raydetr.errors import UserError
from raydetr.model.backbone import Backbone
from raydetr.model.position import LearnedPosition, SinePosition
from raydetr.model.transformer import Transformer


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """The network. Build it with :func:`build_model`; ``settings`` holds what it was built with."""

    def __init__(self, settings: Model, num_classes: int):
        super().__init__()
        width = settings.hidden_dim
        self.settings: dict[str, Any] = {"num_classes": num_classes, **_without_weights(settings)}
        self.aux_loss = settings.aux_loss
        # The order is the official one: it is the order of the parameters in the optimizer's state.
        self.transformer = Transformer(
            width, settings.nheads, settings.enc_layers, settings.dec_layers, settings.dim_feedforward, settings.dropout, settings.pre_norm
        )
        self.class_embed = nn.Linear(width, num_classes + 1)
        self.bbox_embed = MLP(width, width, 4, 3)
        self.query_embed = nn.Embedding(settings.num_queries, width)
        backbone = Backbone(settings.backbone, settings.dilation)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, 1)
        position = SinePosition(width) if settings.position_embedding == "sine" else LearnedPosition(width)
        self.backbone = nn.Sequential(backbone, position)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Classes and boxes of every object query.

        images float [B, 3, H, W], normalized; mask bool [B, H, W], True where padded, or None where nothing is. Returns in float32
        (float64 of a float64 network) ``pred_logits`` [B, Q, K + 1] (last: no object), ``pred_boxes`` [B, Q, 4] (cxcywh, relative
        to the unpadded image) and, with ``aux_loss``, ``aux_outputs``: a list of such dicts, one for each decoder layer but the last.
        """
        body, position = self.backbone
        features, mask = body(images, mask)
        source = self.input_proj(features).flatten(2).transpose(1, 2)
        padded = None if mask is None else mask.flatten(1)
        states = self.transformer(source, position(features, mask), padded, self.query_embed.weight, self.aux_loss)
        logits, boxes_cxcywh = self.class_embed(states), self.bbox_embed(states)
        # Under autocast the heads are the last to run in half precision.
        logits, boxes_cxcywh = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (logits, boxes_cxcywh))
        layers = [{"pred_logits": one, "pred_boxes": other} for one, other in zip(logits, boxes_cxcywh.sigmoid(), strict=True)]
        outputs: dict[str, Any] = layers[-1]
        return {**outputs, "aux_outputs": layers[:-1]} if self.aux_loss else outputs


def _without_weights(settings: Model) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "weights"}


def build_model(preset: str = "detr_resnet50", num_classes: int = 91, **model_settings: Any) -> DETR:
    """A DETR with random weights.

    ``num_classes`` counts the classes without no-object. ``model_settings`` are the leaf names of the settings' ``model``
    section (``num_queries=50``), laid over the preset. Raises UserError for an unknown name or a value out of bounds.
    """
    if "weights" in model_settings:
        raise UserError("model.weights: build_model starts from random weights; load a checkpoint with raydetr.load")
    if num_classes < 1:
        raise UserError(f"num_classes: {num_classes} is out of bounds; it takes 1 or more")
    settings = load_config({"model.preset": preset, **{f"model.{name}": value for name, value in model_settings.items()}}).model
    if settings.backbone == "tiny" and settings.dilation:
        raise UserError("model.dilation: the tiny backbone has no dilated stage; its stride is 16 as it is")
    return DETR(settings, num_classes)


def postprocess(outputs: dict[str, Any], sizes: Tensor) -> list[dict[str, Tensor]]:
    """Detections of each image: the best class that is an object, its probability, and the box in pixels.

    outputs as from :class:`DETR`; sizes [B, 2], (height, width) of the original images in pixels. Returns for each image
    ``scores`` [Q], ``labels`` int64 [Q] and ``boxes`` [Q, 4], xyxy (the official ``PostProcess``).
    """
    scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
    height_width = sizes.to(outputs["pred_boxes"])
    boxes_xyxy = box_convert(outputs["pred_boxes"], "cxcywh", "xyxy") * height_width.flip(1).repeat(1, 2)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes_xyxy, strict=True)]
