"""COCO files and data sets of the tests of this folder."""

import json
from pathlib import Path

import torch

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.images import read_image
from raydetr.data.transforms import train_transforms, val_transforms


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def settings(folder=None, **leaves):
    layer = {f"data.{name}": str(value) for name, value in leaves.items()}
    return load_config({"model.preset": "detr_tiny", **({"data.path": str(folder)} if folder else {}), **layer}).data


def dataset(folder, split="val", transforms=None, images=read_image, **options) -> CocoImages:
    data = settings(folder)
    transforms = transforms or (train_transforms(data) if split == "train" else val_transforms(data))
    made = CocoImages(find_split(data, split), transforms, **options)
    made.images = images
    return made


def rewrite(folder, change, split="val") -> Path:
    """Lets ``change`` work on the split's COCO dict (or return another one), writes it back, and returns the file."""
    path = folder / "annotations" / f"custom_{split}.json"
    coco = json.loads(path.read_text())
    changed = change(coco)
    path.write_text(json.dumps(coco if changed is None else changed))
    return path


def small(**changes):
    """A COCO dict: two images (64 x 48), one box each."""
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48} for number in (1, 2)]
    boxes = [
        {"id": 10 + number, "image_id": number, "category_id": 5, "bbox": [8, 8, 16, 12], "area": 100, "iscrowd": 0} for number in (1, 2)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "thing"}]} | changes


def same(first, second):
    return torch.equal(first[0], second[0]) and all(torch.equal(first[1][name], second[1][name]) for name in first[1])
