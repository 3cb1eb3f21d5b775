"""Find the files of a COCO data set, and read and clean its annotations."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from raydetr.config import Data
from raydetr.data.categories import twin_names
from raydetr.data.file_names import locate_files
from raydetr.data.images import MAX_MEGAPIXELS, image_path, read_header, read_image
from raydetr.data.masks import read_segmentation
from raydetr.errors import UserError
from raydetr.storage import fetched
from raydetr.text import count
from raydetr.values import as_number, is_finite, is_number, plain, short, whole_number

ANNOTATION_FILES = ("custom_{split}.json", "instances_{split}2017.json")  # under annotations/, the first that exists is taken


class Split(NamedTuple):
    """One part of a data set: the folder of its images, its COCO file, and how its images are read."""

    images: Path
    annotations: Path
    exif: str = "upright"  # data.exif
    max_megapixels: int = MAX_MEGAPIXELS  # data.max_megapixels

    def read(self, path: Path, size: tuple[int, int] | None) -> torch.Tensor:
        """Decode an image of this split as RGB, uint8 [3, height, width]; see :func:`raydetr.data.images.read_image`.

        Args:
            path: The image file.
            size: Annotated width and height in pixels, which tell whether the EXIF rotation applies; None if they are unknown.
        """
        return read_image(path, size, self.exif, self.max_megapixels)


def find_split(data: Data, split: str) -> Split:
    """Return where one part of the data set is.

    ``data.<split>_images`` and ``data.<split>_annotations`` come first. What they leave open is looked for in the folder ``data.path``:
    ``<split>2017/``, and ``annotations/custom_<split>.json`` or ``annotations/instances_<split>2017.json``. Files of an object store
    are fetched to this machine, once for all its processes.

    Args:
        data: The settings ``data.*``.
        split: ``train``, ``val`` or ``test``.

    Raises:
        UserError: If the images or the annotations are missing; it says where they were looked for.
    """
    images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
    if images and annotations:
        root = Path()
    elif data.path is None:
        raise UserError(f"data.path is not set: give the data set's folder (or data.{split}_images and data.{split}_annotations)")
    else:
        root = fetched(data.path)
    if not root.is_dir():
        raise UserError(f"data.path: there is no folder {data.path}")
    candidates = [root / "annotations" / name.format(split=split) for name in ANNOTATION_FILES]
    if annotations:
        candidates = [fetched(annotations)]
    folder = fetched(images) if images else root / f"{split}2017"
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        looked = " and ".join(map(str, candidates))
        advice = _conversion_advice(root) or f"set data.{split}_annotations or convert with raydetr data convert"
        raise UserError(f"no {split} annotations: looked for {looked}; {advice}")
    if not folder.is_dir():
        advice = _conversion_advice(root) or f"set data.{split}_images if they are elsewhere"
        raise UserError(f"no {split} images: looked for the folder {folder}; {advice}")
    return Split(folder, file, data.exif, data.max_megapixels)


def has_split(data: Data, split: str) -> bool:
    """Return whether the settings name one part of the data set, or its folder ``data.path`` has something of it, complete or not."""
    if getattr(data, f"{split}_images") or getattr(data, f"{split}_annotations"):
        return True
    if data.path is None:
        return False
    root = fetched(data.path)
    files = (root / "annotations" / name.format(split=split) for name in ANNOTATION_FILES)
    return (root / f"{split}2017").exists() or any(file.exists() for file in files)


def _conversion_advice(root: Path) -> str | None:
    """Return how to convert what an annotation tool left in the data set's folder; None where nothing there calls for it."""
    from raydetr.data.formats.detect import conversion_hint  # loads eight formats, which a sound data set does not need

    own = (root / "annotations" / name.format(split=split) for name in ANNOTATION_FILES for split in ("train", "val"))
    return None if any(file.is_file() for file in own) else conversion_hint(root)


# ---------------------------------------------------------------------------------------------------- the annotation file


def read_coco(path: str | Path) -> dict[str, Any]:
    """Return the content of a COCO file: a dict whose ``images``, ``annotations`` and ``categories`` are lists of dicts.

    Raises:
        UserError: If the file cannot be read, is not JSON, or is not a COCO annotation file.
    """
    try:
        coco = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if isinstance(coco, list):
        kind = "results (detections)" if coco and isinstance(coco[0], dict) and "score" in coco[0] else f"{len(coco)} entries"
        raise UserError(f"{path}: a list of {kind}, not a COCO annotation file with images, annotations and categories")
    if not isinstance(coco, dict):
        raise UserError(f"{path}: not a COCO annotation file, only {short(coco)}")
    if "_via_img_metadata" in coco or any(isinstance(entry, dict) and "regions" in entry for entry in coco.values()):
        raise UserError(f"{path}: a VIA file, not a COCO annotation file; convert it with raydetr data convert")
    for key in ("images", "annotations", "categories"):
        if key not in coco:
            raise UserError(f"{path}: not a COCO annotation file: {key!r} is missing")
        if not isinstance(coco[key], list) or not all(isinstance(entry, dict) for entry in coco[key]):
            raise UserError(f"{path}: not a COCO annotation file: {key!r} is not a list of objects")
    return coco


def load_coco(
    annotations: str | Path,
    images: Path | None = None,
    exif: str = "upright",
    max_megapixels: int = MAX_MEGAPIXELS,
    must_exist: bool = True,
    masks: bool = False,
) -> tuple[dict[str, list[dict]], list[str]]:
    """Return the cleaned content of a COCO file, and warnings.

    Images, annotations and categories keep only the fields of object detection. Images and categories are sorted by id. Annotations are
    numbered from 1 whatever the file says (pycocotools reads a matched annotation id 0 as unmatched). Missing ``iscrowd`` and ``area``
    (width x height of the box) are filled in. Numbers written as text are read as numbers. Boxes that no prediction can find are left
    out: those with a side that is zero, negative or not finite, and those outside the image.

    Args:
        annotations: The COCO file.
        images: The image folder. If given, every image must be in it, file names that are spelled in another way there are corrected
            (:func:`raydetr.data.file_names.locate_files`), and missing sizes are read from the files.
        exif: ``upright`` or ``stored``, the value of ``data.exif``: which size an image without one has.
        max_megapixels: The largest image, in millions of pixels (``data.max_megapixels``).
        must_exist: Whether an image that is missing in the folder is an error; if not, its size may be None.
        masks: Whether annotations keep their ``segmentation``, as an RLE (see :mod:`raydetr.data.masks`), or None where there is no mask.

    Returns:
        The content, and one line for each kind of thing that was left out, filled in or corrected.

    Raises:
        UserError: For what would make training fail or its results wrong, naming the file and the image or annotation id: ids that are
            missing, not whole numbers, unknown or given twice, names that lead out of the folder, boxes that are not four numbers, a
            set without images or without any box; with ``masks``, a segmentation that cannot be read.
    """
    file = read_coco(annotations)
    warnings: list[str] = []
    cleaned = _clean_images(file["images"], annotations)
    if images is not None:
        _find_images(cleaned, images, annotations, warnings, must_exist)
        if must_exist:
            _fill_sizes(cleaned, images, exif, max_megapixels, annotations, warnings)
    categories = _clean_categories(file["categories"], annotations, warnings)
    boxes = _clean_annotations(file["annotations"], cleaned, categories, annotations, masks)
    boxes = _with_area(boxes, cleaned, annotations, warnings)
    if all(box["iscrowd"] for box in boxes):
        raise UserError(f"{annotations}: none of the {len(cleaned)} images has a box; there is nothing to learn and nothing to find")
    without = [box for box in boxes if masks and not box["iscrowd"] and box["segmentation"] is None]
    if without:
        warnings.append(f"{annotations}: {_counted(without, 'annotation')} without a mask: their boxes count, for masks they do not")
    for number, box in enumerate(boxes, 1):
        box["id"] = number
    return {"images": list(cleaned.values()), "annotations": boxes, "categories": list(categories.values())}, warnings


def annotated_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the width and height of an image entry of a COCO file; None where it does not say them."""
    sides = [as_number(entry.get(side)) for side in ("width", "height")]
    return (int(sides[0]), int(sides[1])) if all(is_finite(side) and side >= 1 for side in sides) else None


def _clean_images(entries: list[dict], path: str | Path) -> dict[int, dict]:
    """Return the images by id, in order of the ids; width and height are None where the file does not say them."""
    if not entries:
        raise UserError(f"{path}: there are no images in it")
    cleaned: dict[int, dict] = {}
    for number, entry in enumerate(entries, 1):
        image_id = _id(entry.get("id"), f"{path}: id of image number {number}")
        if image_id in cleaned:
            raise UserError(f"{path}: image id {image_id} is used twice; give every image its own")
        try:
            image_path(Path(), entry.get("file_name"))
        except UserError as error:
            raise UserError(f"{path}: image id {image_id}: {error}") from None
        width, height = annotated_size(entry) or (None, None)
        cleaned[image_id] = {"id": image_id, "file_name": entry["file_name"], "width": width, "height": height}
    return dict(sorted(cleaned.items()))


def _find_images(images: dict[int, dict], folder: Path, path: str | Path, warnings: list[str], must_exist: bool) -> None:
    """Correct the file names that are spelled in another way in the folder; raise UserError where files are missing."""
    located = locate_files(folder, [image["file_name"] for image in images.values()])
    if located.missing and must_exist:
        missing = [image for image in images.values() if image["file_name"] in located.missing]
        hint = located.missing[missing[0]["file_name"]]
        first = f"{short(missing[0]['file_name'])} (image id {missing[0]['id']}){hint and '; '}{hint}"
        raise UserError(f"{path}: {len(missing)} of {len(images)} images are not in {folder}, the first is {first}")
    for image in images.values():
        image["file_name"] = located.found.get(image["file_name"], image["file_name"])
    if located.respelled:
        name, file = next(iter(located.respelled.items()))
        number = count(len(located.respelled), "file name")
        warnings.append(f"{path}: {number} spelled in another way in {folder}: taken (the first: {short(name)} is {plain(file)})")


def _fill_sizes(images: dict[int, dict], folder: Path, exif: str, max_megapixels: int, path: str | Path, warnings: list[str]) -> None:
    unsized = [image for image in images.values() if image["width"] is None]
    for image in unsized:
        image["width"], image["height"] = read_header(image_path(folder, image["file_name"]), max_megapixels).size(exif)
    if unsized:
        warnings.append(f"{path}: {_counted(unsized, 'image')} without width and height: read from the files")


def category_name(entry: Mapping[str, Any]) -> str | None:
    """Return the name of a category entry of a COCO file, also where it is a number; None where it has none."""
    name = entry.get("name")
    name = str(name) if is_number(name) else name
    return name if isinstance(name, str) and name.strip() else None


def _clean_categories(entries: list[dict], path: str | Path, warnings: list[str]) -> dict[int, dict]:
    """Return the categories by id, in order of the ids."""
    if not entries:
        raise UserError(f"{path}: there are no categories in it")
    cleaned: dict[int, dict] = {}
    for number, entry in enumerate(entries, 1):
        category_id, name = _id(entry.get("id"), f"{path}: id of category number {number}"), category_name(entry)
        if category_id in cleaned:
            raise UserError(f"{path}: category id {category_id} is used twice; give every category its own")
        if name is None:
            raise UserError(f"{path}: category id {category_id} has no name")
        cleaned[category_id] = {"id": category_id, "name": name}
    for twins in twin_names(each["name"] for each in cleaned.values()):
        if len(set(twins)) < len(twins):
            warnings.append(f"{path}: several categories are named {short(twins[0])}; they are told apart by their ids only")
        else:
            warnings.append(f"{path}: the names of categories {' and '.join(map(short, twins))} differ by case or spaces only")
    return dict(sorted(cleaned.items()))


def _clean_annotations(
    entries: list[dict], images: dict[int, dict], categories: dict[int, dict], path: str | Path, masks: bool
) -> list[dict]:
    """Return what detection needs of every annotation; ``area`` is None where the file does not say it. Ids are the file's."""
    cleaned = []
    for number, entry in enumerate(entries, 1):
        try:
            cleaned.append(_clean_annotation(entry, images, categories))
            if masks:
                image = images[cleaned[-1]["image_id"]]
                size = (image["height"], image["width"])
                # Only an image that is missing has no size.
                cleaned[-1]["segmentation"] = None if None in size else read_segmentation(entry.get("segmentation"), size)
        except UserError as error:
            which = f"id {short(entry['id'])}" if "id" in entry else f"number {number} (without id)"
            raise UserError(f"{path}: annotation {which}: {error}") from None
    return cleaned


def _clean_annotation(entry: dict, images: dict[int, dict], categories: dict[int, dict]) -> dict:
    image_id, category_id = _id(entry.get("image_id"), "image_id"), _id(entry.get("category_id"), "category_id")
    if image_id not in images:
        raise UserError(f"image id {image_id} is not among the file's images")
    if category_id not in categories:
        raise UserError(f"category id {category_id} is not among the file's categories")
    xywh = box_of(entry)
    if xywh is None:
        raise UserError(f"bbox {short(entry.get('bbox'))} is not a list of four numbers, [x, y, width, height]")
    crowd = as_number(entry.get("iscrowd")) or 0
    if crowd not in (0, 1):
        raise UserError(f"iscrowd is {short(crowd)}, not 0 or 1")
    area = as_number(entry.get("area"))
    area = area if is_finite(area) and area > 0 else None
    return {"id": entry.get("id"), "image_id": image_id, "category_id": category_id, "bbox": xywh, "area": area, "iscrowd": int(crowd)}


def box_of(entry: Mapping[str, Any]) -> list[float] | None:
    """Return the ``bbox`` of an annotation of a COCO file, four numbers (maybe not finite); None where it is anything else."""
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return None
    if all(map(is_number, box)):
        return box
    numbers = [as_number(value) for value in box]
    return numbers if all(map(is_number, numbers)) else None


def _with_area(annotations: list[dict], images: dict[int, dict], path: str | Path, warnings: list[str]) -> list[dict]:
    """Return the annotations whose boxes can be found, with their ``area``; count the others in ``warnings``."""
    kept, empty, outside = [], [], []
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        image = images[annotation["image_id"]]
        if not all(map(is_finite, annotation["bbox"])) or width <= 0 or height <= 0:
            empty.append(annotation)
        elif x + width <= 0 or y + height <= 0 or (image["width"] and (x >= image["width"] or y >= image["height"])):
            outside.append(annotation)
        else:
            kept.append(annotation | {"area": annotation["area"] or width * height})
    for found, what in ((empty, "without area (a side zero, negative or not finite)"), (outside, "outside the image")):
        if found:
            warnings.append(f"{path}: {_counted(found, 'annotation')} {what}: left out")
    return kept


def _id(value: Any, what: str) -> int:
    number = whole_number(value)
    if number is None:
        raise UserError(f"{what} is {'missing' if value is None else short(value)}; it must be a whole number")
    return number


def _counted(found: list[dict], noun: str) -> str:
    return f"{count(len(found), noun)} (first: {noun} id {short(found[0]['id'])})"
