"""Read COCO files as annotation tools export them (Roboflow, CVAT, Label Studio, VIA), with habits that training itself does not accept."""

from pathlib import Path
from typing import Any

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    LabeledImage,
    LabeledObject,
    Notes,
    Options,
    find_files,
    find_image,
    note_overhang,
    number_of,
    open_image,
    read_json,
    read_splits,
    split_of,
)
from raydetr.data.masks import mask_area, mask_box, read_segmentation
from raydetr.errors import UserError
from raydetr.values import is_finite, short, whole_number


def is_coco(content: object) -> bool:
    """Return whether JSON content is a COCO annotation file."""
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ("images", "categories"))


def read_coco(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split.

    The split of a file is a word of its name or folder (train, val, valid, validation, test); a file without one is train. Files of test
    are left out. Ids may be numbers or text, and differ between files: categories are joined by their names. Categories without any
    annotation, such as the root category of Roboflow, are left out. Images are found in and below the folder of the file, else of ``src``,
    whatever path or URL the file gives them.

    Args:
        src: Folder or COCO file.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read, or it is not clear which file is which split.
    """
    files = [("train", src)] if src.is_file() else _split_files(src, notes)
    listed: set[str] = set()
    annotated: set[str] = set()

    def read(file: Path, finder: ImageFinder) -> list[LabeledImage]:
        reader = _Reader(file, finder, options, notes)
        images = reader.images()
        listed.update(reader.categories.values())
        annotated.update(reader.annotated)
        return images

    splits = read_splits(src, files, read, "image is in no COCO file, left out", notes)
    for name in sorted(listed - annotated) if not options.category else []:
        notes.add("category without any annotation, left out", name)
    return splits


def _split_files(src: Path, notes: Notes) -> list[tuple[str, Path]]:
    found: dict[str, list[Path]] = {}
    for file in find_files(src, ".json"):
        if is_coco(read_json(file)):
            found.setdefault(split_of(file.relative_to(src)), []).append(file)
    for file in found.pop("test", []):
        notes.add("file of the test part, left out", file.relative_to(src).as_posix())
    for split, files in found.items():
        # custom_ comes first in raydetr's own layout; captions_ and person_keypoints_ stand beside instances_ in COCO's.
        preferred = next((some for start in ("custom_", "instances_") if (some := [f for f in files if f.name.startswith(start)])), files)
        if len(preferred) > 1:
            names = ", ".join(str(file.relative_to(src)) for file in preferred[:4])
            raise UserError(f"{src}: several COCO files for {split}: {names}; name the one to convert instead of the folder")
        found[split] = preferred
    if not found:
        raise UserError(f"{src}: no COCO annotation file (*.json with images, annotations and categories) in or below it")
    if "val" in found and "train" not in found:
        raise UserError(f"{found['val'][0]}: validation annotations but no training annotations in {src}")
    return [(split, found[split][0]) for split in ("train", "val") if split in found]


class _Reader:
    """Reads one COCO file."""

    def __init__(self, file: Path, finder: ImageFinder, options: Options, notes: Notes):
        self.file, self.finder, self.options, self.notes = file, finder, options, notes
        self.content = read_json(file)
        if not is_coco(self.content) or not isinstance(self.content.get("annotations", []), list):
            raise UserError(f"{file}: not a COCO annotation file: images, annotations and categories must be lists")

        self.categories = self._categories()
        self.annotated: set[str] = set()  # names of the categories that annotations have

    def images(self) -> list[LabeledImage]:
        by_id: dict[object, LabeledImage] = {}
        for number, entry in enumerate(self._entries("images"), 1):
            where = f"{self.file}: image number {number}"
            image_id = _id(entry.get("id"), f"{where}: id")
            if image_id in by_id:
                raise UserError(f"{where}: id {short(entry.get('id'))} appears twice; give every image its own")
            name = find_image(self.finder, entry.get("file_name") or entry.get("path"), where, self.notes)
            size = (_side(entry.get("width")), _side(entry.get("height")))
            by_id[image_id] = open_image(self.finder, name, self.file, self.options, self.notes, size)
        for number, entry in enumerate(self._entries("annotations"), 1):
            self._add(entry, number, by_id)
        return list(by_id.values())

    def _entries(self, key: str) -> list[dict]:
        entries = self.content.get(key, [])
        if not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{self.file}: not a COCO annotation file: {key!r} is not a list of objects")
        return entries

    def _categories(self) -> dict[object, str]:
        names: dict[object, str] = {}
        for number, entry in enumerate(self._entries("categories"), 1):
            category_id, name = _id(entry.get("id"), f"{self.file}: id of category number {number}"), entry.get("name")
            if category_id in names:
                raise UserError(f"{self.file}: category id {short(entry.get('id'))} appears twice; give every category its own")
            if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not str(name).strip():
                raise UserError(f"{self.file}: category id {short(entry.get('id'))} has no name")
            if str(name).strip() in names.values():
                self.notes.add("category whose name several ids have, joined", str(name).strip())
            names[category_id] = str(name).strip()
        return names

    def _add(self, entry: dict, number: int, images: dict[object, LabeledImage]) -> None:
        """Add an annotation to its image."""
        which = f"annotation id {short(entry['id'])}" if "id" in entry else f"annotation number {number}"
        where = f"{self.file}: {which}"
        image = images.get(_id(entry.get("image_id"), f"{where}: image_id"))
        category = self.categories.get(_id(entry.get("category_id"), f"{where}: category_id"))
        if image is None or category is None:
            key = "image_id" if image is None else "category_id"
            raise UserError(f"{where}: {key} {short(entry[key])} is not among the file's {'images' if image is None else 'categories'}")
        self.annotated.add(category)
        crowd = whole_number(number_of(entry.get("iscrowd") or 0))
        if crowd not in (0, 1):
            raise UserError(f"{where}: iscrowd is {short(entry.get('iscrowd'))}, not 0 or 1")
        segmentation = _segmentation(entry.get("segmentation"), image, where)
        box = _box(entry.get("bbox"), segmentation, where)
        noted_as = f"{image.name} {which}"
        if box is None or min(box[2:]) <= 0:
            self.notes.add("annotation without area, left out", noted_as)
            return
        added = _object(self.options.category or category, box, number_of(entry.get("area")), segmentation, image, crowd)
        if added is None:
            self.notes.add("shape outside the image, left out", noted_as)
        else:
            note_overhang(image, tuple(value * image.scale for value in box), noted_as, self.notes)
            image.objects.append(added)


def _id(value: Any, what: str) -> object:
    """An id comparable with others: 7, 7.0 and "7" are one; text that is no number is an id of its own."""
    number = whole_number(number_of(value))
    if number is not None:
        return number
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise UserError(f"{what} is {'missing' if value is None else short(value)}; it must be a whole number or text")


def _side(value: Any) -> int:
    return whole_number(number_of(value)) or 0


def _segmentation(value: Any, image: LabeledImage, where: str) -> list[list[float]] | dict[str, Any]:
    """The polygons or the run-length encoding of an annotation; empty where there is none."""
    if isinstance(value, dict):
        if "counts" not in value or value.get("size") != [image.height, image.width]:
            raise UserError(f"{where}: a mask of size {short(value.get('size'))} in an image of {image.height} x {image.width}")
        return value
    if isinstance(value, list) and value and all(not isinstance(each, (list, dict)) for each in value):
        value = [value]  # one polygon that is not in a list
    polygons = []
    for polygon in value or []:
        polygon = [number_of(each) for each in polygon] if isinstance(polygon, list) else [None]
        if len(polygon) % 2 or not all(map(is_finite, polygon)):
            raise UserError(f"{where}: segmentation {short(value)} is not a list of polygons [x1, y1, x2, y2, ...]")
        if len(polygon) >= 6:
            polygons.append(polygon)
    return polygons


def _box(value: Any, segmentation: list[list[float]] | dict[str, Any], where: str) -> tuple[float, ...] | None:
    """xywh of an annotation, from its polygons or its mask where it has no box; None where it has none of them."""
    if not value:
        if isinstance(segmentation, dict):
            mask = _encoded(segmentation, where)
            return tuple(mask_box(mask)) if mask else None
        if not segmentation:
            return None
        return shapes.from_polygon([corner for polygon in segmentation for corner in _corners(polygon)]).box
    if isinstance(value, list):
        value = [number_of(each) for each in value]
    if not isinstance(value, list) or len(value) != 4 or not all(map(is_finite, value)):
        raise UserError(f"{where}: bbox {short(value)} is not a list of four numbers, [x, y, width, height]")
    if min(value[2:]) < 0:
        raise UserError(f"{where}: bbox {short(value)} has a negative width or height")
    return tuple(value)


def _encoded(segmentation: dict[str, Any], where: str) -> dict[str, Any] | None:
    """The compressed run-length encoding of a mask; None where it has no pixel."""
    try:
        return read_segmentation(segmentation, tuple(segmentation["size"]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _corners(polygon: list[float]) -> list[shapes.Point]:
    return list(zip(polygon[::2], polygon[1::2], strict=True))


def _object(
    category: str,
    box: tuple[float, ...],
    area: Any,
    segmentation: list[list[float]] | dict[str, Any],
    image: LabeledImage,
    crowd: int,
) -> LabeledObject | None:
    """The annotation in the pixels of the image and clipped to it; None where nothing of it is inside."""
    whole = shapes.scale(shapes.from_box(*box), image.scale)
    inside = shapes.clip(whole, image.width, image.height)
    if not inside.area or min(inside.box[2:]) <= 0:
        return None
    if isinstance(segmentation, list):
        outlines = [shapes.scale(shapes.from_polygon(_corners(polygon)), image.scale) for polygon in segmentation]
        clipped = [shapes.clip(outline, image.width, image.height) for outline in outlines]
        polygons = [outline for outline in clipped if outline.area]
        segmentation = [[value for corner in outline.polygon for value in corner] for outline in polygons]
        if inside is not whole or not is_finite(area) or not area > 0:
            area = sum(outline.area for outline in polygons) or inside.area
        elif image.scale != 1:
            area *= image.scale**2
    elif not is_finite(area) or not area > 0:
        mask = _encoded(segmentation, image.name)
        area = mask_area(mask) if mask else inside.area
    return LabeledObject(category, list(inside.box), area, segmentation, crowd)
