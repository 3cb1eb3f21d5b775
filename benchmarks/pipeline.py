"""Compare the input pipeline with Pillow and the official transforms, on your own images: ``python -m benchmarks.pipeline FOLDER``.

``FOLDER`` holds photographs of any size (JPEG). The peer decodes each with Pillow and transforms the Pillow picture every time, as the
official datasets/transforms.py does; raydetr is measured in its first epoch (it decodes) and in later ones (decoded pictures are kept in
memory). One thread each, and its CPU time: images per second and core.
"""

import random
import time
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import functional as typed_for_tensors

from benchmarks.measure import interleaved, machine, options, ratio, spread, table
from raydetr.config import Data
from raydetr.data.cache import DecodedImages
from raydetr.data.images import read_header, read_image
from raydetr.data.transforms import MEAN, STD, drawn_from, resized_size, train_transforms

OURS, FIRST, PEER = "raydetr, kept in memory", "raydetr, first epoch", "Pillow, official transforms"
TARGET = 5.0
functional: Any = typed_for_tensors  # its functions take Pillow images as well, which their annotations do not say


def official_transform(path: Path, data: Data) -> torch.Tensor:
    """Return a training image as the official code makes it: float32 [3, height, width]."""

    def resized(picture: Image.Image, sizes: list[int], max_size: int | None) -> Image.Image:
        return functional.resize(picture, resized_size(picture.height, picture.width, random.choice(sizes), max_size))

    with Image.open(path) as file:
        picture = file.convert("RGB")
    if random.random() < data.flip:
        picture = functional.hflip(picture)
    if random.random() < data.crop:
        picture = resized(picture, data.crop_resize, None)
        width = random.randint(data.crop_min, min(picture.width, data.crop_max))
        height = random.randint(data.crop_min, min(picture.height, data.crop_max))
        left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
        picture = functional.crop(picture, top, left, height, width)
    picture = resized(picture, data.train_sizes, data.max_size)
    return functional.normalize(functional.to_tensor(picture), MEAN, STD)


def main() -> None:
    """Measure and print the tables."""
    parser = options(__doc__, repeats=5)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = Data()
    paths = sorted(chosen.folder.rglob("*.jpg"))[: 4 if chosen.quick else None]
    headers = [read_header(path) for path in paths]
    files = [(path, header[:2]) for path, header in zip(paths, headers, strict=True)]
    images = DecodedImages(files, 2**40)
    images.fill()
    transforms = train_transforms(data)

    def ours(read) -> None:
        for index, (path, size) in enumerate(files):
            with drawn_from(0, index):
                width, height = size
                boxes = cast(Any, tv_tensors.BoundingBoxes)(torch.zeros(1, 4), format="XYXY", canvas_size=(height, width))
                transforms(tv_tensors.Image(read(path, size)), boxes)

    def peer() -> None:
        random.seed(0)
        for path in paths:
            official_transform(path, data)

    contenders = {OURS: lambda: ours(images), FIRST: lambda: ours(read_image), PEER: peer}
    seconds = interleaved(contenders, 1 if chosen.quick else chosen.repeats, clock=time.process_time)
    megapixels = sum(header.width * header.height for header in headers) / len(headers) / 1e6
    print(machine(), f", one thread; {len(paths)} photographs of {megapixels:.1f} megapixels on average\n", sep="")
    rows = [
        [name, spread(each), len(paths) / sorted(each)[len(each) // 2], ratio(seconds, PEER, name), TARGET if name == OURS else ""]
        for name, each in seconds.items()
    ]
    print(table(rows, ["who", "CPU time of an epoch", "images per second and core", "times the peer", "target"]))


if __name__ == "__main__":
    main()
