"""A COCO data set: find its files, clean its annotations, and read its images with their boxes and masks."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from raydetr.config import Data
from raydetr.data.categories import match_categories, twin_names
from raydetr.data.file_names import locate_files
from raydetr.data.images import MAX_MEGAPIXELS, image_path, read_header, read_image
from raydetr.data.masks import decode_masks, no_mask, read_segmentation
from raydetr.data.scene import Scene
from raydetr.errors import UserError
from raydetr.storage import fetched
from raydetr.text import count, fold_name, shortlist
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


class CocoImages(Dataset):
    """The images of one split with their boxes.

    ``dataset[i]`` is ``image, target``, drawn for the epoch of the last :meth:`set_epoch`; ``dataset[epoch, i]`` is drawn for ``epoch``.
    ``dataset[epoch, i, size]`` is ``image, target, size``: what ``image`` is to be padded to, see :func:`raydetr.data.loader.collate`.
    ``image`` is float32 [3, h, w], resized and normalized by the transforms. ``target`` is a dict with, for n boxes:

    - ``boxes``: float32 [n, 4], cxcywh, normalized by the size of ``image``
    - ``labels``: int64 [n] in 0..K-1
    - ``area``: float32 [n], in pixels of the image file
    - ``iscrowd``: int64 [n], always 0 (crowd regions are not learned)
    - ``image_id``: int64 [1]
    - ``masks``: with ``masks`` only, bool [n, h, w] (where there is no mask, nothing is set), and ``has_mask``: bool [n]
    - ``orig_size`` and ``size``: int64 [2], height and width of the image file and of ``image``

    Args:
        split: Where the data set is, see :func:`find_split`.
        transforms: What happens to an image and its boxes, see :mod:`raydetr.data.transforms`.
        seed: What random transforms follow from, beside epoch and index.
        categories: The categories in label order, of a trained model or of the training set. The file's categories are found among them
            (:func:`raydetr.data.categories.match_categories`), and ``coco`` carries their ids. Without it, labels follow the ascending
            category ids of the file.
        masks: Whether targets have masks.

    Attributes:
        coco: The content of the COCO file, see :func:`load_coco`.
        warnings: What was left out, filled in or corrected; one line each.
        categories: ``{"id", "name"}`` of each label, in label order.
        image_ids: The image ids, in the order of the indices.
        files: (path, annotated (width, height)) of each image.
        images: What decodes a file of ``files``; assign, for example, a :class:`raydetr.data.cache.DecodedImages`.
        rles: The masks of each image's boxes as RLEs; None without masks.
        target_masks: Whether targets have the masks, if there are any.
        copy_paste: Probability that objects of another image are pasted into an image, see :mod:`raydetr.data.copy_paste`.
        decode_masks: What decodes masks, called with a file of ``files`` and its RLEs; returns bool [n, height, width]. Assign, for
            example, the method of a :class:`raydetr.data.cache.DecodedImages`.

    Raises:
        UserError: See :func:`load_coco`; also if a category with boxes is not among ``categories``.
    """

    def __init__(
        self,
        split: Split,
        transforms: Callable,
        seed: int = 0,
        categories: Sequence[Mapping[str, Any]] | None = None,
        masks: bool = False,
    ):
        self.split, self.transforms, self.seed = split, transforms, seed
        self.images: Callable[[Path, tuple[int, int]], torch.Tensor] = split.read
        self.coco, self.warnings = load_coco(split.annotations, split.images, split.exif, split.max_megapixels, masks=masks)
        self.categories = self.coco["categories"]
        if categories is not None:
            self.categories = [{"id": each["id"], "name": each["name"]} for each in categories]
            self.warnings += _use_categories(self.coco, self.categories, split.annotations)
        self.image_ids = [image["id"] for image in self.coco["images"]]
        self.files = [
            (image_path(self.split.images, image["file_name"]), (image["width"], image["height"])) for image in self.coco["images"]
        ]
        self.epoch = 0
        self._pack()
        self.rles: list[list[dict[str, Any]]] | None = self._pack_masks() if masks else None
        self.decode_masks: Callable[[Path, tuple[int, int], Sequence[Mapping[str, Any]]], np.ndarray] = _decode_masks
        self.target_masks, self.copy_paste = masks, 0.0

    def _pack(self) -> None:
        from torchvision.ops import box_convert  # takes as long to import as torch: not for those who only read annotations

        # Whole tensors instead of a million small objects: reading those copies them into every loading process (reference counts).
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        rows = {image_id: row for row, image_id in enumerate(self.image_ids)}
        boxes = [annotation for annotation in self.coco["annotations"] if not annotation["iscrowd"]]
        boxes.sort(key=lambda annotation: rows[annotation["image_id"]])  # stable: an image's boxes stay in the file's order
        per_image = np.bincount([rows[each["image_id"]] for each in boxes], minlength=len(rows))
        self._starts = np.concatenate([[0], np.cumsum(per_image)])
        self._labels = torch.tensor([label_of[each["category_id"]] for each in boxes], dtype=torch.int64)
        self._area = torch.tensor([each["area"] for each in boxes], dtype=torch.float32)
        xywh = torch.tensor([each["bbox"] for each in boxes], dtype=torch.float64).view(-1, 4)
        self._xyxy = box_convert(xywh, "xywh", "xyxy").float()

    def selected(self, rows: Iterable[int], transforms: Callable | None = None) -> "CocoImages":
        """Return a data set of some of the images; it has no warnings of its own.

        Args:
            rows: Positions of the images.
            transforms: Their transforms; None: as before.
        """
        rows = sorted(map(int, rows))
        ids = {self.image_ids[row] for row in rows}
        annotations = [each for each in self.coco["annotations"] if each["image_id"] in ids]
        coco = {**self.coco, "images": [self.coco["images"][row] for row in rows], "annotations": annotations}
        return self._with(coco, [self.files[row] for row in rows], transforms or self.transforms)

    def joined(self, other: "CocoImages") -> "CocoImages":
        """Return a data set of the images of both, with new ids for those of ``other``, which has the same categories."""
        ids = {each: self.image_ids[-1] + 1 + row for row, each in enumerate(other.image_ids)}
        images = [{**each, "id": ids[each["id"]]} for each in other.coco["images"]]
        boxes = [{**each, "image_id": ids[each["image_id"]]} for each in other.coco["annotations"]]
        annotations = [{**each, "id": number} for number, each in enumerate([*self.coco["annotations"], *boxes], 1)]
        coco = {**self.coco, "images": [*self.coco["images"], *images], "annotations": annotations}
        return self._with(coco, self.files + other.files, self.transforms)

    def _with(self, coco: dict[str, list[dict]], files: list, transforms: Callable) -> "CocoImages":
        changed = copy.copy(self)
        changed.coco, changed.files, changed.transforms, changed.warnings = coco, files, transforms, []
        changed.image_ids = [image["id"] for image in coco["images"]]
        changed._pack()
        changed.rles = None if self.rles is None else changed._pack_masks()
        return changed

    def _pack_masks(self) -> list[list[dict[str, Any]]]:
        rles: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in self.image_ids}
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.coco["images"]}
        there: dict[int, list[bool]] = {image_id: [] for image_id in self.image_ids}
        for each in self.coco["annotations"]:
            if not each["iscrowd"]:
                image_id = each["image_id"]
                rles[image_id].append(each["segmentation"] or no_mask(sizes[image_id]))
                there[image_id].append(each["segmentation"] is not None)
        self._has_mask = torch.tensor([one for of_image in there.values() for one in of_image], dtype=torch.bool)
        self._with_mask = [row for row, of_image in enumerate(there.values()) if any(of_image)]  # the images to cut objects out of
        return list(rles.values())

    @property
    def has_masks(self) -> bool:
        """Whether a box of the set has a mask; there are none if the set is made without ``masks``."""
        return self.rles is not None and bool(self._has_mask.any())

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw random transforms, and the order of a training loader, for ``epoch`` (from 0) from now on."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple) -> tuple:
        from torchvision.ops import box_convert

        epoch, index, *size = index if isinstance(index, tuple) else (self.epoch, index)
        scene = self._scene(index)
        if self.copy_paste:
            scene = self._with_pasted(scene, epoch, index)
        orig_size = scene.pixels.shape[-2:]
        masks = scene.masks.view(torch.uint8) if self.target_masks and scene.masks is not None else None
        image, boxes, masks = self._transformed(scene.pixels, scene.xyxy, epoch, index, masks)
        image, xyxy = image.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor)
        keep = (xyxy[:, 2:] > xyxy[:, :2]).all(1)  # a crop leaves boxes without area
        height, width = image.shape[-2:]
        target = {
            "boxes": box_convert(xyxy[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height]),
            "labels": scene.labels[keep],
            "area": scene.area[keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor([height, width]),
        }
        if masks is not None:
            target |= {"masks": masks.as_subclass(torch.Tensor)[keep].bool(), "has_mask": scene.has_mask[keep]}
        return image, target, *size

    def _scene(self, index: int) -> Scene:
        """Return an image as it is in the file, with its objects."""
        pixels, mine = self.images(*self.files[index]), slice(self._starts[index], self._starts[index + 1])
        xyxy = _clip(self._xyxy[mine], (pixels.shape[-2], pixels.shape[-1]))
        if self.rles is None:
            return Scene(pixels, xyxy, self._labels[mine], self._area[mine])
        masks = torch.from_numpy(self.decode_masks(*self.files[index], self.rles[index]))
        return Scene(pixels, xyxy, self._labels[mine], self._area[mine], masks, self._has_mask[mine])

    def _with_pasted(self, scene: Scene, epoch: int, index: int) -> Scene:
        from raydetr.data.copy_paste import paste  # torchvision, see _pack
        from raydetr.data.transforms import drawn_from

        with drawn_from(self.seed, epoch, index, 1):  # apart from the transforms, which are those of size_of
            if torch.rand(()) >= self.copy_paste:
                return scene
            others = [row for row in self._with_mask if row != index]
            return paste(scene, self._scene(others[int(torch.randint(len(others), ()))])) if others else scene

    def _transformed(
        self, pixels: torch.Tensor, xyxy: torch.Tensor, epoch: int, index: int, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        from torchvision import tv_tensors

        from raydetr.data.transforms import drawn_from

        size = (pixels.shape[-2], pixels.shape[-1])
        with drawn_from(self.seed, epoch, index):
            boxes = tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]  # checked as a Tensor
            if masks is None:
                return (*self.transforms(tv_tensors.Image(pixels), boxes), None)
            return self.transforms(tv_tensors.Image(pixels), boxes, tv_tensors.Mask(masks))

    def size_of(self, epoch: int, index: int) -> tuple[int, int]:
        """Return the height and width of a transformed image, in pixels, without reading its file.

        Args:
            epoch: Number of the epoch, from which the random transforms follow.
            index: Position of the image in the data set.
        """
        width, height = self.files[index][1]
        pixels = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
        image, *_ = self._transformed(pixels, torch.zeros(0, 4), epoch, index)
        return image.shape[-2], image.shape[-1]


def _decode_masks(_path: Path, size: tuple[int, int], rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    width, height = size
    return decode_masks(rles, (height, width))


def _clip(xyxy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return xyxy.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def _use_categories(coco: dict[str, list[dict]], categories: list[dict], path: str | Path) -> list[str]:
    """Give the categories of ``coco`` the ids that the same ones have in ``categories``; return warnings.

    Raises:
        UserError: If an annotation's category is not among them, or may be several of them.
    """
    positions = match_categories(coco["categories"], categories)
    new_ids = {
        each["id"]: None if position is None else categories[position]["id"]
        for each, position in zip(coco["categories"], positions, strict=True)
    }
    names = {each["id"]: each["name"] for each in coco["categories"]}
    for annotation in coco["annotations"]:
        old = annotation["category_id"]
        if new_ids[old] is None:
            known = [each["name"] for each in categories]
            alike = [short(name) for name in known if fold_name(name) == fold_name(names[old])]
            why = f"cannot be told from {shortlist(alike)}" if alike else f"is not among those of the training: {short(known)}"
            raise UserError(f"{path}: category {short(names[old])} (id {old}, image id {annotation['image_id']}) {why}")
        annotation["category_id"] = new_ids[old]
    coco["categories"] = [dict(each) for each in categories]
    moved = sum(new is not None and new != old for old, new in new_ids.items())
    return [f"{path}: {moved} categories have other ids than in training; they were found by name"] if moved else []
