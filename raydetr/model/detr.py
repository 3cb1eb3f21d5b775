"""DETR (Carion et al. 2020): backbone, transformer, and the heads that predict the class and box of every object query.

It follows ``models/detr.py`` of the official DETR, whose parameter names it keeps.
"""

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
    """Linear layers with ReLU between them.

    Args:
        inputs: Channels of the input.
        hidden: Channels between the layers.
        outputs: Channels of the output.
        layers: Number of layers.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int):
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``, float [..., inputs], to [..., outputs]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """The DETR network with random weights.

    Args:
        settings: The ``model`` section of the settings, already checked; :func:`build_model` makes it from keyword arguments.
        num_classes: Number of classes K, without no-object.

    Attributes:
        settings: The arguments of :func:`build_model` that build this network again.
        categories: Categories in label order, ``[{"id", "name"}, ...]``; empty unless :func:`raydetr.load` set them.
        category_names: Where the names are from: ``"file"``, ``"coco"`` (told by the size of the head), or ``"unknown"``.
        thresholds: Score threshold of each category, in label order, where ``raydetr evaluate --thresholds`` stored one in the
            checkpoint, else None; empty where none is stored.
        notes: Lines for the user about how the checkpoint was read.

    Raises:
        UserError: The settings do not describe a network.
    """

    def __init__(self, settings: Model, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise UserError(f"num_classes: {num_classes} is out of bounds; it takes 1 or more")
        if settings.backbone == "tiny" and settings.dilation:
            raise UserError("model.dilation: the tiny backbone has no stage to dilate; its stride is 16 already")
        width = settings.hidden_dim
        self.settings: dict[str, Any] = {"num_classes": num_classes, **_without_weights(settings)}
        self.categories: list[dict[str, Any]] = []
        self.category_names = "unknown"
        self.thresholds: list[float | None] = []
        self.notes: list[str] = []
        self.aux_loss = settings.aux_loss
        # The order of the modules is the official one, because the optimizer's state lists the parameters in it.
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
        """Predict the class and box of every object query.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is.

        Returns:
            A dict with ``pred_logits`` [B, Q, K + 1] (the last class is no-object) and ``pred_boxes`` [B, Q, 4] (cxcywh, relative to the
            unpadded image), in float32, or float64 for a float64 network. With the setting ``aux_loss`` it also has ``aux_outputs``,
            a list of such dicts, one for each decoder layer but the last.
        """
        _, states, _ = self.transform(*self.backbone[0](images, mask))
        return self.predict(states)

    def transform(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the transformer on a feature map.

        Args:
            features: Feature map of the backbone, float [B, C, h, w].
            mask: Its padding mask, bool [B, h, w], True where padded; None if nothing is.

        Returns:
            The projected feature map, float [B, D, h, w]; the states of the object queries, float [layers, B, Q, D], of the last decoder
            layer only unless ``aux_loss`` is set; and the memory, the output of the encoder, float [B, h * w, D].
        """
        projected = self.input_proj(features)
        source = projected.flatten(2).transpose(1, 2)
        padded = None if mask is None else mask.flatten(1)
        states, memory = self.transformer(source, self.backbone[1](features, mask), padded, self.query_embed.weight, self.aux_loss)
        return projected, states, memory

    def predict(self, states: Tensor) -> dict[str, Any]:
        """Apply the heads to states of the object queries, float [layers, B, Q, D]; return the outputs of :meth:`forward`."""
        logits, boxes_cxcywh = self.class_embed(states), self.bbox_embed(states)
        # Under autocast the heads are the last layers that run in half precision.
        logits, boxes_cxcywh = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (logits, boxes_cxcywh))
        layers = [{"pred_logits": one, "pred_boxes": other} for one, other in zip(logits, boxes_cxcywh.sigmoid(), strict=True)]
        outputs: dict[str, Any] = layers[-1]
        return {**outputs, "aux_outputs": layers[:-1]} if self.aux_loss else outputs


def _without_weights(settings: Model) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "weights"}


def build_model(preset: str = "detr_resnet50", num_classes: int = 91, **model_settings: Any) -> DETR:
    """Build a DETR with random weights.

    Args:
        preset: Name of the network that the other settings start from, such as ``"detr_resnet50"`` or ``"detr_tiny"``.
        num_classes: Number of classes, without no-object.
        **model_settings: Settings of the ``model`` section by their last name, such as ``num_queries=50``. They override the preset's.

    Returns:
        The network, in training mode.

    Raises:
        UserError: A setting is unknown or out of bounds.
    """
    if "weights" in model_settings:
        raise UserError("model.weights: build_model starts from random weights; load a checkpoint with raydetr.load")
    settings = {"model.preset": preset, **{f"model.{name}": value for name, value in model_settings.items()}}
    return DETR(load_config(settings).model, num_classes)


def postprocess(outputs: dict[str, Any], sizes: Tensor) -> list[dict[str, Tensor]]:
    """Turn outputs into detections: the best class that is an object, its probability, and the box in pixels.

    This is ``PostProcess`` of the official ``models/detr.py``.

    Args:
        outputs: Outputs of :class:`DETR`.
        sizes: Height and width of the original images in pixels, [B, 2].

    Returns:
        For each image ``scores`` float [Q], ``labels`` int64 [Q], and ``boxes`` float [Q, 4] (xyxy, in pixels).
    """
    scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
    height_width = sizes.to(outputs["pred_boxes"])
    boxes_xyxy = box_convert(outputs["pred_boxes"], "cxcywh", "xyxy") * height_width.flip(1).repeat(1, 2)[:, None]
    return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes_xyxy, strict=True)]
