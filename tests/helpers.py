"""What tests of several rooms share: settings of a run that takes a second or two."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydetr.config import Config, load_config

# The smallest network on images of 48 pixels. A test lays its own settings over these: TINY | {"optim.epochs": 3}.
TINY: dict[str, Any] = {
    "model.preset": "detr_tiny",
    "model.weights": "none",
    "data.train_sizes": [48],
    "data.val_size": 48,
    "data.num_workers": 0,
    "run.pictures": 0,
}


def tiny_config(layer: dict[str, Any], data: str | Path, storage: str | Path, **changes: Any) -> Config:
    """Return the settings of a run on the COCO folder ``data`` that is kept in ``storage``.

    Args:
        layer: dotted names and values, usually ``TINY`` with a module's own.
        data: COCO folder, as the fixture ``coco_folder`` makes one.
        storage: folder of runs, or the URI of one.
        changes: further settings; a double underscore stands for the dot (``optim__lr=1e-3``).
    """
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(layer, {"data.path": str(data), "run.storage": str(storage)}, dotted)


def official_numbers(name: str) -> tuple[dict[str, np.ndarray], list[dict[str, Tensor]]]:
    """Return outputs, losses and gradients of the official model for two images, and the targets of these images."""
    numbers = dict(np.load(Path(__file__).parent / "fixtures" / f"{name}.npz"))
    generator = torch.Generator().manual_seed(11)
    targets = []
    for n in (4, 7):
        size = torch.rand(n, 2, generator=generator) * 0.3 + 0.05
        center = torch.rand(n, 2, generator=generator) * 0.5 + 0.25
        labels = torch.randint(0, 91, (n,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat((center, size), 1)})
    return numbers, targets


def fill(model: nn.Module) -> nn.Module:
    """Weights made from their own names, as those of the official model were for the numbers."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name.endswith("running_var"):
                noise = 1 + 0.1 * noise.abs()
            elif name.endswith("running_mean"):
                noise = 0.05 * noise
            elif name != "query_embed.weight" and tensor.dim() > 1:
                noise = noise / tensor[0].numel() ** 0.5
            elif tensor.dim() == 1:
                noise = 1 + 0.05 * noise if name.endswith("weight") else 0.02 * noise
            tensor.copy_(noise)
    return model


def padded(sizes: list[tuple[int, int]], seed: int = 7) -> tuple[Tensor, Tensor]:
    """Noise of these (height, width), padded together, with the mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(extent) for extent in zip(*sizes, strict=True))
    images, mask = torch.zeros(len(sizes), 3, height, width), torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        images[i, :, :h, :w] = torch.randn(3, h, w, generator=generator)
        mask[i, :h, :w] = False
    return images, mask
