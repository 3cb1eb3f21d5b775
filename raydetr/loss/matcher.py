"""Bipartite matching of object queries with true boxes (Carion et al. 2020, section 3.1), for all decoder layers at once.

It follows ``models/matcher.py`` of the official DETR.
"""

import dataclasses

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from raydetr.loss.boxes import generalized_iou


class NonFiniteCost(FloatingPointError):
    """The network's logits or boxes are NaN or infinite, or a true box has no area.

    Args:
        images: Positions in the batch of the images that are affected.
    """

    def __init__(self, images: list[int]):
        super().__init__(f"non-finite matching cost for the images at {images} of the batch")
        self.images = images


@dataclasses.dataclass(frozen=True)
class Matching:
    """The matched pairs of queries and true boxes, M in each of L layers; all tensors are int64 on the outputs' device.

    Attributes:
        image: Position in the batch of each pair's image, [M].
        query: The pair's query in each layer, [L, M], ascending within an image.
        target: The pair's true box in each layer, [L, M]: its position in the batch's concatenated targets.
        boxes: Number of true boxes of each image, [B].
    """

    image: Tensor
    query: Tensor
    target: Tensor
    boxes: Tensor


@torch.no_grad()
def match(logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]], weights: tuple[float, float, float]) -> Matching:
    """Find the assignment of least cost for every layer and image.

    The host waits for the device once, whatever the number of layers and images.

    Args:
        logits: Class logits, float32 or float64 [L, B, Q, K + 1].
        boxes_cxcywh: Boxes, float32 or float64 [L, B, Q, 4].
        targets: For each image ``labels`` int64 [n] and ``boxes`` float [n, 4] (cxcywh); n may be 0.
        weights: Weights of class probability, L1 distance, and generalized IoU in the cost.

    Returns:
        The matching; an image with n true boxes has min(n, Q) pairs in each layer.

    Raises:
        NonFiniteCost: A cost is NaN or infinite.
    """
    counts = [len(target["labels"]) for target in targets]
    layers, device = logits.shape[0], logits.device
    if not any(counts):
        empty = torch.zeros(layers, 0, dtype=torch.int64, device=device)
        return Matching(empty[0], empty, empty, torch.zeros(len(counts), dtype=torch.int64, device=device))
    cost = matching_cost(logits, boxes_cxcywh, targets, weights).cpu().numpy()
    if not np.isfinite(cost).all():
        raise NonFiniteCost(np.flatnonzero(~np.isfinite(cost).all((0, 2, 3))).tolist())
    first = np.cumsum([0, *counts])
    pairs = [[linear_sum_assignment(cost[layer, i, :, :n]) for i, n in enumerate(counts)] for layer in range(layers)]
    query = np.stack([np.concatenate([rows for rows, _ in of_layer]) for of_layer in pairs])
    target = np.stack([np.concatenate([first[i] + columns for i, (_, columns) in enumerate(of_layer)]) for of_layer in pairs])
    image = np.concatenate([np.full(len(rows), i) for i, (rows, _) in enumerate(pairs[0])])
    # One copy takes everything to the device; the host does not wait for it.
    packed = torch.from_numpy(np.concatenate((image, query.ravel(), target.ravel(), counts))).to(device, non_blocking=True)
    image, query, target, boxes = packed.split((image.size, query.size, target.size, len(counts)))
    return Matching(image, query.view(layers, -1), target.view(layers, -1), boxes)


def matching_cost(logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]], weights: tuple[float, float, float]) -> Tensor:
    """Compute the cost of pairing each query with each true box of its image.

    Args:
        logits: Class logits, float [L, B, Q, K + 1].
        boxes_cxcywh: Boxes, float [L, B, Q, 4].
        targets: For each image ``labels`` int64 [n] and ``boxes`` float [n, 4] (cxcywh).
        weights: Weights of class probability, L1 distance, and generalized IoU.

    Returns:
        Float [L, B, Q, N], where N is the largest number of true boxes of an image. Costs beyond an image's own boxes are meaningless.
    """
    class_weight, l1_weight, giou_weight = weights
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    # The padding is a box with an area, so that nothing divides by zero.
    true_cxcywh = pad_sequence([target["boxes"].to(boxes_cxcywh.dtype) for target in targets], batch_first=True, padding_value=0.5)
    layers, _, queries, _ = logits.shape
    chosen = labels[None, :, None].expand(layers, -1, queries, -1)
    probability = logits.softmax(-1).gather(-1, chosen)
    distance = torch.cdist(boxes_cxcywh, true_cxcywh.expand(layers, -1, -1, -1), p=1)
    predicted_xyxy = box_convert(boxes_cxcywh, "cxcywh", "xyxy")[:, :, :, None]
    giou = generalized_iou(predicted_xyxy, box_convert(true_cxcywh, "cxcywh", "xyxy")[None, :, None])
    return l1_weight * distance - class_weight * probability - giou_weight * giou
