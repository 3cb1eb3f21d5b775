"""How long a trained network takes for one image, for searches that want a fast one."""

import statistics
import time

import torch
from torch import nn

from raydetr.data.coco import CocoImages
from raydetr.data.loader import collate
from raydetr.loss.criterion import Criterion
from raydetr.model.detr import postprocess
from raydetr.training.engine import Batch, network_outputs

IMAGES = 4  # of the validation set, because the time depends on an image's shape
SECONDS = 2.0  # of measuring, after which no further round begins
LEAST_ROUNDS, MOST_ROUNDS = 2, 10  # over the images, without the first one, which is not timed


def seconds_per_image(model: nn.Module, criterion: Criterion, images: CocoImages, device: torch.device, dtype: torch.dtype) -> float:
    """Measure the latency of a network: the median time in seconds from one image, of evaluation's size, to its detections.

    Each image is a batch of its own. Loading and resizing it is not part of the time, copying it to a GPU is. The first round, in which
    libraries choose their algorithms, does not count.

    Args:
        model: The network itself, not wrapped in DistributedDataParallel. Evaluation mode is set.
        criterion: Its losses, which say whether there are masks.
        images: The validation set.
        device: Where the network is.
        dtype: Dtype of the forward pass.
    """
    model.eval()
    batches = [collate([images[index]]) for index in range(min(IMAGES, len(images)))]
    began, seconds = time.perf_counter(), []
    for number in range(1 + MOST_ROUNDS):
        if number > LEAST_ROUNDS and time.perf_counter() - began > SECONDS:
            break
        times = [_seconds(model, criterion, batch, device, dtype) for batch in batches]
        seconds += times if number else []
    return statistics.median(seconds)


@torch.no_grad()
def _seconds(model: nn.Module, criterion: Criterion, batch: Batch, device: torch.device, dtype: torch.dtype) -> float:
    images, mask, targets = batch
    began = time.perf_counter()
    outputs, masks = network_outputs(model, criterion, images, mask, device, dtype)
    sizes = torch.stack([target["orig_size"] for target in targets])
    found = postprocess(outputs, sizes.to(device))
    scores, labels = (torch.stack([each[name] for each in found]) for name in ("scores", "labels"))
    if masks:
        masks.detections(scores, labels, targets)
    scores.cpu()  # which waits for a GPU
    return time.perf_counter() - began
