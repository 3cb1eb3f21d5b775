"""Generalized intersection over union (Rezatofighi et al. 2019). Conversions are torchvision's ``box_convert``."""

import torch
from torch import Tensor


def generalized_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Of boxes [..., 4] and boxes [..., 4], broadcast against each other: in -1..1, [...].

    ``generalized_iou(a, b)`` pairs them up, ``generalized_iou(a[:, None], b[None])`` compares each with each. Both boxes of a
    pair empty at one place give NaN.
    """
    area_a, area_b = _area(a_xyxy), _area(b_xyxy)
    low, high = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    low, high = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2]), torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    hull = (high - low).prod(-1)
    return overlap / union - (hull - union) / hull


def _area(xyxy: Tensor) -> Tensor:
    return (xyxy[..., 2:] - xyxy[..., :2]).prod(-1)
