"""What is wrong with a data set, told before training finds out: the COCO files as they stand, and every picture."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydetr.config import Data
from raydetr.data.check.findings import Report
from raydetr.data.check.pictures import Photo, check_images, check_pixels
from raydetr.data.coco import Split, find_split, read_coco
from raydetr.data.values import is_finite, is_number, short, whole_number
from raydetr.errors import UserError

SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds between small, medium and large, in square pixels


def check(
    data: Data | str | Path,
    quick: bool = False,
    num_queries: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Check the training and validation sets of the settings ``data.*`` (or of a folder in the layout of the field).

    ``quick`` leaves out what needs every picture read through: broken pixels, and pictures that are in both sets. ``num_queries``: the
    model's object queries, to warn of images with more boxes. ``progress(done, total)`` is called as pictures are decoded.

    Raises UserError where there is no data set at all; what is wrong with one that is there stands in the report.
    """
    if isinstance(data, (str, Path)):
        data = Data(path=str(data))
    report = Report(quick=quick)
    photos: dict[str, list[Photo]] = {}
    categories: dict[str, dict[int, str]] = {}
    for name, split in _find_splits(data, report).items():
        try:
            coco = read_coco(split.annotations)
        except UserError as error:
            report.error(name, str(error), None, "nothing else of this split can be checked before")
            continue
        categories[name] = _check_categories(coco["categories"], name, report)
        images = check_images(coco["images"], split.images, name, report)
        report.stats[name] = _check_annotations(coco["annotations"], images, categories[name], num_queries, name, report)
        photos[name] = [photo for photo in images.values() if photo.path]
    if len(categories) == 2:
        _compare_categories(categories["train"], categories["val"], report)
    if not quick:
        check_pixels(photos, report, progress)
    return report


def _find_splits(data: Data, report: Report) -> dict[str, Split]:
    found, complaints = {}, {}
    for name in ("train", "val"):
        try:
            found[name] = find_split(data, name)
        except UserError as error:
            complaints[name] = str(error)
    if not found:
        raise UserError(complaints["train"])
    for name, complaint in complaints.items():
        report.error(name, complaint, None, "training needs both a training and a validation set")
    return found


def _check_categories(entries: list[dict], split: str, report: Report) -> dict[int, str]:
    """The sound categories: id to name."""
    names: dict[int, str] = {}
    if not entries:
        report.error(split, "there are no categories", None, "name at least one in the annotation file")
    for number, entry in enumerate(entries, 1):
        category_id, name = whole_number(entry.get("id")), entry.get("name")
        if category_id is None:
            report.error(split, "category id is no whole number", f"{short(entry.get('id'))} (category number {number})", "give it one")
        elif category_id in names:
            report.error(split, "category id stands twice", str(category_id), "give every category an id of its own")
        else:
            if not isinstance(name, str) or not name.strip():
                report.error(split, "category has no name", f"category id {category_id}", "name it")
                name = f"category {category_id}"
            elif name in names.values():
                report.warn(split, "category name stands twice", short(name), "results tell them apart by id only; rename or merge them")
            names[category_id] = name
    ids = sorted(names)
    if ids and ids[-1] - ids[0] >= len(ids):
        what = f"category ids have gaps: {len(ids)} ids from {ids[0]} to {ids[-1]}"
        report.warn(split, what, None, "no harm: training numbers categories itself, results carry these ids")
    return names


class _Tally:
    """Counts the sound boxes of a split."""

    def __init__(self, names: Iterable[str]):
        self.categories = {name: {"images": set(), "boxes": 0} for name in names}
        self.sizes = {"small": 0, "medium": 0, "large": 0}
        self.per_image = Counter()
        self.crowds = 0
        self.seen = set()

    def add(self, image_id: int, name: str, area: float) -> None:
        self.per_image[image_id] += 1
        self.categories[name]["images"].add(image_id)
        self.categories[name]["boxes"] += 1
        self.sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1

    def stats(self, images: int) -> dict[str, Any]:
        """See :class:`raydetr.data.check.check.findings.Report`."""
        return {
            "images": images,
            "boxes": self.per_image.total(),
            "crowds": self.crowds,
            "without_boxes": images - len(self.per_image),
            "most_boxes": max(self.per_image.values(), default=0),
            "categories": {name: {"images": len(each["images"]), "boxes": each["boxes"]} for name, each in self.categories.items()},
            "sizes": self.sizes,
        }


def _check_annotations(
    entries: list[dict], photos: dict[int, Photo], categories: dict[int, str], num_queries: int | None, split: str, report: Report
) -> dict[str, Any]:
    """Checks every annotation; returns the split's statistics, which count the sound ones."""
    tally, ids = _Tally(categories.values()), set()
    for number, entry in enumerate(entries, 1):
        photo = photos.get(whole_number(entry.get("image_id")))
        place = f"annotation id {short(entry['id'])}" if "id" in entry else f"annotation number {number}"
        place += f" in {photo.place}" if photo else ""
        _check_annotation_id(entry.get("id"), ids, place, split, report)
        _check_annotation(entry, photo, categories, tally, place, split, report)
    if photos and not tally.per_image:
        report.error(split, "no image has a box that can be used", None, "there is nothing to learn or to measure; label some objects")
    for image_id, boxes in tally.per_image.items():
        if num_queries is not None and boxes > num_queries:
            what = f"image has more boxes than the model has object queries ({num_queries})"
            report.warn(split, what, f"{photos[image_id].place}: {boxes}", "the rest cannot be found; raise model.num_queries")
    return tally.stats(len(photos))


def _check_annotation_id(value: Any, ids: set[int], place: str, split: str, report: Report) -> None:
    annotation_id = whole_number(value)
    if annotation_id is None:
        report.warn(split, "annotation has no whole number as id", place, "raydetr numbers them itself; other tools fail")
    elif annotation_id in ids:
        report.error(split, "annotation id stands twice", place, "often a sign of files merged badly; number the annotations anew")
    elif annotation_id == 0:
        report.warn(split, "annotation id is 0", place, "pycocotools takes its match for none; raydetr numbers them from 1 itself")
    ids.add(annotation_id)


def _check_annotation(
    entry: dict, photo: Photo | None, categories: dict[int, str], tally: _Tally, place: str, split: str, report: Report
) -> None:
    image_id, category_id, crowd = whole_number(entry.get("image_id")), whole_number(entry.get("category_id")), entry.get("iscrowd")
    if photo is None:
        what = f"{place}: image id {short(entry.get('image_id'))}"
        report.error(split, "annotation belongs to an image that is not in the file", what, "add the image or remove the annotation")
    if category_id not in categories:
        what = f"{place}: category id {short(entry.get('category_id'))}"
        report.error(split, "annotation has an unknown category", what, "add the category or correct the id")
    if crowd not in (0, 1, None):
        report.error(split, "iscrowd is neither 0 nor 1", f"{place}: {short(crowd)}", "correct it")
    box = _check_box(entry.get("bbox"), photo, place, split, report)
    if photo is None or category_id not in categories or box is None:
        return
    if crowd:
        tally.crowds += 1
        report.warn(split, "crowd region", place, "not trained on; evaluation forgives what is found there")
        return
    if (image_id, category_id, *box) in tally.seen:
        report.warn(split, "box stands twice", place, "two objects of one category at one place; remove one of them")
    tally.seen.add((image_id, category_id, *box))
    tally.add(image_id, categories[category_id], _check_area(entry.get("area"), box, place, split, report))


def _check_box(xywh: Any, photo: Photo | None, place: str, split: str, report: Report) -> tuple[float, float, float, float] | None:
    """The box if training can use it."""
    place, advice = f"{place}: {short(xywh)}", "correct or remove the annotation"
    if not isinstance(xywh, list) or len(xywh) != 4 or not all(map(is_number, xywh)):
        report.error(split, "box is not four numbers", place, "give it as [x, y, width, height] in pixels")
        return None
    x, y, width, height = xywh
    if not all(map(is_finite, xywh)):
        report.error(split, "box has a value that is no finite number", place, advice)
        return None
    if width < 0 or height < 0:
        report.error(split, "box has a negative width or height", place, f"a box is [x, y, width, height]; {advice}")
        return None
    if width == 0 or height == 0:
        report.warn(split, "box is empty (no width or no height)", place, f"it is left out; {advice}")
        return None
    if photo and photo.size:
        right, bottom = photo.size
        place += f" of {right} x {bottom}"
        if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
            report.error(split, "box is outside its image", place, advice)
            return None
        if max(-x, -y, x + width - right, y + height - bottom) >= 1:  # less is rounding
            report.warn(split, "box reaches beyond its image", place, "it is cut at the edge; look at it")
    if min(width, height) <= 1:
        report.warn(split, "box is one pixel wide or high, or less", place, "most likely a slip of the mouse; look at it")
    return x, y, width, height


def _check_area(area: Any, xywh: tuple[float, float, float, float], place: str, split: str, report: Report) -> float:
    """The area that evaluation will use."""
    whole = xywh[2] * xywh[3]
    if not is_finite(area) or area <= 0:
        report.warn(split, "annotation has no area", place, "width x height is taken for it")
        return whole
    if area > 1.01 * whole + 1:
        report.warn(split, "area is larger than the box", f"{place}: {area:g}, box {whole:g}", "AP by size goes by it; correct the area")
    return area


def _compare_categories(train: dict[int, str], val: dict[int, str], report: Report) -> None:
    """Training finds the validation set's categories among its own by name."""
    boxes = {split: Counter() for split in ("train", "val")}
    for split, count in boxes.items():
        for name, each in report.stats[split]["categories"].items():
            count[_spelling(name)] += each["boxes"]
    train_ids, val_ids = ({_spelling(name): category_id for category_id, name in names.items()} for names in (train, val))
    for key, name in {_spelling(name): short(name) for name in (*val.values(), *train.values())}.items():
        learnt, measured = boxes["train"][key], boxes["val"][key]
        if measured and key not in train_ids:
            report.error("val", "category is not in the training file", name, "give both files the same list of categories")
            continue
        if key not in train_ids or key not in val_ids:
            report.warn("both", "category is listed in one of the two files only", name, "give both files the same list of categories")
        elif train_ids[key] != val_ids[key]:
            places = f"{name} ({train_ids[key]} and {val_ids[key]})"
            report.warn("both", "category has different ids in train and val", places, "found by name; results carry the ids of train")
        if not learnt and not measured:
            report.warn("both", "category is never used", name, "label some, or take it out of the files")
        elif not learnt:
            report.warn("val", "category has no box in train to learn from", name, "its AP will be 0; label some in train")
        elif not measured:
            report.warn("train", "category has no box in val", name, "no AP will say how well it is found; label some in val")


def _spelling(name: str) -> str:
    return name.strip().casefold()
