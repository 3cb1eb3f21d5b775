"""Generalized intersection over union of boxes (Rezatofighi et al. 2019); torchvision's ``box_convert`` converts box formats."""

import torch
from torch import Tensor


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Compute the generalized IoU of boxes (``generalized_box_iou`` of the official ``util/box_ops.py``).

    ``generalized_iou(a, b)`` compares the boxes pairwise, ``generalized_iou(a[:, None], b[None])`` compares each with each.

    Args:
        a_xyxy: Boxes, float [..., 4].
        b_xyxy: Boxes, float [..., 4], broadcast against ``a_xyxy``.

    Returns:
        Float [...], from -1 to 1; NaN where both boxes are empty and at the same position.
    """
    area_a, area_b = _area(a_xyxy[..., 2:] - a_xyxy[..., :2]), _area(b_xyxy[..., 2:] - b_xyxy[..., :2])
    low, high = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    overlap = _area((high - low).clamp(min=0))
    union = area_a + area_b - overlap
    low, high = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    hull = _area(high - low)
    return overlap / union - (hull - union) / hull


def _area(extent: Tensor) -> Tensor:
    # Not prod(-1): its gradient asks the device whether a factor is zero, and waits for the answer.
    return extent[..., 0] * extent[..., 1]
