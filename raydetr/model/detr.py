"""DETR (Carion et al. 2020): backbone, transformer, and the heads that predict the class and box of every object query, and its mask.

It follows ``models/detr.py`` and ``models/segmentation.py`` of the official DETR, whose parameter names it keeps.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from raydetr.config import Model, load_config
from raydetr.errors import UserError
from raydetr.model.backbone import Backbone
from raydetr.model.masks import MaskFeatures, MaskHeadSmallConv, MHAttentionMap
from raydetr.model.position import LearnedPosition, SinePosition
from raydetr.model.transformer import Transformer

# What chooses queries: the outputs to the positions of M images in the batch, int64 [M], and the queries in them, int64 [M].
Choose = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


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
        """Apply the layers to the last dimension.

        Args:
            x: Float [..., inputs].

        Returns:
            Float [..., outputs].
        """
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """The DETR network with random weights.

    With the setting ``masks`` it has the segmentation head as well, and its state dict has the names of the official ``DETRsegm``:
    ``detr.*`` for what a DETR without masks has, ``bbox_attention.*``, and ``mask_head.*``. It loads names with and without ``detr.``.

    Args:
        settings: The ``model`` section of the settings, already checked; :func:`build_model` makes it from keyword arguments.
        num_classes: Number of classes K, without no-object.

    Attributes:
        settings: The arguments of :func:`build_model` that build this network again.
        categories: Categories in label order, ``[{"id", "name"}, ...]``; empty unless :func:`raydetr.load` set them.
        category_names: Where the names are from: ``"file"``, ``"coco"`` (inferred from the size of the head), or ``"unknown"``.
        thresholds: Score threshold of each category, in label order, which ``raydetr evaluate --thresholds`` stored in the checkpoint; None
            for a category without one, and empty if none is stored.
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
        self.query_groups = 1
        backbone = Backbone(settings.backbone, settings.dilation)
        self.input_proj = nn.Conv2d(backbone.num_channels, width, 1)
        position = SinePosition(width) if settings.position_embedding == "sine" else LearnedPosition(width)
        self.backbone = nn.Sequential(backbone, position)
        if settings.masks:
            self.bbox_attention = MHAttentionMap(width, settings.nheads)
            self.mask_head = MaskHeadSmallConv(width, settings.nheads, backbone.fpn_channels)
            self.register_state_dict_post_hook(_add_prefix)
            self.register_load_state_dict_pre_hook(_remove_prefix)

    def add_query_groups(self, groups: int) -> None:
        """Give the network further groups of object queries for training (Group DETR: Chen et al. 2023, arXiv:2207.13085).

        In training mode each group predicts all objects by itself: queries attend to those of their own group only. The outputs then have
        ``groups`` entries for each image, one after the other, as if the image were so often in the batch. In evaluation mode, and in the
        state dict, there are only the network's own queries: the model stays that of the official DETR.

        Args:
            groups: Number of groups, with the network's own.
        """
        own = self.query_embed.weight.detach()
        further = own.repeat(groups - 1, 1)
        # As far from those of a trained network as they are from each other, groups would have to be learned anew; equal, they stay equal.
        noise = torch.randn(further.shape).to(further)
        self.query_groups = groups
        self.group_embed = nn.Embedding.from_pretrained(further + GROUP_NOISE * own.std() * noise, freeze=False)
        self.register_state_dict_post_hook(_without_groups)
        self.register_load_state_dict_pre_hook(_with_own_groups)

    def forward(self, images: Tensor, mask: Tensor | None = None, choose: Choose | None = None) -> dict[str, Any]:
        """Predict the class and box of every object query and, with the setting ``masks``, the masks of all or of chosen queries.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.
            choose: Chooses the M queries whose masks are computed, given the other outputs; all queries by default.

        Returns:
            A dict with ``pred_logits`` [B, Q, K + 1] (the last class is no-object) and ``pred_boxes`` [B, Q, 4] (cxcywh, relative to the
            unpadded image), in float32, or float64 for a float64 network. With the setting ``aux_loss`` it also has ``aux_outputs``,
            a list of such dicts, one for each decoder layer but the last. With the setting ``masks`` it has ``pred_masks``, logits at a
            quarter of the images' resolution: [B, Q, H / 4, W / 4], or [M, H / 4, W / 4] of the chosen queries.
        """
        if not self.settings["masks"]:
            return self.forward_boxes(images, mask)
        outputs, features = self.forward_features(images, mask)
        if choose:
            return {**outputs, "pred_masks": self.predict_masks(features, *choose(outputs))}
        batch, queries = outputs["pred_logits"].shape[:2]
        image = torch.arange(batch, device=images.device).repeat_interleave(queries)
        query = torch.arange(queries, device=images.device).repeat(batch)
        return {**outputs, "pred_masks": self.predict_masks(features, image, query).unflatten(0, (batch, queries))}

    def forward_boxes(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Return the outputs of :meth:`forward` without masks."""
        _, states, _ = self.transform(*self.backbone[0](images, mask))
        return self.predict(states)

    def forward_features(self, images: Tensor, mask: Tensor | None = None) -> tuple[dict[str, Any], MaskFeatures]:
        """Return the outputs of :meth:`forward` without masks, and what :meth:`predict_masks` computes those from."""
        (*fpns, last), padded = cast(Backbone, self.backbone[0]).pyramid(images, mask)
        projected, states, memory = self.transform(last, padded)
        attention = self.bbox_attention(states[-1], memory, padded).unflatten(-1, last.shape[-2:])
        return self.predict(states), MaskFeatures(projected, attention, fpns[::-1])

    def predict_masks(self, features: MaskFeatures, image: Tensor, query: Tensor) -> Tensor:
        """Compute the masks of M queries.

        Args:
            features: Of :meth:`forward_features`.
            image: Position in the batch of each query's image, int64 [M].
            query: The queries, int64 [M].

        Returns:
            Logits in float32, or float64 for a float64 network: [M, H / 4, W / 4].
        """
        masks = self.mask_head(features.projected, features.attention[image, query], image, features.fpns)
        return masks.to(torch.promote_types(masks.dtype, torch.float32))

    def transform(self, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run the transformer on a feature map.

        Args:
            features: Feature map of the backbone, float [B, C, h, w].
            mask: Its padding mask, bool [B, h, w], True where padded; None if nothing is padded.

        Returns:
            The projected feature map, float [B, D, h, w]; the states of the object queries, float [layers, B, Q, D], of the last decoder
            layer only unless ``aux_loss`` is set; and the memory, the output of the encoder, float [B, h * w, D].
        """
        projected = self.input_proj(features)
        source = projected.flatten(2).transpose(1, 2)
        padded = None if mask is None else mask.flatten(1)
        groups = self.query_groups if self.training else 1
        queries = torch.cat([self.query_embed.weight, self.group_embed.weight]) if groups > 1 else self.query_embed.weight
        states, memory = self.transformer(source, self.backbone[1](features, mask), padded, queries, self.aux_loss, groups)
        if groups > 1:
            states = states.unflatten(2, (groups, -1)).flatten(1, 2)
        return projected, states, memory

    def predict(self, states: Tensor) -> dict[str, Any]:
        """Apply the heads to the states of the object queries.

        Args:
            states: Outputs of decoder layers, float [layers, B, Q, D], as :meth:`transform` returns them.

        Returns:
            The outputs of :meth:`forward`.
        """
        logits, boxes_cxcywh = self.class_embed(states), self.bbox_embed(states)
        # Under autocast the heads are the last layers that run in half precision.
        logits, boxes_cxcywh = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (logits, boxes_cxcywh))
        layers = [{"pred_logits": one, "pred_boxes": other} for one, other in zip(logits, boxes_cxcywh.sigmoid(), strict=True)]
        outputs: dict[str, Any] = layers[-1]
        return {**outputs, "aux_outputs": layers[:-1]} if self.aux_loss else outputs


GROUP_NOISE = 0.3  # the standard deviation of what a new group of queries differs by from the first one, relative to that of its weights
GROUPS = "group_embed.weight"


def _without_groups(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    del state[prefix + GROUPS]


def _with_own_groups(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[prefix + GROUPS] = cast(DETR, model).group_embed.weight.detach()


# What the official DETRsegm adds to a DETR; everything else is in its attribute ``detr``.
MASK_PARTS = ("bbox_attention.", "mask_head.")


def _add_prefix(_model: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in [each for each in state if each.startswith(prefix)]:
        tensor, own = state.pop(name), name.removeprefix(prefix)
        state[name if own.startswith(MASK_PARTS) else f"{prefix}detr.{own}"] = tensor


def _remove_prefix(_model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [each for each in state if each.startswith(f"{prefix}detr.")]:
        state[prefix + name.removeprefix(f"{prefix}detr.")] = state.pop(name)


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
    """Convert outputs to detections: the best class that is an object, its probability, and the box in pixels.

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
