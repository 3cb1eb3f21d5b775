"""A page that shows what is in a data set: one HTML file that needs no network. The page itself is stats.html."""

import base64
import io
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from raydetr.data.check.check import MEDIUM, SMALL
from raydetr.data.coco import box_of
from raydetr.data.images import read_image
from raydetr.data.tools.folder import DataSet, Item, read_data_set
from raydetr.errors import UserError
from raydetr.files import atomic_write_text
from raydetr.pages import page_environment
from raydetr.values import as_number, is_finite

GRID = 24  # cells per side of the maps of positions
MOST_MAPS, MOST_PAIRS, MOST_SAMPLED = 6, 16, 60  # categories with a map of their own, in the table of pairs, and with samples
SAMPLES = 4  # of each category, from the smallest box to the largest
SAMPLE_SIDE = 176  # pixels of a sample's longest side
MARGIN = 0.35  # of a box's longest side that a sample shows around it
SHARES = np.arange(0, 1.01, 0.05)  # bounds of the shares of an image that boxes take, as sides of a square
ASPECTS = np.arange(-3.25, 3.3, 0.5)  # bounds of the binary logarithm of width / height
ASPECT_NAMES = {-3: "1:8", -2: "1:4", -1: "1:2", 0: "1:1", 1: "2:1", 2: "4:1", 3: "8:1"}


class LabeledBox(NamedTuple):
    """A box of a data set with its image; its area, in square pixels, is the annotated one, that of an outline perhaps."""

    item: Item
    category: int
    xywh: tuple[float, float, float, float]
    area: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self.item.entry["width"], self.item.entry["height"]


class Chart(NamedTuple):
    """Bars, each divided by split."""

    heading: str
    explanation: str
    labels: list[str]  # below the bars, some of them empty
    titles: list[str]  # of the bars, for the pointer
    counts: dict[str, list[int]]

    @property
    def most(self) -> int:
        """The height of the highest bar, at least 1."""
        return max(1, *(sum(bar) for bar in zip(*self.counts.values(), strict=True)))


def write_stats(folder: str | Path, out: str | Path) -> Path:
    """Write a page about the images, boxes and categories of a data set.

    Args:
        folder: A COCO folder.
        out: The HTML file to write; a page of an earlier call is replaced.

    Returns:
        The path of the page.

    Raises:
        UserError: The data set or one of the images that are shown cannot be read, or the page cannot be written.
    """
    out, data = Path(out), read_data_set(folder)
    boxes = {split: _boxes(items) for split, items in data.splits.items()}
    names = {each["id"]: each["name"] for each in data.categories}
    all_boxes = list(itertools.chain.from_iterable(boxes.values()))
    common = [category for category, _ in Counter(box.category for box in all_boxes).most_common()]
    page = (
        page_environment("raydetr.data.tools")
        .get_template("stats.html")
        .render(
            name=Path(folder).resolve().name,
            splits=list(data.splits),
            tiles={split: _tile(items, boxes[split]) for split, items in data.splits.items()},
            categories=[(names[each["id"]], {split: _count(each["id"], boxes[split]) for split in boxes}) for each in data.categories],
            charts=[_boxes_per_image(data, boxes), _sizes(boxes), _aspects(boxes)],
            coco_sizes={split: _coco_sizes(boxes[split]) for split in boxes},
            image_sizes=_image_sizes(data),
            grid=GRID,
            maps=[("all boxes", _positions(all_boxes))]
            + [
                (names[each], _positions([box for box in all_boxes if box.category == each]))
                for each in common[:MOST_MAPS]
                if len(common) > 1
            ],
            pairs=_pairs(data, [each for each in common if each in names][:MOST_PAIRS], names),
            samples=[(names[each], _samples([box for box in all_boxes if box.category == each])) for each in common[:MOST_SAMPLED]],
            left_out=max(0, len(common) - MOST_SAMPLED),
        )
    )
    try:
        atomic_write_text(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot write the page ({error.strerror or error})") from None
    return out


def _boxes(items: Sequence[Item]) -> list[LabeledBox]:
    """The boxes inside of their images, clipped to them; crowd regions are none."""
    found = []
    for item in items:
        width, height = item.entry["width"], item.entry["height"]
        for each in item.annotations:
            x, y, w, h = box_of(each) or (0.0, 0.0, 0.0, 0.0)
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
            if right > left and bottom > top and not each.get("iscrowd"):
                area = as_number(each.get("area"))
                area = area if is_finite(area) and area > 0 else w * h
                found.append(LabeledBox(item, each["category_id"], (left, top, right - left, bottom - top), area))
    return found


def _count(category: int, boxes: list[LabeledBox]) -> tuple[int, int]:
    """Boxes of a category, and images with it."""
    mine = [id(box.item) for box in boxes if box.category == category]
    return len(mine), len(set(mine))


def _tile(items: Sequence[Item], boxes: list[LabeledBox]) -> dict[str, Any]:
    per_image = Counter(id(box.item) for box in boxes)
    return {
        "images": len(items),
        "boxes": len(boxes),
        "per_image": len(boxes) / len(items),
        "without": len(items) - len(per_image),
        "most": max(per_image.values(), default=0),
    }


def _boxes_per_image(data: DataSet, boxes: dict[str, list[LabeledBox]]) -> Chart:
    numbers = {}
    for split, items in data.splits.items():
        counts = Counter(id(box.item) for box in boxes[split])
        numbers[split] = [counts[id(item)] for item in items]
    step = max(1, -(-(max(map(max, numbers.values())) + 1) // 20))
    bars = max(map(max, numbers.values())) // step + 1
    heights = {split: np.bincount(np.array(each) // step, minlength=bars).tolist() for split, each in numbers.items()}
    titles = [f"{bar * step}" if step == 1 else f"{bar * step} to {bar * step + step - 1}" for bar in range(bars)]
    labels = [f"{bar * step}" if bar % max(1, bars // 6) == 0 else "" for bar in range(bars)]
    return Chart(
        "Boxes on an image", "Number of images by the number of their boxes.", labels, [f"{each} boxes" for each in titles], heights
    )


def _sizes(boxes: dict[str, list[LabeledBox]]) -> Chart:
    shares = {split: [(box.xywh[2] * box.xywh[3] / (box.size[0] * box.size[1])) ** 0.5 for box in each] for split, each in boxes.items()}
    labels = [f"{100 * low:.0f}%" if bar % 4 == 0 else "" for bar, low in enumerate(SHARES[:-1])]
    titles = [f"{100 * low:.0f} to {100 * high:.0f} %" for low, high in itertools.pairwise(SHARES)]
    explanation = "Side of a square of the same area, as a share of the image's. Resizing for training does not change it."
    return Chart("Sizes of boxes", explanation, labels, titles, _histogram(shares, SHARES))


def _aspects(boxes: dict[str, list[LabeledBox]]) -> Chart:
    aspects = {split: [np.log2(box.xywh[2] / box.xywh[3]) for box in each] for split, each in boxes.items()}
    middles = (ASPECTS[:-1] + ASPECTS[1:]) / 2
    labels = [ASPECT_NAMES.get(middle, "") for middle in middles]
    titles = [f"{2**low:.2g} to {2**high:.2g} times as wide as high" for low, high in itertools.pairwise(ASPECTS)]
    return Chart("Shapes of boxes", "Width to height; extreme ones are counted at the ends.", labels, titles, _histogram(aspects, ASPECTS))


def _histogram(values: dict[str, list[float]], bounds: np.ndarray) -> dict[str, list[int]]:
    inside = {split: np.clip(np.array(each, dtype=float), bounds[0], bounds[-1]) for split, each in values.items()}
    return {split: np.histogram(each, bounds)[0].tolist() for split, each in inside.items()}


def _coco_sizes(boxes: list[LabeledBox]) -> list[int]:
    """Number of small, medium and large boxes, as COCO counts them."""
    counts = Counter("small" if box.area < SMALL else "medium" if box.area < MEDIUM else "large" for box in boxes)
    return [counts[size] for size in ("small", "medium", "large")]


def _image_sizes(data: DataSet) -> list[tuple[tuple[int, int], int]]:
    """Sizes of images with their numbers, the most frequent first."""
    return Counter((item.entry["width"], item.entry["height"]) for items in data.splits.values() for item in items).most_common(400)


def _positions(boxes: list[LabeledBox]) -> list[list[float]]:
    """How often each cell of a grid over the image is covered by a box: rows of values from 0 to 1, the largest."""
    steps = np.zeros((GRID + 1, GRID + 1))
    for box in boxes:
        (width, height), (x, y, w, h) = box.size, box.xywh
        left, top = min(int(x / width * GRID), GRID - 1), min(int(y / height * GRID), GRID - 1)
        right = max(left + 1, math.ceil((x + w) / width * GRID - 1e-9))
        bottom = max(top + 1, math.ceil((y + h) / height * GRID - 1e-9))
        steps[top, left] += 1
        steps[bottom, right] += 1
        steps[top, right] -= 1
        steps[bottom, left] -= 1
    covered = steps.cumsum(0).cumsum(1)[:GRID, :GRID]
    return (covered / max(1, covered.max())).tolist()


def _pairs(data: DataSet, categories: list[int], names: dict[int, str]) -> dict[str, Any]:
    """Number of images that have both of two categories; on the diagonal, those with two boxes or more of one."""
    table = np.zeros((len(categories), len(categories)), dtype=int)
    for item in itertools.chain.from_iterable(data.splits.values()):
        there = Counter(each["category_id"] for each in item.annotations if not each.get("iscrowd"))
        for (row, one), (column, other) in itertools.product(enumerate(categories), repeat=2):
            table[row, column] += there[one] > 1 if row == column else bool(there[one] and there[other])
    return {"names": [names[each] for each in categories], "rows": table.tolist(), "most": max(1, int(table.max(initial=0)))}


def _samples(boxes: list[LabeledBox]) -> list[tuple[str, str]]:
    """A few boxes from the smallest to the largest: the file's name, and the cut-out as a data URL."""
    by_area = sorted(boxes, key=lambda box: box.xywh[2] * box.xywh[3])
    chosen = [by_area[round(position)] for position in np.linspace(0, len(by_area) - 1, min(SAMPLES, len(by_area)))]
    return [(box.item.name, _cut_out(box)) for box in chosen]


def _cut_out(box: LabeledBox) -> str:
    pixels = read_image(box.item.path, box.size)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    x, y, w, h = box.xywh
    margin = max(8.0, MARGIN * max(w, h))
    left, top = max(0, int(x - margin)), max(0, int(y - margin))
    part = image.crop((left, top, min(image.width, int(x + w + margin)), min(image.height, int(y + h + margin))))
    scale = SAMPLE_SIDE / max(part.size)
    part = part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))))
    outline = [(edge - corner) * scale for edge, corner in zip((x, y, x + w, y + h), (left, top, left, top), strict=True)]
    ImageDraw.Draw(part).rectangle(outline, outline="white", width=2)
    file = io.BytesIO()
    part.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
