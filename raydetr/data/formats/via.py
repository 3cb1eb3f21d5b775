"""Labels drawn with the VGG Image Annotator, version 1 or 2 (annotations exported as JSON, or a saved project)."""

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

from raydetr.data.formats import shapes
from raydetr.data.formats.labels import Notes, Picture, add_object, open_picture, pictures_in, read_text, split_folders
from raydetr.data.images import image_path
from raydetr.errors import UserError


@dataclasses.dataclass
class Region:
    """One region as the file has it; ``place`` names it to the user."""

    place: str
    shape: dict
    attributes: dict


@dataclasses.dataclass
class Entry:
    """One picture as the file has it; ``size`` in bytes when it was labelled, -1 where VIA did not know."""

    filename: str
    size: int
    regions: list[Region]


def read_via(src: Path, category: str | None, attribute: str | None, notes: Notes) -> dict[str, list[Picture]]:
    """The labelled pictures by split: train and val, or train alone where ``src`` is one folder (or one JSON file beside its pictures).

    ``attribute``: the region attribute that says what a region shows; None takes the only one that has values. ``category``: what
    regions without a value show; without ``attribute``, what all regions show. Raises UserError for anything that cannot be read.
    """
    files = {"train": src} if src.is_file() else {split: annotation_file(folder) for split, folder in split_folders(src).items()}
    entries = {split: read_entries(file) for split, file in files.items()}
    if not category or attribute:
        attribute = _choose_attribute([each for part in entries.values() for each in part], attribute, category, src)
    return {split: _pictures(files[split], part, category, attribute, notes) for split, part in entries.items()}


def annotation_file(folder: Path) -> Path:
    """The annotation file of a folder: via_region_data.json, else the only via*.json, else the only *.json."""
    found = sorted(folder.glob("*.json"))
    for some in ([f for f in found if f.name == "via_region_data.json"], [f for f in found if f.name.startswith("via")], found):
        if len(some) == 1:
            return some[0]
        if some:
            names = ", ".join(file.name for file in some)
            raise UserError(f"{folder}: which is the VIA file, {names}? Keep one there, or name the file instead of the folder")
    raise UserError(f"{folder}: no VIA annotation file (*.json) in it")


def read_entries(file: Path) -> list[Entry]:
    """What a VIA file says of each picture, sorted by file name; raises UserError naming file and entry for anything else."""
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None
    if isinstance(content, dict):
        content = content.get("_via_img_metadata", content)
    if not isinstance(content, dict) or not all(isinstance(entry, dict) and "regions" in entry for entry in content.values()):
        raise UserError(f"{file}: not a file of VIA version 1 or 2: every entry must be a picture with its regions")
    entries = sorted((_entry(file, key, entry) for key, entry in content.items()), key=lambda entry: entry.filename)
    twice = [name for name, times in Counter(entry.filename for entry in entries).items() if times > 1]
    if twice:
        raise UserError(f"{file}: {twice[0]} stands there twice, with different byte sizes; remove the outdated entry in VIA")
    return entries


def _entry(file: Path, key: str, entry: dict) -> Entry:
    filename, size, regions = entry.get("filename"), entry.get("size"), entry["regions"] or []
    if not isinstance(filename, str) or not filename:
        raise UserError(f"{file}: entry {key!r} has no filename")
    if isinstance(regions, dict):  # version 1 numbers its regions
        regions = [regions[number] for number in sorted(regions, key=lambda number: (len(number), number))]
    parts = []
    regions = regions if isinstance(regions, list) else [regions]  # which is no region, as will be found
    parts = [_region(f"{filename} region {number}", region, file) for number, region in enumerate(regions)]
    return Entry(filename, size if isinstance(size, int) else -1, parts)


def _region(place: str, region: object, file: Path) -> Region:
    if isinstance(region, dict):
        shape, attributes = (region.get(part) or {} for part in ("shape_attributes", "region_attributes"))
        if isinstance(shape, dict) and isinstance(attributes, dict):
            return Region(place, shape, attributes)
    raise UserError(f"{file}: {place} is not a VIA region")


def _values(value, place: str) -> list[str]:
    """The values of a region attribute: text, a radio or dropdown choice, or the ticked boxes of a group; [] where nothing is said."""
    if isinstance(value, dict):
        return [ticked for ticked, is_ticked in value.items() if is_ticked]
    if value is None or isinstance(value, (str, int, float)):
        return [str(value).strip()] if value is not None and str(value).strip() else []
    raise UserError(f"{place}: an attribute holds {value!r}, which is no text")


def _choose_attribute(entries: list[Entry], attribute: str | None, category: str | None, src: Path) -> str | None:
    regions = [region for entry in entries for region in entry.regions]
    if not regions:
        raise UserError(f"{src}: no picture has a region; there is nothing to learn from")
    used = Counter(name for region in regions for name, value in region.attributes.items() if _values(value, region.place))
    known = ", ".join(f"{name} ({count} of {len(regions)} regions)" for name, count in used.items())
    if attribute:
        if attribute not in used:
            raise UserError(f"{src}: no region has a value for the attribute {attribute!r}; there are: {known or 'none'}")
        return attribute
    if len(used) > 1:
        raise UserError(f"{src}: which region attribute is the category? Choose one with --attribute: {known}")
    if not used:
        raise UserError(f"{src}: no region says what it shows (its attributes are empty); name it for all of them with --category NAME")
    return next(iter(used))


def _category(region: Region, category: str | None, attribute: str | None) -> str:
    values = _values(region.attributes.get(attribute), region.place) if attribute else []
    if len(values) > 1:
        raise UserError(f"{region.place}: {attribute!r} has several values ({', '.join(values)}); an object has one category")
    if not values and not category:
        raise UserError(f"{region.place}: no value for {attribute!r}; give it one in VIA, or name it with --category NAME")
    return values[0] if values else category


def _pictures(file: Path, entries: list[Entry], category: str | None, attribute: str | None, notes: Notes) -> list[Picture]:
    folder, pictures = file.parent, []
    absent = [entry for entry in entries if not os.path.exists(image_path(folder, entry.filename))]
    labelled = [entry.filename for entry in absent if entry.regions]
    if labelled:
        names = ", ".join(labelled[:3]) + (", ..." if len(labelled) > 3 else "")
        raise UserError(f"{file}: {len(labelled)} labelled pictures are not in {folder}: {names}; put them there or remove them in VIA")
    for entry in absent:
        notes.add("picture without regions is not on disk, left out", entry.filename)
    for entry in (entry for entry in entries if entry not in absent):
        drawn = [(region, _shape(region, file)) for region in entry.regions]
        ends = [(x + w, y + h) for x, y, w, h in (shape.box for _, shape in drawn)]
        extent = (max((right for right, _ in ends), default=0), max((bottom for _, bottom in ends), default=0))
        picture = open_picture(folder, entry.filename, file, notes, extent)
        if 0 < entry.size != picture.path.stat().st_size:
            notes.add("picture has changed since it was labelled (other byte size)", entry.filename)
        for region, shape in drawn:
            shows = _category(region, category, attribute) if shape.area else ""
            add_object(picture, shows, shape, region.place, notes)
        pictures.append(picture)
    for name in sorted(set(pictures_in(folder)) - {picture.name for picture in pictures}):
        notes.add("picture is not in the VIA file, left out", name)
    return pictures


def _shape(region: Region, file: Path) -> shapes.Shape:
    try:
        return shapes.from_via(region.shape)
    except ValueError as error:
        raise UserError(f"{file}: {region.place}: {error}") from None
