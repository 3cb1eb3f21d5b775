"""Write a mended copy of a data set, where mending is safe: no label changes its meaning, and what training would leave out goes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from raydetr.config import Data
from raydetr.data.check.check import check
from raydetr.data.check.findings import GRAVE
from raydetr.data.coco import Split, annotated_size, box_of, category_name, find_split, has_split, read_coco
from raydetr.data.file_names import locate_files
from raydetr.data.formats import shapes
from raydetr.data.formats.labels import Notes
from raydetr.data.formats.output import check_new, new_folder, put_image
from raydetr.data.images import image_path, read_header
from raydetr.data.tools.folder import SPLITS, write_coco
from raydetr.errors import UserError
from raydetr.text import count
from raydetr.values import as_number, is_finite, plain, short, whole_number


@dataclasses.dataclass
class FixSummary:
    """What :func:`fix` wrote.

    Attributes:
        folder: The mended copy.
        changes: A line for each kind of change, with its number and the first places.
        number: Number of changes.
    """

    folder: Path
    changes: list[str]
    number: int

    def text(self) -> str:
        """Return a few lines for the terminal."""
        if not self.changes:
            return f"Wrote {self.folder}: a copy without any change, there was nothing to mend."
        return "\n".join([f"Wrote {self.folder} with {count(self.number, 'change')}:", *(f"  {line}" for line in self.changes)])


def fix(data: Data | str | Path, out: str | Path, copy: bool = False) -> FixSummary:
    """Write a copy of a data set in which everything is mended that can be mended without a person's judgement.

    Boxes and outlines that reach beyond their image are clipped. Annotations that training would leave out (without area, outside the
    image, of no image) and second annotations with the same image, category and box are dropped. Images without a readable file are
    dropped with their annotations. Ids that are text, missing or given twice are numbered anew, missing sizes, areas and ``iscrowd`` are
    filled in, and file names are spelled as on disk. What is left for a person, ``raydetr data check`` reports of the copy.

    Args:
        data: The settings ``data.*``, or a COCO folder; nothing in it changes.
        out: Folder to write; it must be empty or not exist.
        copy: Copy the images instead of linking them.

    Raises:
        UserError: All boxes seem to be in another format, it is not clear what an id refers to, nothing would be left of a split, or
            something cannot be read or written.
    """
    data, out = data if isinstance(data, Data) else Data(path=str(data)), Path(out)
    check_new(out)
    grave = [finding for finding in check(data, quick=True, test=True).warnings if finding.weight == GRAVE]
    if grave:
        raise UserError(f"data check --fix: nothing is mended: {grave[0]}")
    notes = Notes()
    names = [name for name in SPLITS if has_split(data, name)]
    with new_folder(out) as partial:
        for name in names:
            content, files = _mend(find_split(data, name), name, notes)
            for entry in content["images"]:
                put_image(files[entry["file_name"]].resolve(), partial / f"{name}2017" / entry["file_name"], copy)
            write_coco(partial / "annotations" / f"custom_{name}.json", content)
    return FixSummary(out, notes.lines(), sum(map(len, notes.values())))


def _mend(split: Split, name: str, notes: Notes) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the mended content of a split's annotation file, and the files of its images by their names."""
    content = read_coco(split.annotations)
    images, images_by_id, files = _mend_images(content["images"], split, name, notes)
    if not images:
        raise UserError(f"{split.annotations}: no image of it can be read in {split.images}; nothing can be mended")
    categories, category_ids = _mend_categories(content["categories"], split.annotations, name, notes)
    annotations = _mend_annotations(content["annotations"], images_by_id, category_ids, name, notes)
    return content | {"images": images, "annotations": annotations, "categories": categories}, files


def _key(value: Any) -> Any:
    """What an id is compared by: 7, 7.0 and "7" are one, other text is an id of its own; None for what is no id."""
    number = whole_number(value)
    return value.strip() or None if number is None and isinstance(value, str) else number


def _mend_images(entries: Sequence[dict], split: Split, name: str, notes: Notes) -> tuple[list[dict], dict[Any, dict], dict[str, Path]]:
    """Return the images that are kept, the kept image that each id of the file means, and the files by name."""
    names: dict[Any, Any] = {}
    for entry in entries:
        key = _key(entry.get("id"))
        if key is not None and names.setdefault(key, entry.get("file_name")) != entry.get("file_name"):
            which = f"{plain(names[key])} and {plain(entry.get('file_name'))}"
            raise UserError(f"{split.annotations}: image id {short(entry['id'])} means both {which}; nothing is mended: give each its own")
    located = locate_files(split.images, [each["file_name"] for each in entries if _is_inside(split.images, each.get("file_name"))])
    kept: dict[str, dict] = {}
    by_id: dict[Any, dict] = {}
    for entry in entries:
        where, key = f"{name}: {plain(entry.get('file_name'))} (image id {short(entry.get('id'))})", _key(entry.get("id"))
        image = None if key is None else _mend_image(entry, located.found, split, where, notes)
        if image is None:
            notes.add("image without an id or without a readable file, left out with its annotations", where)
            continue
        if image["file_name"] in kept:
            notes.add("file listed as several images, joined to one", where)
        by_id[key] = kept.setdefault(image["file_name"], image)
    _number(list(kept.values()), f"{name}: image ids that are text or given twice, numbered anew", notes)
    return list(kept.values()), by_id, {file_name: image_path(split.images, file_name) for file_name in kept}


def _is_inside(folder: Path, file_name: Any) -> bool:
    try:
        image_path(folder, file_name)
    except UserError:
        return False
    return True


def _mend_image(entry: dict, found: Mapping[str, str], split: Split, where: str, notes: Notes) -> dict | None:
    """Return the entry with the name of its file on disk and a size; None where there is no file that can be read."""
    name = entry.get("file_name")
    file_name = found.get(name) if isinstance(name, str) else None
    if file_name is None:
        return None
    try:
        header = read_header(image_path(split.images, file_name), split.max_megapixels)
    except UserError:
        return None
    if file_name != name:
        notes.add("file name spelled as on disk", where)
    size = annotated_size(entry)
    if size is None:
        notes.add("image without width and height, read from its file", where)
    width, height = size or header.size(split.exif)
    return entry | {"file_name": file_name, "width": width, "height": height}


def _number(entries: Sequence[dict], text: str, notes: Notes) -> None:
    """Give entries whole numbers as ids: those they have, or those from 1 where one is missing, not positive, or given twice."""
    ids = [whole_number(entry.get("id")) for entry in entries]
    if None in ids or len(set(ids)) < len(ids) or any(entry["id"] != number for entry, number in zip(entries, ids, strict=True)):
        changed = 0
        for number, entry in enumerate(entries, 1):
            changed += entry.get("id") != number
            entry["id"] = number
        notes.add(text, f"{changed} of {len(entries)}")


def _mend_categories(entries: Sequence[dict], file: Path, name: str, notes: Notes) -> tuple[list[dict], dict[Any, dict]]:
    """Return the categories, and the one that each id of the file means."""
    by_id: dict[Any, dict] = {}
    for number, entry in enumerate(entries, 1):
        key = _key(entry.get("id"))
        if key is None:
            raise UserError(f"{file}: category number {number} has no id; nothing is mended: give it one")
        if key in by_id and category_name(by_id[key]) != category_name(entry):
            raise UserError(f"{file}: category id {short(entry['id'])} is used twice, under different names; nothing is mended")
        if key in by_id:
            notes.add("category listed twice, joined to one", f"{name}: {plain(entry.get('name'))}")
        by_id.setdefault(key, dict(entry))
    _number(list(by_id.values()), f"{name}: category ids that are text, numbered anew", notes)
    return list(by_id.values()), by_id


def _mend_annotations(
    entries: Sequence[dict], images: Mapping[Any, dict], categories: Mapping[Any, dict], name: str, notes: Notes
) -> list[dict]:
    kept, seen = [], set()
    for number, entry in enumerate(entries, 1):
        which = f"annotation id {short(entry['id'])}" if "id" in entry else f"annotation number {number}"
        image, category = images.get(_key(entry.get("image_id"))), categories.get(_key(entry.get("category_id")))
        where = f"{name}: {which}" + (f" in {plain(image['file_name'])}" if image else "")
        if image is None:
            notes.add("annotation of no image, left out", where)
            continue
        mended = _mend_annotation(entry, image, where, notes)
        if mended is None:
            continue
        # An unknown category stays as it is: which one is meant, only a person can tell, and the check names it.
        mended |= {"image_id": image["id"], "category_id": category["id"] if category else entry.get("category_id")}
        key = (image["id"], str(mended["category_id"]), *(box_of(mended) or [number]))
        if key in seen and not mended["iscrowd"]:
            notes.add("box there twice, one left out", where)
            continue
        seen.add(key)
        kept.append(mended)
    ids = [each.get("id") for each in kept]
    if any(type(each) is not int or each < 1 for each in ids) or len(set(ids)) < len(ids):
        changed = sum(each.get("id") != number for number, each in enumerate(kept, 1))
        notes.add(f"{name}: annotation ids that are missing, text, 0 or given twice, numbered anew", f"{changed} of {len(kept)}")
        kept = [each | {"id": number} for number, each in enumerate(kept, 1)]
    return kept


def _mend_annotation(entry: dict, image: dict, where: str, notes: Notes) -> dict | None:
    """Return an annotation whose box is inside its image; None where nothing of it can be found there."""
    mended = dict(entry)
    if entry.get("iscrowd") is None:
        mended["iscrowd"] = 0
    elif as_number(entry["iscrowd"]) in (0, 1):
        mended["iscrowd"] = int(as_number(entry["iscrowd"]))
    xywh = box_of(entry)
    if xywh is None:
        return mended  # the check names it
    if not all(map(is_finite, xywh)) or min(xywh[2:]) <= 0:
        notes.add("box without area, left out", f"{where}: {short(entry['bbox'])}")
        return None
    whole = shapes.from_box(*xywh)
    inside = shapes.clip(whole, image["width"], image["height"])
    if not inside.area or min(inside.box[2:]) <= 0:
        notes.add("box outside its image, left out", f"{where}: {short(entry['bbox'])}")
        return None
    mended["bbox"] = list(xywh if inside is whole else inside.box)
    if inside is not whole:
        notes.add("box clipped at the edge of its image", f"{where}: {short(entry['bbox'])}")
        mended["segmentation"] = _clipped(entry.get("segmentation"), image)
        mended.pop("area", None)
    area = as_number(mended.get("area"))
    if not is_finite(area) or not 0 < area <= 1.01 * inside.area + 1:
        polygons = mended.get("segmentation")
        outlined = sum(shapes.from_polygon(_corners(each)).area for each in polygons) if _are_polygons(polygons) else 0
        mended["area"] = outlined if 0 < outlined <= 1.01 * inside.area + 1 else inside.area
        if inside is whole:
            notes.add("area computed from the outline or the box", where)
    return mended


def _clipped(segmentation: Any, image: dict) -> Any:
    """Return polygons cut at the edge of the image; anything else as it is."""
    if not _are_polygons(segmentation):
        return segmentation
    outlines = [shapes.clip(shapes.from_polygon(_corners(each)), image["width"], image["height"]) for each in segmentation]
    return [[value for corner in outline.polygon for value in corner] for outline in outlines if outline.area]


def _are_polygons(segmentation: Any) -> TypeGuard[list[list[float]]]:
    return isinstance(segmentation, list) and all(
        isinstance(each, list) and len(each) >= 6 and len(each) % 2 == 0 and all(map(is_finite, each)) for each in segmentation
    )


def _corners(polygon: list[float]) -> list[shapes.Point]:
    return list(zip(polygon[::2], polygon[1::2], strict=True))
