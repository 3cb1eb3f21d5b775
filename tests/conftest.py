"""What many tests need: real photographs where they are at hand, and a small COCO folder made on the spot."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CATEGORIES = ({"id": 3, "name": "square"}, {"id": 7, "name": "oblong"})  # ids with holes, as they come in the field


@pytest.fixture(scope="session")
def shared_data():
    """``shared_data("balloon")``: the folder of that real data set; skips the test where it is absent."""

    def find(name: str) -> Path:
        root = Path(os.environ.get("RAYDETR_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
        if not (root / name).is_dir():
            pytest.skip(f"the real photographs of {name!r} are not in {root} (set RAYDETR_TEST_DATA)")
        return root / name

    return find


@pytest.fixture
def coco_folder(tmp_path):
    """``coco_folder(train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", ...)``: writes the layout of the field
    (annotations/custom_{train,val}.json, train2017/, val2017/) and returns its folder.

    Image i has ``boxes`` coloured rectangles (xywh of whole pixels, inside the picture) on noise; annotation ids count from 1
    in each file, image ids from 10; ``categories`` are COCO dicts.
    """

    def write(train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", categories=CATEGORIES) -> Path:
        root = tmp_path / folder
        for split, number, offset in (("train", train, 0), ("val", val, train)):
            images = root / f"{split}2017"
            images.mkdir(parents=True)
            coco = {"images": [], "annotations": [], "categories": [dict(each) for each in categories]}
            for index in range(number):
                random = np.random.default_rng([seed, offset + index])
                _draw(random, coco, images, f"{split}_{index:03d}.jpg", 10 + index, size, boxes)
            file = root / "annotations" / f"custom_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(coco))
        return root

    return write


def _draw(random: np.random.Generator, coco: dict, folder: Path, name: str, image_id: int, size: tuple[int, int], boxes: int):
    width, height = size
    pixels = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
    for _ in range(boxes):
        which = int(random.integers(len(coco["categories"])))
        w = int(random.integers(8, max(9, width // 3)))
        h = w if which == 0 else max(4, w // 2)
        w, h = min(w, width), min(h, height)
        x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
        pixels[y : y + h, x : x + w] = (220, 40, 40) if which == 0 else (40, 90, 220)
        box = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": coco["categories"][which]["id"]}
        coco["annotations"].append(box | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0})
    Image.fromarray(pixels).save(folder / name, quality=95)
    coco["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
