"""What tests of several rooms share: settings of a run that takes a second or two."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


def break_test_set(data: str | Path) -> None:
    """Give a data set a test set that nobody can read."""
    Path(data, "annotations", "custom_test.json").write_text("broken")
    Path(data, "test2017").write_text("no folder")


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


def add_outlines(folder: str | Path, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Give every box of a COCO folder a polygon, the box without its corners; return the folder."""
    for split in splits:
        file = Path(folder) / "annotations" / f"custom_{split}.json"
        coco = json.loads(file.read_text())
        for each in coco["annotations"]:
            x, y, width, height = each["bbox"]
            right, bottom, cut_x, cut_y = x + width, y + height, width / 4, height / 4
            upper = [x + cut_x, y, right - cut_x, y, right, y + cut_y, right, bottom - cut_y]
            each["segmentation"] = [[*upper, right - cut_x, bottom, x + cut_x, bottom, x, bottom - cut_y, x, y + cut_y]]
        file.write_text(json.dumps(coco))
    return Path(folder)
