"""Read annotations of the VGG Image Annotator, version 1 or 2: an export as JSON or CSV, or a saved project."""

import csv
import dataclasses
import json
from collections import Counter
from pathlib import Path

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    DEFAULT_CATEGORY,
    LabeledImage,
    Notes,
    Options,
    add_object,
    find_image,
    note_unused,
    open_image,
    read_json,
    read_text,
    split_folders,
)
from raydetr.errors import UserError
from raydetr.values import short

YES = {"1", "true", "yes", "y", "x", "on"}  # values that only say that an attribute applies
NO = {"0", "false", "no", "n", "off"}


@dataclasses.dataclass
class Region:
    """One region of a VIA file; ``where`` names it in messages."""

    where: str
    shape: dict
    attributes: dict


@dataclasses.dataclass
class Entry:
    """One image of a VIA file; ``size`` is its length in bytes when it was annotated, -1 where VIA did not know."""

    filename: str
    size: int
    regions: list[Region]


def read_via(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split.

    ``src`` is an annotation file beside its images, a folder with one, or a folder with ``train`` and ``val`` (valid, validation), each
    with one. Without any of them, every subfolder with an annotation file counts as part of train.

    The category of a region is the value of ``options.attribute``, by default of the only attribute with values. Where each region has one
    of several attributes, and its value only says yes or repeats the name, the name of the attribute is the category. ``options.category``
    is that of regions without a value, or of all where no attribute is given.

    Args:
        src: Folder or file.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read, or it is not clear what the categories are.
    """
    files = {split: [(each, "") for each in found] for split, found in _files(src, notes).items()}
    if sum(map(len, files.values())) > len(files):
        files = {split: [(file, f"{file.parent.name}/") for file, _ in found] for split, found in files.items()}
    entries = {file: read_entries(file) for found in files.values() for file, _ in found}
    regions = [region for part in entries.values() for entry in part for region in entry.regions]
    categories = _Categories(regions, options, src, notes)
    splits = {}
    for split, found in files.items():
        splits[split] = [image for file, prefix in found for image in _images(file, entries[file], prefix, categories, options, notes)]
    return splits


def _files(src: Path, notes: Notes) -> dict[str, list[Path]]:
    """The annotation files of each split."""
    if src.is_file():
        return {"train": [src]}
    folders = split_folders(src, notes)
    if list(folders) == ["train"] and not _annotation_files(folders["train"]):
        below = sorted(folder for folder in folders["train"].iterdir() if folder.is_dir() and _annotation_files(folder))
        if below:
            return {"train": [annotation_file(folder) for folder in below]}
    return {split: [annotation_file(folder)] for split, folder in folders.items()}


def _annotation_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob("via*.csv")])


def annotation_file(folder: Path) -> Path:
    """Return the annotation file of a folder: via_region_data.json, else the only via*.json, the only *.json, or the only via*.csv.

    Among several files those that are VIA's by their content count. Raise UserError where that leaves none or several.
    """
    found = _annotation_files(folder)
    as_json = [file for file in found if file.suffix == ".json"]
    for some in (
        [file for file in found if file.name == "via_region_data.json"],
        [file for file in as_json if file.name.startswith("via")],
        as_json,
        found,
    ):
        if len(some) > 1:
            some = [file for file in some if is_via_file(file)] or some
        if len(some) == 1:
            return some[0]
        if some:
            names = ", ".join(file.name for file in some)
            raise UserError(f"{folder}: which is the VIA file, {names}? Keep one there, or name the file instead of the folder")
    raise UserError(f"{folder}: no VIA annotation file (*.json) in it")


def is_via_file(file: Path) -> bool:
    """Return whether the content of a file is an annotation of VIA with at least one image."""
    try:
        return bool(read_entries(file))
    except UserError:
        return False


def is_via(content: object) -> bool:
    """Return whether JSON content is a VIA export or project of version 1 or 2."""
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    return isinstance(content, dict) and all(isinstance(entry, dict) and "regions" in entry for entry in content.values())


def read_entries(file: Path) -> list[Entry]:
    """Return what a VIA file says about each image, sorted by file name.

    Raises:
        UserError: The file is not one of VIA, or an entry of it is not as it should be.
    """
    content = _read_csv(file) if file.suffix.lower() == ".csv" else read_json(file)
    if not is_via(content):
        raise UserError(f"{file}: not a file of VIA version 1 or 2: {_found_instead(content)}")
    content = content.get("_via_img_metadata", content)
    entries = sorted((_entry(file, key, entry) for key, entry in content.items()), key=lambda entry: entry.filename)
    twice = [name for name, times in Counter(entry.filename for entry in entries).items() if times > 1]
    if twice:
        raise UserError(f"{file}: {twice[0]} appears twice, with different byte sizes; remove the outdated entry in VIA")
    return entries


def _found_instead(content: object) -> str:
    if isinstance(content, dict) and "images" in content and "categories" in content:
        return "it is a COCO file; convert it with --from coco"
    if isinstance(content, dict) and {"project", "metadata", "file"} <= content.keys():
        return "it is a project of VIA 3; export it from there as COCO or CSV of version 2"
    return "every entry must be an image with its regions"


def _read_csv(file: Path) -> dict:
    """VIA's CSV export as the content of its JSON export: one row per region, one without a shape for an image without regions."""
    rows = csv.DictReader(read_text(file).splitlines())
    entries: dict[str, dict] = {}
    if not {"filename", "region_shape_attributes", "region_attributes"} <= set(rows.fieldnames or ()):
        raise UserError(f"{file}: not a CSV export of VIA: a header with filename, region_shape_attributes, region_attributes is missing")
    for number, row in enumerate(rows, 2):
        try:
            shape, attributes = json.loads(row["region_shape_attributes"] or "{}"), json.loads(row["region_attributes"] or "{}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not valid JSON in a region ({error})") from None
        size = row.get("file_size") or ""
        size = int(size) if size.isdecimal() else -1
        entry = entries.setdefault(f"{row['filename']}{size}", {"filename": row["filename"], "size": size, "regions": []})
        if shape:
            entry["regions"].append({"shape_attributes": shape, "region_attributes": attributes})
    return entries


def _entry(file: Path, key: str, entry: dict) -> Entry:
    filename, size, regions = entry.get("filename"), entry.get("size"), entry["regions"] or []
    if not isinstance(filename, str) or not filename:
        raise UserError(f"{file}: entry {key!r} has no filename")
    if isinstance(regions, dict):  # version 1 numbers its regions
        regions = [regions[number] for number in sorted(regions, key=lambda number: (len(number), number))]
    regions = regions if isinstance(regions, list) else [regions]  # which is refused as a region below
    parts = [_region(f"{filename} region {number}", region, file) for number, region in enumerate(regions)]
    return Entry(filename, size if isinstance(size, int) else -1, parts)


def _region(where: str, region: object, file: Path) -> Region:
    if isinstance(region, dict):
        shape, attributes = (region.get(part) or {} for part in ("shape_attributes", "region_attributes"))
        if isinstance(shape, dict) and isinstance(attributes, dict):
            return Region(where, shape, attributes)
    raise UserError(f"{file}: {where} is not a VIA region")


def _values(value: object, where: str) -> list[str]:
    """The values of a region attribute: text, a radio or dropdown choice, or the ticked boxes of a group; [] where it is empty."""
    if isinstance(value, dict):
        return [ticked for ticked, is_ticked in value.items() if is_ticked]
    if isinstance(value, bool):
        return ["true"] if value else []
    if value is None or isinstance(value, (str, int, float)):
        return [str(value).strip()] if value is not None and str(value).strip() else []
    raise UserError(f"{where}: an attribute holds {short(value)}, which is no text")


class _Categories:
    """The category of each region, from the attributes of all of them."""

    def __init__(self, regions: list[Region], options: Options, src: Path, notes: Notes):
        self.src, self.attribute, self.default, self.presence = src, options.attribute, options.category, False
        if not regions:
            raise UserError(f"{src}: no image has a region; there is nothing to learn from")
        if self.default and not self.attribute:
            return
        used = Counter(name for region in regions for name, value in region.attributes.items() if _values(value, region.where))
        known = ", ".join(f"{name} ({count} of {len(regions)} regions)" for name, count in used.items())
        if self.attribute:
            if self.attribute not in used:
                raise UserError(f"{src}: no region has a value for the attribute {self.attribute!r}; there are: {known or 'none'}")
        elif _presence_is_category(regions, used):
            self.presence = True
            for name in sorted({name for region in regions for name in _present(region)}):
                notes.add("attribute taken as a category, as its values only say that it applies (else choose one with --attribute)", name)
        elif len(used) > 1:
            raise UserError(f"{src}: which region attribute is the category? Choose one with --attribute: {known}")
        elif used:
            self.attribute = next(iter(used))
        else:
            self.default = DEFAULT_CATEGORY
            notes.add(f"file without a category for any region, all become {DEFAULT_CATEGORY!r} (name it with --category NAME)", str(src))

    def of(self, region: Region) -> str:
        """Return the category of a region; raise UserError where it has none or several."""
        if self.presence:
            return _present(region)[0]
        values = _values(region.attributes.get(self.attribute), region.where) if self.attribute else []
        if len(values) > 1:
            raise UserError(
                f"{self.src}: {region.where}: {self.attribute!r} has several values ({', '.join(values)}); an object has one category"
            )
        if not values and not self.default:
            raise UserError(
                f"{self.src}: {region.where}: no value for {self.attribute!r}; give it one in VIA, or name it with --category NAME"
            )
        return values[0] if values else str(self.default)


def _presence_is_category(regions: list[Region], used: Counter[str]) -> bool:
    """Whether each region has exactly one attribute that applies, and the values only say so.

    A single attribute counts only if its values say yes and nothing else: they could be class numbers.
    """
    if len(used) == 1 and not all(_flag(name, region.attributes.get(name), region) for name in used for region in regions):
        return False
    if not all(len(_present(region)) == 1 for region in regions):
        return False
    return len({_present(region)[0] for region in regions}) > 1 or bool(used)


def _present(region: Region) -> list[str]:
    """The attributes of a region that apply; [] where a value is more than a yes or no."""
    filled = {name: value for name, value in region.attributes.items() if _values(value, region.where)}
    if not filled:
        return list(region.attributes) if len(region.attributes) == 1 else []
    flags = {name: _flag(name, value, region) for name, value in filled.items()}
    return [] if None in flags.values() else [name for name, applies in flags.items() if applies]


def _flag(name: str, value: object, region: Region) -> bool | None:
    """Whether an attribute applies: True, False, or None where its value says more than that."""
    values = [each.casefold() for each in _values(value, region.where)]
    if len(values) == 1 and values[0] in {*YES, name.strip().casefold()}:
        return True
    return False if not values or (len(values) == 1 and values[0] in NO) else None


def _images(file: Path, entries: list[Entry], prefix: str, categories: _Categories, options: Options, notes: Notes) -> list[LabeledImage]:
    finder, images, absent = ImageFinder(file.parent), [], []
    for entry in entries:
        if not finder.candidates(entry.filename):
            finder.check_name(entry.filename, file)
            absent.append(entry)
    labeled = [entry.filename for entry in absent if entry.regions]
    if labeled:
        names = ", ".join(labeled[:3]) + (", ..." if len(labeled) > 3 else "")
        raise UserError(
            f"{file}: {len(labeled)} annotated images are not in {finder.folder}: {names}; put them there or remove them in VIA"
        )
    for entry in absent:
        notes.add("image without regions is not on disk, left out", entry.filename)
    for entry in (entry for entry in entries if entry not in absent):
        images.append(_image(file, entry, finder, categories, options, notes))
    note_unused(finder, {image.name for image in images}, "image is not in the VIA file, left out", notes)
    for image in images:
        image.name = prefix + image.name
    return images


def _image(file: Path, entry: Entry, finder: ImageFinder, categories: _Categories, options: Options, notes: Notes) -> LabeledImage:
    drawn = [(region, _shape(region, file)) for region in entry.regions]
    extent = shapes.extent(shape for _, shape in drawn)
    name = find_image(finder, entry.filename, file, notes)
    image = open_image(finder, name, file, options, notes, extent=extent)
    if 0 < entry.size != image.path.stat().st_size:
        notes.add("image has changed since it was annotated (other byte size)", entry.filename)
    for region, shape in drawn:
        add_object(image, categories.of(region) if shape.area else "", shape, region.where, notes)
    return image


def _shape(region: Region, file: Path) -> shapes.Shape:
    try:
        return shapes.from_via(region.shape)
    except ValueError as error:
        raise UserError(f"{file}: {region.where}: {error}") from None
