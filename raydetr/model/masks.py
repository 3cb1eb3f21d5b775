"""DETR's segmentation head (Carion et al. 2020, section 4.4): a mask for each object query.

It follows ``models/segmentation.py`` of the official DETR, whose parameter names it keeps. The official head computes the masks of all
queries. Here the queries may be chosen: the losses need only the matched ones, and masks cost far more time and memory than boxes.

Shapes in this module: B images, Q object queries, D channels (``hidden_dim``), h x w cells of the feature map, M chosen queries.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MHAttentionMap(nn.Module):
    """Attention of object queries to the image, one map for each head, without values.

    Args:
        hidden_dim: Channels D.
        nheads: Attention heads.
    """

    def __init__(self, hidden_dim: int, nheads: int):
        super().__init__()
        self.nheads = nheads
        self.q_linear = nn.Linear(hidden_dim, hidden_dim)
        self.k_linear = nn.Linear(hidden_dim, hidden_dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, queries: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention maps.

        Args:
            queries: States of the object queries after the last decoder layer, float [B, Q, D].
            memory: Output of the encoder, float [B, h * w, D].
            mask: Padding mask of the feature map, bool [B, h, w], True where padded; None if nothing is.

        Returns:
            Float [B, Q, nheads, h * w]; each query's weights sum to 1 over its heads and cells together.
        """
        q = self.q_linear(queries).unflatten(-1, (self.nheads, -1)) * (queries.shape[-1] / self.nheads) ** -0.5
        k = self.k_linear(memory).unflatten(-1, (self.nheads, -1))
        similarity = torch.einsum("bqnc,bsnc->bqns", q, k)
        if mask is not None:
            similarity = similarity.masked_fill(mask.flatten(1)[:, None, None], -torch.inf)
        return similarity.flatten(2).softmax(-1).view_as(similarity)


class MaskHeadSmallConv(nn.Module):
    """Convolutions that refine attention maps to masks, with the backbone's feature maps of higher resolution.

    Args:
        hidden_dim: Channels of the projected feature map, D.
        nheads: Heads of the attention maps.
        fpn_dims: Channels of the backbone's feature maps that are added, from the coarsest to the finest.
    """

    def __init__(self, hidden_dim: int, nheads: int, fpn_dims: Sequence[int]):
        super().__init__()
        dim = hidden_dim + nheads
        widths = [dim, *(hidden_dim // divisor for divisor in (2, 4, 8, 16))]
        self.lay1, self.gn1 = nn.Conv2d(dim, dim, 3, padding=1), _group_norm(dim)
        self.lay2, self.gn2 = nn.Conv2d(dim, widths[1], 3, padding=1), _group_norm(widths[1])
        self.lay3, self.gn3 = nn.Conv2d(widths[1], widths[2], 3, padding=1), _group_norm(widths[2])
        self.lay4, self.gn4 = nn.Conv2d(widths[2], widths[3], 3, padding=1), _group_norm(widths[3])
        self.lay5, self.gn5 = nn.Conv2d(widths[3], widths[4], 3, padding=1), _group_norm(widths[4])
        self.out_lay = nn.Conv2d(widths[4], 1, 3, padding=1)
        self.adapter1, self.adapter2, self.adapter3 = (
            nn.Conv2d(inputs, outputs, 1) for inputs, outputs in zip(fpn_dims, widths[1:4], strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, projected: Tensor, attention: Tensor, image: Tensor, fpns: Sequence[Tensor]) -> Tensor:
        """Return the logits of masks.

        Args:
            projected: Projected feature map, float [B, D, h, w].
            attention: Attention maps of the chosen queries, float [M, nheads, h, w].
            image: Position in the batch of each chosen query's image, int64 [M].
            fpns: Feature maps of the backbone, each float [B, C, H, W], from the coarsest to the finest.

        Returns:
            Float [M, H, W] in the resolution of the finest feature map.
        """
        # The first convolution is of an image's features and a query's attention side by side. It is linear: the features' part, by far
        # the larger one, is computed once for each image instead of for each query.
        features_weight, attention_weight = self.lay1.weight.split((projected.shape[1], attention.shape[1]), 1)
        of_image = F.conv2d(projected, features_weight, self.lay1.bias, padding=1)
        x = of_image[image] + F.conv2d(attention, attention_weight, padding=1)
        x = F.relu(self.gn1(x))
        x = F.relu(self.gn2(self.lay2(x)))
        layers = zip((self.adapter1, self.adapter2, self.adapter3), fpns, (self.lay3, self.lay4, self.lay5), strict=True)
        for (adapter, fpn, layer), norm in zip(layers, (self.gn3, self.gn4, self.gn5), strict=True):
            fpn = adapter(fpn)[image]
            x = fpn + F.interpolate(x, size=fpn.shape[-2:])
            x = F.relu(norm(layer(x)))
        return self.out_lay(x)[:, 0]


class MaskFeatures(NamedTuple):
    """What the masks of any query of a batch are computed from.

    Attributes:
        projected: Projected feature map, float [B, D, h, w].
        attention: Attention maps of all queries, float [B, Q, nheads, h, w].
        fpns: Feature maps of the backbone, each float [B, C, H, W], from the coarsest to the finest.
    """

    projected: Tensor
    attention: Tensor
    fpns: list[Tensor]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)  # the official head has 8 groups, which its widths allow


def postprocess_masks(pred_masks: Tensor, padded_size: tuple[int, int], image_sizes: Tensor, sizes: Tensor) -> list[Tensor]:
    """Turn mask logits into masks of the original images (``PostProcessSegm`` of the official code, threshold 0.5).

    Args:
        pred_masks: Logits of all queries, float [B, Q, h, w].
        padded_size: Height and width of the batch.
        image_sizes: Height and width of each image inside of the padding, in pixels of the batch, int64 [B, 2].
        sizes: Height and width of the original images, int64 [B, 2].

    Returns:
        For each image bool [Q, height, width].
    """
    masks = []
    for logits, (height, width), size in zip(pred_masks, image_sizes.tolist(), sizes.tolist(), strict=True):
        logits = F.interpolate(logits[None], size=padded_size, mode="bilinear", align_corners=False)[..., :height, :width]
        masks.append(F.interpolate((logits > 0).float(), size=size)[0].bool())
    return masks
