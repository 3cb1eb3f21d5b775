"""Check a data set before training: the content of its COCO files, and every image."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from raydetr.config import Data
from raydetr.data.categories import match_categories, twin_names
from raydetr.data.check.box_format import guess_box_format
from raydetr.data.check.findings import GRAVE, MINOR, Report
from raydetr.data.check.images import CheckedImage, check_images, check_pixels
from raydetr.data.check.masks import check_masks
from raydetr.data.coco import Split, box_of, category_name, find_split, has_split, read_coco
from raydetr.errors import UserError
from raydetr.text import fold_name, shortlist
from raydetr.values import as_number, is_finite, short, whole_number

SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds between small, medium and large, in square pixels


def check(
    data: Data | str | Path,
    quick: bool = False,
    num_queries: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    test: bool = False,
    masks: bool = False,
) -> Report:
    """Check the training and validation sets of a data set, and its test set on request.

    Args:
        data: The settings ``data.*``, or a folder with ``annotations/``, ``train2017/`` and ``val2017/``.
        quick: Whether to leave out what needs every image decoded: broken pixels, and images that are in both sets.
        num_queries: The model's object queries, to warn of images with more boxes; None if unknown.
        progress: Called with (done, total) as images are decoded.
        test: Whether to check the test set as well, if there is one.
        masks: Whether masks are trained (``model.masks``): those that cannot be read are errors then.

    Returns:
        The findings and statistics.

    Raises:
        UserError: If there is no data set at all. What is wrong with an existing one is in the report.
    """
    if isinstance(data, (str, Path)):
        data = Data(path=str(data))
    report = Report(quick=quick)
    images: dict[str, list[CheckedImage]] = {}
    categories: dict[str, dict[int, str]] = {}
    for name, split in _find_splits(data, report, test).items():
        try:
            coco = read_coco(split.annotations)
        except UserError as error:
            report.error(name, str(error), None, "nothing else of this split can be checked before")
            continue
        categories[name] = _check_categories(coco["categories"], name, report)
        by_id = check_images(coco["images"], split, name, report)
        report.stats[name] = _check_annotations(coco["annotations"], by_id, categories[name], num_queries, name, report)
        check_masks(coco["annotations"], by_id, masks, name, report)
        images[name] = [image for image in by_id.values() if image.path]
    if {"train", "val"} <= categories.keys():
        _compare_categories(categories["train"], categories["val"], report)
    if {"train", "test"} <= categories.keys():
        _check_test_categories(categories["train"], categories["test"], report)
    if not quick:
        check_pixels(images, report, progress)
    return report


def _find_splits(data: Data, report: Report, test: bool) -> dict[str, Split]:
    found, complaints = {}, {}
    optional = ["test"] if test and has_split(data, "test") else []
    required = ["train"] if data.folds and not has_split(data, "val") else ["train", "val"]
    for name in (*required, *optional):
        try:
            found[name] = find_split(data, name)
        except UserError as error:
            complaints[name] = str(error)
    if not found:
        raise UserError(complaints["train"])
    for name, complaint in complaints.items():
        advice = "complete the test set, or take it away" if name == "test" else "training needs both a training and a validation set"
        report.error(name, complaint, None, advice)
    return found


def _check_categories(entries: list[dict], split: str, report: Report) -> dict[int, str]:
    """Return the names of the sound categories by id."""
    names: dict[int, str] = {}
    if not entries:
        report.error(split, "there are no categories", None, "name at least one in the annotation file")
    for number, entry in enumerate(entries, 1):
        category_id, name = whole_number(entry.get("id")), category_name(entry)
        if category_id is None:
            report.error(split, "category id is no whole number", f"{short(entry.get('id'))} (category number {number})", "give it one")
        elif category_id in names:
            report.error(split, "category id is used twice", str(category_id), "give every category an id of its own")
        else:
            if name is None:
                report.error(split, "category has no name", f"category id {category_id}", "name it")
            elif isinstance(entry["id"], str):
                report.warn(split, "category id is text", short(entry["id"]), "read as a number; other tools do not", MINOR)
            names[category_id] = name or f"category {category_id}"
    for twins in twin_names(names.values()):
        if len(set(twins)) < len(twins):
            report.warn(split, "category name is used twice", short(twins[0]), "results tell them apart by id only; rename or merge them")
        if len(set(twins)) > 1:
            what, where = "category names differ by case or spaces only", " and ".join(map(short, dict.fromkeys(twins)))
            report.warn(split, what, where, "they stay two categories; merge them if they mean the same, or rename one")
    ids = sorted(names)
    if ids and ids[-1] - ids[0] >= len(ids):
        what = f"category ids have gaps: {len(ids)} ids from {ids[0]} to {ids[-1]}"
        report.warn(split, what, None, "no harm: training numbers categories itself, results carry these ids", MINOR)
    return names


def _labels(names: dict[int, str]) -> dict[int, str]:
    """Return by id what statistics call the categories: their names, with the id where one is used twice."""
    counts = Counter(names.values())
    return {category_id: f"{name} (id {category_id})" if counts[name] > 1 else name for category_id, name in names.items()}


class _Tally:
    """Counts the sound boxes of a split."""

    def __init__(self, labels: Iterable[str]):
        self.categories = {label: {"images": set(), "boxes": 0} for label in labels}
        self.sizes = {"small": 0, "medium": 0, "large": 0}
        self.per_image = Counter()
        self.crowds = 0
        self.seen = set()

    def add(self, image_id: int, label: str, area: float) -> None:
        self.per_image[image_id] += 1
        self.categories[label]["images"].add(image_id)
        self.categories[label]["boxes"] += 1
        self.sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1

    def stats(self, images: int) -> dict[str, Any]:
        """Return the statistics of a split, see :class:`raydetr.data.check.findings.Report`."""
        return {
            "images": images,
            "boxes": self.per_image.total(),
            "crowds": self.crowds,
            "without_boxes": images - len(self.per_image),
            "most_boxes": max(self.per_image.values(), default=0),
            "categories": {label: {"images": len(each["images"]), "boxes": each["boxes"]} for label, each in self.categories.items()},
            "sizes": self.sizes,
        }


def _check_annotations(
    entries: list[dict],
    images: dict[int, CheckedImage],
    categories: dict[int, str],
    num_queries: int | None,
    split: str,
    report: Report,
) -> dict[str, Any]:
    """Check every annotation; return the split's statistics, which count the sound ones."""
    labels, ids = _labels(categories), set()
    tally = _Tally(labels.values())
    for number, entry in enumerate(entries, 1):
        image = _image_of(entry, images)
        where = f"annotation id {short(entry['id'])}" if "id" in entry else f"annotation number {number}"
        where += f" in {image.label}" if image else ""
        _check_annotation_id(entry.get("id"), ids, where, split, report)
        _check_annotation(entry, image, labels, tally, where, split, report)
    _check_box_format(entries, images, split, report)
    if images and not tally.per_image:
        report.error(split, "no image has a box that can be used", None, "there is nothing to learn or to measure; label some objects")
    for image_id, boxes in tally.per_image.items():
        if num_queries is not None and boxes > num_queries:
            what = f"image has more boxes than the model has object queries ({num_queries})"
            report.warn(split, what, f"{images[image_id].label}: {boxes}", "the rest cannot be found; raise model.num_queries")
    return tally.stats(len(images))


def _image_of(entry: dict, images: dict[int, CheckedImage]) -> CheckedImage | None:
    image_id = whole_number(entry.get("image_id"))
    return None if image_id is None else images.get(image_id)


def _check_annotation_id(value: Any, ids: set[int | None], where: str, split: str, report: Report) -> None:
    annotation_id = whole_number(value)
    if annotation_id is None:
        report.warn(split, "annotation has no whole number as id", where, "raydetr numbers them itself; other tools fail", MINOR)
    elif annotation_id in ids:
        report.error(split, "annotation id is used twice", where, "often a sign of files merged badly; number the annotations anew")
    elif annotation_id == 0:
        report.warn(split, "annotation id is 0", where, "pycocotools takes its match for none; raydetr numbers them from 1 itself", MINOR)
    ids.add(annotation_id)


def _check_annotation(
    entry: dict, image: CheckedImage | None, labels: dict[int, str], tally: _Tally, where: str, split: str, report: Report
) -> None:
    image_id, category_id = whole_number(entry.get("image_id")), whole_number(entry.get("category_id"))
    crowd = as_number(entry.get("iscrowd"))
    if image is None:
        what = f"{where}: image id {short(entry.get('image_id'))}"
        report.error(split, "annotation belongs to an image that is not in the file", what, "add the image or remove the annotation")
    if category_id not in labels:
        what = f"{where}: category id {short(entry.get('category_id'))}"
        report.error(split, "annotation has an unknown category", what, "add the category or correct the id")
    if any(
        isinstance(entry.get(key), str) and number is not None for key, number in (("image_id", image_id), ("category_id", category_id))
    ):
        report.warn(split, "image id or category id of an annotation is text", where, "read as a number; other tools do not", MINOR)
    if crowd not in (0, 1, None):
        report.error(split, "iscrowd is neither 0 nor 1", f"{where}: {short(crowd)}", "correct it")
    box = _check_box(entry, image, where, split, report)
    if image is None or image_id is None or category_id not in labels or box is None:
        return
    if crowd:
        tally.crowds += 1
        report.warn(split, "crowd region", where, "not trained on; evaluation forgives what is found there", MINOR)
        return
    if (image_id, category_id, *box) in tally.seen:
        report.warn(split, "box is there twice", where, "two objects of one category with the same box; remove one of them")
    tally.seen.add((image_id, category_id, *box))
    tally.add(image_id, labels[category_id], _check_area(as_number(entry.get("area")), box, where, split, report))


def _check_box(entry: dict, image: CheckedImage | None, where: str, split: str, report: Report) -> tuple[float, float, float, float] | None:
    """Return the box if training can use it."""
    xywh, where, advice = box_of(entry), f"{where}: {short(entry.get('bbox'))}", "correct or remove the annotation"
    if xywh is None:
        report.error(split, "box is not four numbers", where, "give it as [x, y, width, height] in pixels")
        return None
    x, y, width, height = xywh
    if not all(map(is_finite, xywh)):
        report.error(split, "box has a value that is no finite number", where, advice)
        return None
    if width < 0 or height < 0:
        report.error(split, "box has a negative width or height", where, f"a box is [x, y, width, height]; {advice}")
        return None
    if width == 0 or height == 0:
        report.warn(split, "box is empty (no width or no height)", where, f"it is left out; {advice}")
        return None
    if image and image.size:
        right, bottom = image.size
        where += f" of {right} x {bottom}"
        if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
            report.error(split, "box is outside its image", where, advice)
            return None
        if max(-x, -y, x + width - right, y + height - bottom) >= 1:  # less is rounding
            report.warn(split, "box reaches beyond its image", where, "it is cut at the edge; look at it")
    if min(width, height) <= 1:
        report.warn(split, "box is one pixel wide or high, or less", where, "most likely a slip of the mouse; look at it")
    return x, y, width, height


def _check_box_format(entries: list[dict], images: dict[int, CheckedImage], split: str, report: Report) -> None:
    boxes, sizes, areas = [], [], []
    for entry in entries:
        image, box, area = _image_of(entry, images), box_of(entry), as_number(entry.get("area"))
        if image and image.size and box and all(map(is_finite, box)):
            boxes.append(box)
            sizes.append(image.size)
            areas.append(area if is_finite(area) else None)
    guess = guess_box_format(boxes, sizes, areas)
    if guess:
        report.warn(split, guess.what, None, f"{guess.advice}; COCO's boxes are [x, y, width, height] in pixels", GRAVE)


def _check_area(area: Any, xywh: tuple[float, float, float, float], where: str, split: str, report: Report) -> float:
    """Return the area that evaluation will use."""
    whole = xywh[2] * xywh[3]
    if not is_finite(area) or area <= 0:
        report.warn(split, "annotation has no area", where, "width x height is taken for it", MINOR)
        return whole
    if area > 1.01 * whole + 1:
        report.warn(split, "area is larger than the box", f"{where}: {area:g}, box {whole:g}", "AP by size goes by it; correct the area")
    return area


def _compare_categories(train: dict[int, str], val: dict[int, str], report: Report) -> None:
    """Compare the categories of both splits as training does, which finds those of val among its own."""
    boxes: dict[str, dict[int | None, int]] = {
        split: {category_id: report.stats[split]["categories"][label]["boxes"] for category_id, label in _labels(names).items()}
        for split, names in (("train", train), ("val", val))
    }
    known = [{"id": category_id, "name": name} for category_id, name in train.items()]
    found = match_categories([{"id": category_id, "name": name} for category_id, name in val.items()], known)
    matched = {val_id: known[position]["id"] for val_id, position in zip(val, found, strict=True) if position is not None}
    pairs: list[tuple[str, int | None, int | None]] = []
    for val_id, name in val.items():
        train_id = matched.get(val_id)
        pairs.append((name if train_id is None else train[train_id], train_id, val_id))
    pairs += [(name, train_id, None) for train_id, name in train.items() if train_id not in matched.values()]
    for name, train_id, val_id in pairs:
        learnt, measured = boxes["train"].get(train_id, 0), boxes["val"].get(val_id, 0)
        _compare_category(name, train_id, val_id, learnt, measured, list(train.values()), report)


def _check_test_categories(train: dict[int, str], test: dict[int, str], report: Report) -> None:
    """Report categories of the test set that have boxes and that training does not know."""
    known = [{"id": category_id, "name": name} for category_id, name in train.items()]
    found = match_categories([{"id": category_id, "name": name} for category_id, name in test.items()], known)
    for (category_id, label), position in zip(_labels(test).items(), found, strict=True):
        if position is None and report.stats["test"]["categories"][label]["boxes"]:
            where = short(test[category_id])
            report.error("test", "category is not in the training file", where, "give both files the same list of categories")


def _compare_category(
    name: str, train_id: int | None, val_id: int | None, learnt: int, measured: int, of_train: list[str], report: Report
) -> None:
    where = short(name)
    if train_id is None and measured:
        alike = [short(each) for each in of_train if fold_name(each) == fold_name(name)]
        where += f" (it cannot be told from {shortlist(alike)})" if alike else ""
        report.error("val", "category is not in the training file", where, "give both files the same list of categories")
        return
    if train_id is None or val_id is None:
        report.warn("both", "category is listed in one of the two files only", where, "give both files the same list of categories")
    elif train_id != val_id:
        ids = f"{where} ({train_id} and {val_id})"
        report.warn("both", "category has different ids in train and val", ids, "found by name; results carry the ids of train", MINOR)
    if not learnt and not measured:
        report.warn("both", "category is never used", where, "label some, or take it out of the files")
    elif not learnt:
        report.warn("val", "category has no box in train to learn from", where, "its AP will be 0; label some in train")
    elif not measured:
        report.warn("train", "category has no box in val", where, "no AP will say how well it is found; label some in val")
