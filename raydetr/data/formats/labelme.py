"""Read annotations of labelme: one JSON file per image, beside it or in a folder of its own."""

import base64
import binascii
import io
import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    LabeledImage,
    LabeledObject,
    Notes,
    Options,
    add_object,
    find_files,
    find_image,
    note_unused,
    number_of,
    open_image,
    read_json,
    split_folders,
)
from raydetr.data.masks import encode_masks
from raydetr.errors import UserError
from raydetr.values import is_finite, short, whole_number


def is_labelme(content: object) -> bool:
    """Return whether JSON content is an annotation of labelme."""
    return isinstance(content, dict) and "shapes" in content and ("imagePath" in content or "imageData" in content)


def read_labelme(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split: ``src``/train and ``src``/val (valid, validation), or ``src`` alone as train.

    Polygons and rotated boxes keep their outline, circles become polygons, masks run-length encodings, rectangles are boxes. Polygons of
    one label and one ``group_id`` are one object. Points and lines are left out.

    Args:
        src: Folder.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read.
    """
    return {split: _images(folder, options, notes) for split, folder in split_folders(src, notes).items()}


def _images(folder: Path, options: Options, notes: Notes) -> list[LabeledImage]:
    finder, images = ImageFinder(folder), []
    for file in find_files(folder, ".json"):
        content = read_json(file)
        if is_labelme(content):
            images.append(_image(file, content, finder, options, notes))
        else:
            notes.add("JSON file is no annotation of labelme, left out", file.relative_to(folder).as_posix())
    if not images:
        raise UserError(f"{folder}: no annotation of labelme (*.json with shapes and imagePath) for an image there")
    note_unused(finder, {image.name for image in images}, "image without a labelme file, left out", notes)
    return images


def _image(file: Path, content: dict, finder: ImageFinder, options: Options, notes: Notes) -> LabeledImage:
    parent = file.relative_to(finder.folder).parent
    said = content.get("imagePath")
    beside = (parent / said).as_posix() if isinstance(said, str) else ""
    of_stem = finder.candidates((parent / file.stem).as_posix())
    if finder.is_exact(beside):
        name = beside
    elif not finder.candidates(said) and len(of_stem) == 1:
        name = of_stem[0]
    else:
        name = find_image(finder, said, file, notes)
    width, height = (whole_number(number_of(content.get(key))) or 0 for key in ("imageWidth", "imageHeight"))
    image = open_image(finder, name, file, options, notes, (width, height))
    if not isinstance(content["shapes"], list):
        raise UserError(f"{file}: shapes is not a list")
    groups: dict[object, int] = {}
    for number, entry in enumerate(content["shapes"], 1):
        _add(image, entry, f"{file}: shape {number}", f"{PurePosixPath(name)} shape {number}", groups, options, notes)
    return image


def _add(image: LabeledImage, entry: object, where: str, noted_as: str, groups: dict[object, int], options: Options, notes: Notes) -> None:
    """Add a shape to the image, or to the object of its group."""
    if not isinstance(entry, dict) or not isinstance(entry.get("label"), (str, int)) or not str(entry["label"]).strip():
        raise UserError(f"{where} has no label")
    kind, category = entry.get("shape_type") or "polygon", options.category or str(entry["label"]).strip()
    shape = _shape(entry, kind, where)
    if kind == "mask":
        painted = _mask(entry, image)
        if painted is not None:
            _add_mask(image, category, painted, noted_as, notes)
            return
        notes.add("mask cannot be read, taken as its box", noted_as)
    before = len(image.objects)
    add_object(image, category, shape, noted_as, notes, outline=kind not in ("rectangle", "mask"))
    group, is_added = entry.get("group_id"), len(image.objects) > before
    if group is None or kind != "polygon" or not is_added:
        return
    key = (entry["label"], str(group))
    if key not in groups:
        groups[key] = before
        return
    part, whole = image.objects.pop(), image.objects[groups[key]]
    (x, y, w, h), (u, v, width, height) = part.box, whole.box
    left, top = min(x, u), min(y, v)
    whole.box = [left, top, max(x + w, u + width) - left, max(y + h, v + height) - top]
    whole.area += part.area
    if isinstance(whole.segmentation, list) and isinstance(part.segmentation, list):  # as polygons are
        whole.segmentation = whole.segmentation + part.segmentation


def _mask(entry: dict, image: LabeledImage) -> np.ndarray | None:
    """Return a mask as bool [height, width] of the annotated image; None where it cannot be read.

    labelme keeps the part between two points, corner pixels of it, as a PNG in base64.
    """
    (x0, y0), (x1, y1) = ([int(value) for value in point] for point in entry["points"][:2])
    width, height = round(image.width / image.scale), round(image.height / image.scale)
    if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(entry.get("mask") or "", validate=True)), formats=["PNG"]) as part:
            if part.size != (x1 - x0 + 1, y1 - y0 + 1):
                return None
            pixels = np.asarray(part.convert("L")) > 0
    except (TypeError, ValueError, OSError, binascii.Error, UnidentifiedImageError):
        return None
    mask = np.zeros((height, width), bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = pixels
    return mask


def _add_mask(image: LabeledImage, category: str, mask: np.ndarray, noted_as: str, notes: Notes) -> None:
    if image.scale != 1:
        mask = np.asarray(Image.fromarray(mask).resize((image.width, image.height), Image.Resampling.NEAREST))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        notes.add("shape without area, left out", noted_as)
        return
    x, y = int(columns[0]), int(rows[0])
    box: list[Any] = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
    image.objects.append(LabeledObject(category, box, float(mask.sum()), encode_masks(mask[None])[0]))


def _shape(entry: dict, kind: str, where: str) -> shapes.Shape:
    points = entry.get("points")
    if not isinstance(points, list) or not all(_is_point(point) for point in points):
        raise UserError(f"{where}: points {short(points)} are not pairs of numbers")
    if kind == "circle":
        if len(points) != 2:
            raise UserError(f"{where}: a circle needs two points, its center and one on its rim")
        (cx, cy), (x, y) = points
        radius = math.hypot(x - cx, y - cy)
        return shapes.from_ellipse(cx, cy, radius, radius)
    if kind in ("rectangle", "mask"):
        if len(points) < 2:
            raise UserError(f"{where}: a {kind} needs two points, opposite corners")
        return shapes.from_box(*shapes.from_polygon([tuple(point) for point in points]).box)
    if kind in ("point", "points", "line", "linestrip"):
        return shapes.from_polygon([])
    if kind in ("polygon", "rotation", "oriented_rectangle", "quad"):
        return shapes.from_polygon([tuple(point) for point in points])
    raise UserError(f"{where}: unknown shape_type {short(kind)}")


def _is_point(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(is_finite(value) and abs(value) < 1e9 for value in point)
