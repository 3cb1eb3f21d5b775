"""An image with its objects, before the transforms of training."""

from typing import NamedTuple

import torch


class Scene(NamedTuple):
    """An image with its n objects."""

    pixels: torch.Tensor  # uint8 [3, height, width]; do not write to it
    xyxy: torch.Tensor  # float32 [n, 4], in pixels
    labels: torch.Tensor  # int64 [n]
    area: torch.Tensor  # float32 [n], in pixels
    masks: torch.Tensor | None = None  # bool [n, height, width]; nothing is set for an object without a mask
    has_mask: torch.Tensor = torch.zeros(0, dtype=torch.bool)  # bool [n], where there are masks
