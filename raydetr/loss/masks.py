"""The losses of masks (Carion et al. 2020, section 4.4): a focal loss of their pixels and a Dice loss, of the matched queries alone.

They follow ``loss_masks`` in ``models/detr.py`` and ``models/segmentation.py`` of the official DETR.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017)


CHUNK = 2**25  # pixels that are worked on at a time


def mask_numerators(logits: Tensor, masks: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    """Compute the sums of the mask losses over the matched queries; both are divided by the number of true boxes.

    Args:
        logits: Mask logits of the matched queries, float [M, h, w].
        masks: Their true masks, bool [M, H, W].
        counted: Whether each counts, bool [M]; by default all do.

    Returns:
        The scalars ``loss_mask`` (focal loss, averaged over the pixels of a mask) and ``loss_dice``.
    """
    most = max(1, CHUNK // max(1, masks[0:1].numel()))
    parts = [_losses(*part) for part in zip(logits.split(most), masks.split(most), strict=True)]
    focal, dice = (torch.cat(part) for part in zip(*parts, strict=True))
    if counted is not None:
        focal, dice = focal * counted, dice * counted
    return {"loss_mask": focal.sum(), "loss_dice": dice.sum()}


def _losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the focal and the Dice loss of each mask, both [M]."""
    logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    truth = masks.flatten(1).to(logits.dtype)
    focal = sigmoid_focal_loss(logits, truth, ALPHA, GAMMA, reduction="none").mean(1)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return focal, dice


def matched_masks(masks: list[Tensor], target: Tensor) -> Tensor:
    """Return the true masks of the matched queries, padded to the largest of the batch.

    Args:
        masks: True masks of each image, bool [n, height, width], in pixels of the batch. Those of a batch of
            :func:`raydetr.data.loader.collate` are padded to the size of the batch already.
        target: The true box of each pair, int64 [M]: its position in the batch's concatenated targets.

    Returns:
        Bool [M, height, width].
    """
    height, width = (max(each.shape[axis] for each in masks) for axis in (-2, -1))
    padded = [F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in masks]
    return torch.cat(padded)[target]
