"""Read a COCO folder with everything that its files say, and write a new one: what the tools that rearrange data sets share."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import raydetr
from raydetr.config import Data
from raydetr.data.categories import match_categories
from raydetr.data.coco import category_name, find_split, has_split, load_coco, read_coco
from raydetr.data.formats.labels import Notes
from raydetr.data.formats.output import check_new, new_folder, put_image
from raydetr.data.images import image_path
from raydetr.errors import UserError
from raydetr.text import count
from raydetr.values import plain, whole_number

SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class Item:
    """An image of a data set with all that its annotation file says about it.

    Attributes:
        path: The image file.
        entry: Its entry, with a sound ``file_name``, ``width`` and ``height``.
        annotations: The entries of its annotations, in the file's order, with the category ids of the data set.
        license: The entry of the file's ``licenses`` that the image refers to; None where there is none.
    """

    path: Path
    entry: dict[str, Any]
    annotations: list[dict[str, Any]]
    license: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Its file name, relative to the image folder."""
        return self.entry["file_name"]


@dataclasses.dataclass
class DataSet:
    """The images of a data set by split, and the categories that all splits share.

    Attributes:
        categories: Entries of categories with whole numbers as ids.
        splits: The images of ``train``, ``val`` and ``test``, as far as there are any.
    """

    categories: list[dict[str, Any]]
    splits: dict[str, list[Item]]


@dataclasses.dataclass
class Summary:
    """What a tool wrote.

    Attributes:
        folder: The COCO folder.
        stored: How images were put into it: hard links, symbolic links or copies.
        images: Number of images by split.
        boxes: Number of annotations by category and split.
        notes: One line each of what the user should know.
    """

    folder: Path
    stored: str
    images: dict[str, int]
    boxes: dict[str, dict[str, int]]
    notes: list[str]

    def text(self) -> str:
        """Return a few lines for the terminal."""
        names = {name: plain(name) for name in self.boxes}
        width = max(map(len, ["category", *names.values()]))
        lines = [
            f"Wrote {self.folder}; its images are {self.stored}.",
            "",
            f"  {'':<{width}}" + "".join(f"{each:>8}" for each in self.images),
        ]
        lines += [f"  {'images':<{width}}" + "".join(f"{number:>8}" for number in self.images.values())]
        lines += [f"  {names[name]:<{width}}" + "".join(f"{of[split]:>8}" for split in self.images) for name, of in self.boxes.items()]
        if self.notes:
            lines += ["", "Worth a look:", *(f"  {note}" for note in self.notes)]
        return "\n".join([*lines, "", f"Next: raydetr data check {self.folder}"])


def read_data_set(folder: str | Path) -> DataSet:
    """Read every split of a COCO folder.

    Args:
        folder: A folder that training takes; a part of it, such as the training images alone, is enough.

    Raises:
        UserError: There is no such folder, or something in it would stop a training.
    """
    data = Data(path=str(folder))
    names = [split for split in SPLITS if has_split(data, split)]
    if not names:
        find_split(data, "train")  # raises the error that says where annotations were looked for
    whole = DataSet([], {})
    for name in names:
        split = find_split(data, name)
        checked, _ = load_coco(split.annotations, split.images)
        content = read_coco(split.annotations)
        ids = join_categories(whole.categories, content["categories"])
        licenses = {str(each.get("id")): each for each in content.get("licenses") or [] if isinstance(each, dict)}
        raw = {whole_number(entry["id"]): entry for entry in content["images"]}
        items = {}
        for image in checked["images"]:
            entry = raw[image["id"]] | image
            items[image["id"]] = Item(image_path(split.images, image["file_name"]), entry, [], licenses.get(str(entry.get("license"))))
        for annotation in content["annotations"]:
            category_id = ids[whole_number(annotation["category_id"])]
            items[whole_number(annotation["image_id"])].annotations.append(annotation | {"category_id": category_id})
        whole.splits[name] = list(items.values())
    return whole


def join_categories(known: list[dict[str, Any]], others: Sequence[Mapping[str, Any]]) -> dict[int | None, int]:
    """Find categories of a file among known ones by name, and add those that are new.

    Args:
        known: Entries of categories; new ones are appended, with their own id where it is free.
        others: The ``categories`` of an annotation file.

    Returns:
        The id among ``known`` of each id of ``others``.
    """
    entries = [dict(each) | {"id": whole_number(each.get("id")), "name": category_name(each)} for each in others]
    positions = match_categories(entries, known)
    ids = {}
    for entry, position in zip(entries, positions, strict=True):
        if position is None:
            used = {each["id"] for each in known}
            known.append(entry | {"id": max(used) + 1 if entry["id"] in used else entry["id"]})
            position = -1
        ids[entry["id"]] = known[position]["id"]
    return ids


def write_data_set(data: DataSet, folder: Path, notes: Notes, copy: bool = False) -> Summary:
    """Write a data set as a COCO folder, which appears complete or not at all.

    Image ids stay where they differ over all splits; otherwise images are numbered from 1. Annotations are numbered from 1 in each file.

    Args:
        data: What to write; file names are made unique within their split.
        folder: A folder that is empty or does not exist.
        notes: What the user should know; renamed files are added.
        copy: Copy the images instead of linking them.

    Raises:
        UserError: The folder is not empty, or cannot be written.
    """
    check_new(folder)
    items = [item for split in data.splits.values() for item in split]
    ids = [item.entry["id"] for item in items]
    if len(set(ids)) < len(ids):
        for number, item in enumerate(items, 1):
            item.entry = item.entry | {"id": number}
    stored = set()
    with new_folder(folder) as partial:
        for split, of_split in data.splits.items():
            rename_twins(of_split, notes)
            for item in of_split:
                stored.add(put_image(item.path.resolve(), partial / f"{split}2017" / item.name, copy))
            write_coco(partial / "annotations" / f"custom_{split}.json", _content(data.categories, of_split))
    return _summary(data, folder, " and ".join(sorted(stored)), notes)


def rename_twins(items: Iterable[Item], notes: Notes) -> None:
    """Give images of one split whose file names are the same, upper and lower case aside, different ones: ``a.jpg`` and ``a_2.jpg``."""
    items = list(items)
    taken: set[str] = set()
    own = {item.name.casefold() for item in items}
    for item in items:
        if item.name.casefold() in taken:
            path = PurePosixPath(item.name)
            free = (path.with_name(f"{path.stem}_{number}{path.suffix}").as_posix() for number in itertools.count(2))
            name = next(name for name in free if name.casefold() not in taken | own)
            notes.add("image renamed, because another has its name", f"{item.name} -> {name}")
            item.entry = item.entry | {"file_name": name}
        taken.add(item.name.casefold())


def write_coco(file: Path, content: Mapping[str, Any]) -> None:
    """Write a COCO file and its folder; raise UserError where a number in it is not finite."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.write_text(json.dumps(content, allow_nan=False), encoding="ascii")
    except ValueError:
        raise UserError(f"{file.name}: an annotation has a value that is no finite number; mend it with raydetr data check --fix") from None


def _content(categories: list[dict[str, Any]], items: list[Item]) -> dict[str, Any]:
    """Return the content of a COCO file."""
    licenses: list[dict[str, Any]] = []
    coco: dict[str, Any] = {"info": {"description": f"written by raydetr {raydetr.__version__}"}, "images": [], "annotations": []}
    for item in items:
        entry = {key: value for key, value in item.entry.items() if key != "license"}
        if item.license is not None:
            terms = {key: value for key, value in item.license.items() if key != "id"}
            if terms not in licenses:
                licenses.append(terms)
            entry["license"] = licenses.index(terms) + 1
        coco["images"].append(entry)
        for each in item.annotations:
            coco["annotations"].append(each | {"id": len(coco["annotations"]) + 1, "image_id": entry["id"]})
    return coco | {"categories": categories, "licenses": [{"id": number, **terms} for number, terms in enumerate(licenses, 1)]}


def _summary(data: DataSet, folder: Path, stored: str, notes: Notes) -> Summary:
    names = {each["id"]: each["name"] for each in data.categories}
    boxes = {name: dict.fromkeys(data.splits, 0) for name in names.values()}
    for split, items in data.splits.items():
        for each in itertools.chain.from_iterable(item.annotations for item in items):
            boxes[names[each["category_id"]]][split] += 1
    return Summary(folder, stored, {split: len(items) for split, items in data.splits.items()}, boxes, notes.lines())


def counted_alike(groups: Sequence[int], items: Sequence[Item]) -> str:
    """Return a line on the groups of more than one image, such as ``2 groups of look-alike images, each kept in one part: ...``."""
    members: dict[int, list[str]] = {}
    for group, item in zip(groups, items, strict=True):
        members.setdefault(int(group), []).append(plain(item.name))
    several = [names for names in members.values() if len(names) > 1]
    if not several:
        return ""
    shown = ", ".join(" ~ ".join(names[:2]) for names in several[:3]) + (", ..." if len(several) > 3 else "")
    return f"{count(len(several), 'group')} of look-alike images, each kept in one part: {shown}"
