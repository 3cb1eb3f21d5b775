"""The matching of object queries with true boxes (Carion et al. 2020, section 3.1), for all decoder layers at once."""

import dataclasses

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from raydetr.loss.boxes import generalized_iou


class NonFiniteCost(FloatingPointError):
    """The network gave NaN or infinite logits or boxes (or a true box has no area); ``images`` are their places in the batch."""

    def __init__(self, images: list[int]):
        super().__init__(f"non-finite matching cost for the images at {images} of the batch")
        self.images = images


@dataclasses.dataclass(frozen=True)
class Matching:
    """Which query stands for which true box: M pairs in each of L layers.

    ``image`` [M], ``query`` [L, M] (ascending within an image) and ``target`` [L, M], the true box's place in the batch's
    concatenated targets; int64, on the outputs' device.
    """

    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def match(logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]], weights: tuple[float, float, float]) -> Matching:
    """The assignment of least cost, for every layer and image.

    logits [L, B, Q, K + 1] and boxes_cxcywh [L, B, Q, 4], not in half precision; targets as :class:`raydetr.loss.criterion.Criterion`
    takes them; weights of class probability, L1 distance and generalized IoU in the cost. An image with n true boxes gives
    min(n, Q) pairs. Raises NonFiniteCost. The device is waited for once.
    """
    counts = [len(target["labels"]) for target in targets]
    layers = range(logits.shape[0])
    if not any(counts):
        nothing = torch.zeros(len(layers), 0, dtype=torch.int64, device=logits.device)
        return Matching(nothing[0], nothing, nothing)
    cost = matching_cost(logits, boxes_cxcywh, targets, weights).cpu().numpy()
    if not np.isfinite(cost).all():
        raise NonFiniteCost(np.flatnonzero(~np.isfinite(cost).all((0, 2, 3))).tolist())
    first = np.cumsum([0, *counts])
    pairs = [[linear_sum_assignment(cost[layer, i, :, :n]) for i, n in enumerate(counts)] for layer in layers]
    query = np.stack([np.concatenate([rows for rows, _ in of_layer]) for of_layer in pairs])
    target = np.stack([np.concatenate([first[i] + columns for i, (_, columns) in enumerate(of_layer)]) for of_layer in pairs])
    image = np.concatenate([np.full(len(rows), i) for i, (rows, _) in enumerate(pairs[0])])
    packed = torch.from_numpy(np.concatenate((image[None], query, target))).to(logits.device, non_blocking=True)
    return Matching(packed[0], packed[1 : 1 + len(layers)], packed[1 + len(layers) :])


def matching_cost(logits: Tensor, boxes_cxcywh: Tensor, targets: list[dict[str, Tensor]], weights: tuple[float, float, float]) -> Tensor:
    """Cost [L, B, Q, N] of pairing each query with each true box; N is the most boxes an image of the batch has.

    Beyond an image's own boxes stand costs that mean nothing.
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
