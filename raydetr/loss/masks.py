"""The losses of masks (Carion et al. 2020, section 4.4): a focal loss of their pixels and a Dice loss, of the matched queries alone.

They follow ``loss_masks`` in ``models/detr.py`` and ``models/segmentation.py`` of the official DETR.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al. 2017)


def mask_numerators(logits: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Compute the sums of the mask losses over the matched queries; both are divided by the number of true boxes.

    Args:
        logits: Mask logits of the matched queries, float [M, h, w].
        masks: Their true masks, bool [M, H, W].

    Returns:
        The scalars ``loss_mask`` (focal loss, averaged over the pixels of a mask) and ``loss_dice``.
    """
    logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    truth = masks.flatten(1).to(logits.dtype)
    focal = sigmoid_focal_loss(logits, truth, ALPHA, GAMMA, reduction="none").mean(1)
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * truth).sum(1) + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return {"loss_mask": focal.sum(), "loss_dice": dice.sum()}


def matched_masks(masks: list[Tensor], target: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the true masks of the matched queries, padded to the size of the batch.

    Args:
        masks: True masks of each image, bool [n, height, width], in pixels of the batch.
        target: The true box of each pair, int64 [M]: its position in the batch's concatenated targets.
        size: Height and width of the batch.

    Returns:
        Bool [M, height, width].
    """
    padded = [F.pad(each, (0, size[1] - each.shape[-1], 0, size[0] - each.shape[-2])) for each in masks]
    return torch.cat(padded)[target]
