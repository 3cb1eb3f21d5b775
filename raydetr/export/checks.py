"""Compare exported models with the models that they come from, on real images."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import tv_tensors

from raydetr.config import Data
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.images import read_image
from raydetr.data.loader import collate
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from raydetr.export.onnx import TensorsOnly
from raydetr.model.detr import DETR

IMAGES = 4  # enough for an unpadded image, a padded batch and several sizes
SCALES = (1.0, 0.75)  # of data.val_size: an export must not be tied to one size

Forward = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Images float [B, 3, H, W] and padding mask bool [B, H, W] to the outputs of :class:`raydetr.export.onnx.TensorsOnly`."""


def compare(model: DETR, exported: Forward, batches: Sequence[tuple[Tensor, Tensor]], tolerance: float, what: str) -> float:
    """Compare an exported model's outputs with those of the model it comes from.

    Args:
        model: The model, in eval mode on the CPU.
        exported: The exported model.
        batches: Images float [B, 3, H, W], normalized, with their padding masks bool [B, H, W].
        tolerance: Largest allowed difference of a class probability, a relative box coordinate or the probability of a pixel.
        what: Name of the export in the error message.

    Returns:
        The largest difference found.

    Raises:
        UserError: An output differs by more than ``tolerance``.
    """
    worst, original = 0.0, TensorsOnly(model)
    for images, mask in batches:
        with torch.no_grad():
            expected, found = (_probabilities(*network(images, mask)) for network in (original, exported))
        for ours, theirs in zip(expected, found, strict=True):
            difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
            if not difference <= tolerance:  # also where it is NaN
                size = " x ".join(map(str, images.shape))
                raise UserError(f"{what}: its outputs differ from the checkpoint's by {difference:.1e} on a batch of {size}; not exported")
            worst = max(worst, difference)
    return worst


def _probabilities(logits: Tensor, boxes: Tensor, *masks: Tensor) -> list[Tensor]:
    return [logits.softmax(-1), boxes, *(each.sigmoid() for each in masks)]


def sample_batches(data: Data, images: Sequence[Path] = ()) -> list[tuple[Tensor, Tensor]]:
    """Read real images as batches of several sizes, most of them padded.

    Args:
        data: Settings of the data set and of the image size.
        images: Image files to use instead of the validation images of ``data``.

    Returns:
        Images float [B, 3, H, W], normalized, with their padding masks bool [B, H, W].

    Raises:
        UserError: There are no images to compare with, or one cannot be read.
    """
    batches = []
    for scale in SCALES:
        transform = val_transforms(dataclasses.replace(data, val_size=max(32, round(scale * data.val_size))))
        ready = _transformed(data, images, transform)
        for group in (ready[:1], ready):
            pixels, mask, _ = collate(group)
            batches.append((pixels, torch.zeros(len(group), *pixels.shape[-2:], dtype=torch.bool) if mask is None else mask))
    return batches


def _transformed(data: Data, images: Sequence[Path], transform: Callable) -> list[tuple[Tensor, dict]]:
    if images:
        read = [tv_tensors.Image(read_image(path)) for path in images[:IMAGES]]
        return [(transform(image).as_subclass(Tensor), {}) for image in read]
    if data.path is None and not (data.val_images and data.val_annotations):
        raise UserError("export: no images to compare the export with; name some with --images, or a data set with --data")
    dataset = CocoImages(find_split(data, "val"), transform)
    return [dataset[index] for index in range(min(IMAGES, len(dataset)))]
