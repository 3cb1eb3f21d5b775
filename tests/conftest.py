"""What many tests need: real photographs where they are at hand, and a small COCO folder made on the spot."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="session")
def oracle():
    """``oracle("detr_resnet50")``: numbers of the official model and the targets they were computed for (two images)."""

    def read(name: str) -> tuple[dict, list[dict]]:
        numbers = dict(np.load(Path(__file__).parent / "fixtures" / f"{name}.npz"))
        generator = torch.Generator().manual_seed(11)
        targets = []
        for n in (4, 7):
            size = torch.rand(n, 2, generator=generator) * 0.3 + 0.05
            center = torch.rand(n, 2, generator=generator) * 0.5 + 0.25
            labels = torch.randint(0, 91, (n,), generator=generator)
            targets.append({"labels": labels, "boxes": torch.cat((center, size), 1)})
        return numbers, targets

    return read


@pytest.fixture
def coco_folder(tmp_path):
    """``coco_folder(train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", ...)``: writes the layout of the field
    (annotations/custom_{train,val}.json, train2017/, val2017/) and returns its folder.

    Image i has ``boxes`` coloured rectangles (xywh of whole pixels, inside the picture) on noise; annotation ids count from 1
    in each file, image ids from 10; ``categories`` are COCO dicts.
    """
    return functools.partial(_write_coco_folder, tmp_path)


@pytest.fixture(scope="module")
def module_coco_folder(tmp_path_factory):
    """The same for a fixture that a module's tests share."""
    return functools.partial(_write_coco_folder, tmp_path_factory.mktemp("coco"))


def _write_coco_folder(parent: Path, train=4, val=2, boxes=3, size=(96, 64), seed=0, folder="data", categories=CATEGORIES) -> Path:
    root = parent / folder
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


@pytest.fixture(scope="module")
def run_workers(tmp_path_factory):
    """``run_workers(__file__, "function", 2, *arguments)``: runs that function of the test file in two processes and returns them
    when they have ended, as CompletedProcess with their output as text.

    The file, run as a script, calls the function named on its command line; RANK, WORLD_SIZE and MEETING (a file for
    ``init_process_group``) are in the environment.
    """

    def run(file: str, function: str, count: int, *arguments, timeout: float = 120) -> list[subprocess.CompletedProcess]:
        meeting = tmp_path_factory.mktemp("meeting") / "file"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MEETING": str(meeting), "WORLD_SIZE": str(count)}
        command = [sys.executable, file, function, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, **pipes) for rank in range(count)]
        try:
            ended = [(process, *process.communicate(timeout=timeout)) for process in started]
        finally:
            for process in started:
                process.kill()
        return [subprocess.CompletedProcess(process.args, process.returncode, out, err) for process, out, err in ended]

    return run
