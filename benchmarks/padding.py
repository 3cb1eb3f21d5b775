"""Count the padding in training batches, random and grouped by size: ``python -m benchmarks.padding FOLDER``.

``FOLDER`` is a data set as ``raydetr train`` takes it. Nothing is timed: the numbers follow from the sizes of the
images and the seed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from benchmarks.measure import options, table
from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.loader import build_loader
from raydetr.data.transforms import train_transforms

SETTINGS = {"default": {}, "480 pixels, no crop": {"data.train_sizes": [480], "data.crop": 0.0}}


def padding(dataset: CocoImages, batch_size: int, group_sizes: bool, epochs: int) -> tuple[float, float]:
    """Return the padding pixels per image pixel and the share of batches without padding, over some epochs."""
    loader = build_loader(dataset, batch_size, shuffle=True, group_sizes=group_sizes)
    of_images, of_batches, full, batches = 0, 0, 0, 0
    for epoch in range(1, epochs + 1):
        dataset.set_epoch(epoch)
        for batch in cast(Iterable[list[tuple[int, int]]], loader.batch_sampler):
            sizes = [dataset.size_of(*image) for image in batch]
            heights, widths = zip(*sizes, strict=True)
            of_images += sum(height * width for height, width in sizes)
            of_batches += len(sizes) * max(heights) * max(widths)
            full += len(set(sizes)) == 1
            batches += 1
    return of_batches / of_images - 1, full / batches


def main() -> None:
    """Count and print the table."""
    parser = options(__doc__, repeats=5)
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    epochs = 1 if chosen.quick else chosen.repeats
    rows = []
    for name, settings in SETTINGS.items():
        data = load_config({"data.path": str(chosen.folder), **settings}).data
        dataset = CocoImages(find_split(data, "train"), train_transforms(data))
        for batch_size in (2, 4):
            for group_sizes in (False, True):
                more, full = padding(dataset, batch_size, group_sizes, epochs)
                rows.append([name, batch_size, "grouped" if group_sizes else "at random", f"{100 * more:.1f} %", f"{100 * full:.0f} %"])
    print(table(rows, ["sizes", "batch", "drawn", "padding, per image pixel", "batches without a mask"]))


if __name__ == "__main__":
    main()
