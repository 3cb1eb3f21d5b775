"""Labelled photographs (VIA, VOC, YOLO) into the COCO folder that training takes."""

import dataclasses
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from raydetr import __version__
from raydetr.data.formats.labels import Notes, Picture
from raydetr.data.formats.via import read_via
from raydetr.data.formats.voc import read_voc
from raydetr.data.formats.yolo import read_yolo
from raydetr.data.values import plain
from raydetr.errors import UserError

SPLITS = ("train", "val")


@dataclasses.dataclass
class Summary:
    """What :func:`convert` wrote. ``objects``: category to its number of objects by split. ``stored``: how images were put there."""

    folder: Path
    images: dict[str, int]
    objects: dict[str, dict[str, int]]
    stored: str
    warnings: list[str]

    def text(self) -> str:
        """A few lines for the terminal."""
        boxes = {split: sum(count[split] for count in self.objects.values()) for split in SPLITS}
        lines = [f"Wrote {self.folder} in COCO format; its images are {self.stored}."]
        lines += [f"  {split:<5} {self.images[split]:>6} images {boxes[split]:>7} boxes" for split in SPLITS]
        names = {name: plain(name) for name in self.objects}
        width = max(map(len, ["category", *names.values()]))
        lines += ["", f"  {'category':<{width}}   train     val"]
        lines += [f"  {names[name]:<{width}} {count['train']:>7} {count['val']:>7}" for name, count in self.objects.items()]
        if self.warnings:
            lines += ["", "Worth a look:", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join([*lines, "", f"Next: raydetr data check {self.folder}"])


def convert(
    src: str | Path,
    dst: str | Path,
    source: str = "via",
    category: str | None = None,
    copy: bool = False,
    *,
    attribute: str | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Summary:
    """Write the labelled pictures in ``src`` as ``dst``/annotations/custom_{train,val}.json, ``dst``/train2017 and ``dst``/val2017.

    ``source``: via, voc or yolo; the layouts are told in :mod:`raydetr.data.formats.via`, ``voc`` and ``yolo``. ``category``: one name
    for all objects (VIA with ``attribute``: for those without a value).
    ``attribute``: the VIA region attribute that says what a region shows.
    Where ``src`` has no validation pictures, ``val_fraction`` of its pictures, drawn by ``seed``, become them.

    Images are hard links (symbolic links to absolute paths where the file system has no hard links across, copies where it has neither),
    or copies with ``copy``; what changes a linked picture in place changes the original. Category, image and annotation ids count from 1.
    ``dst`` appears complete or not at all. Raises UserError for anything that cannot be read, and where ``dst`` exists and is not empty.
    """
    src, dst = Path(src), Path(dst)
    _check_places(src, dst, source)
    notes = Notes()
    splits = _read(src, source, category, attribute, notes)
    if "val" not in splits:
        splits = _draw_val(splits["train"], src, val_fraction, seed, notes)
    categories = _categories(splits, src)
    description = f"converted from {source} by raydetr {__version__}"
    coco = {split: _to_coco(pictures, categories, description) for split, pictures in splits.items()}
    stored = _write(splits, coco, dst, copy)
    counts = {split: Counter(each.category for picture in splits[split] for each in picture.objects) for split in SPLITS}
    return Summary(
        folder=dst,
        images={split: len(splits[split]) for split in SPLITS},
        objects={name: {split: counts[split][name] for split in SPLITS} for name in categories},
        stored=stored,
        warnings=notes.lines(),
    )


def _check_places(src: Path, dst: Path, source: str) -> None:
    if source not in ("via", "voc", "yolo"):
        raise UserError(f"unknown annotation format {source!r}; it takes via, voc or yolo")
    if not src.exists():
        raise UserError(f"{src}: no such folder")
    if src.is_file() and source != "via":
        raise UserError(f"{src}: is a file; {source} labels are read from a folder")
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise UserError(f"{dst}: exists and is not an empty folder; delete it or choose another")


def _read(src: Path, source: str, category: str | None, attribute: str | None, notes: Notes) -> dict[str, list[Picture]]:
    if source == "via":
        splits = read_via(src, category, attribute, notes)
    elif attribute:
        raise UserError(f"--attribute {attribute} speaks of VIA regions; {source} files have none")
    else:
        splits = (read_voc if source == "voc" else read_yolo)(src, category, notes)
    for split, pictures in splits.items():
        twice = [name for name, times in Counter(picture.name for picture in pictures).items() if times > 1]
        if twice or not pictures:
            raise UserError(f"{src}: {f'{twice[0]} stands twice in' if twice else 'no picture in'} the {split} part")
    return splits


def _draw_val(pictures: list[Picture], src: Path, fraction: float, seed: int, notes: Notes) -> dict[str, list[Picture]]:
    """The pictures as train and val: ``fraction`` of them (rounded, at least one) drawn for val, each part in its old order."""
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction: {fraction} is out of bounds; it takes more than 0 and less than 1")
    if len(pictures) < 2:
        raise UserError(f"{src}: only {len(pictures)} picture in all; training and validation need at least one each")
    number = min(max(1, round(fraction * len(pictures))), len(pictures) - 1)
    drawn = set(random.Random(seed).sample(range(len(pictures)), number))
    for index in sorted(drawn):
        notes.add(f"picture drawn for validation (seed {seed}), as {src} has no val folder", pictures[index].name)
    return {
        "train": [picture for index, picture in enumerate(pictures) if index not in drawn],
        "val": [picture for index, picture in enumerate(pictures) if index in drawn],
    }


def _categories(splits: dict[str, list[Picture]], src: Path) -> dict[str, int]:
    """Category name to id, the same for both splits: ids from 1 in the order of the names."""
    names = {each.category for pictures in splits.values() for picture in pictures for each in picture.objects}
    if not names:
        raise UserError(f"{src}: not one object is labelled; there is nothing to learn from")
    return {name: number for number, name in enumerate(sorted(names), start=1)}


def _to_coco(pictures: list[Picture], categories: dict[str, int], description: str) -> dict:
    coco = {"info": {"description": description}, "images": [], "annotations": []}
    coco["categories"] = [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()]
    for image_id, picture in enumerate(pictures, start=1):
        coco["images"].append({"id": image_id, "file_name": picture.name, "width": picture.width, "height": picture.height})
        for each in picture.objects:
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": categories[each.category]}
            annotation |= {"bbox": each.box, "area": each.area, "segmentation": each.segmentation, "iscrowd": 0}
            coco["annotations"].append(annotation)
    return coco


def _write(splits: dict[str, list[Picture]], coco: dict[str, dict], dst: Path, copy: bool) -> str:
    """Fill a hidden folder inside ``dst`` and move its parts out when all is there, annotations last; says how images are stored."""
    is_new, stored = not dst.exists(), set()
    try:
        dst.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=dst) as partial:
            for split, pictures in splits.items():
                for picture in pictures:
                    stored.add(_put(picture.path.resolve(), Path(partial, f"{split}2017", picture.name), copy))
            for split, content in coco.items():
                file = Path(partial, "annotations", f"custom_{split}.json")
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(content, allow_nan=False), encoding="ascii")
            for name in (*(f"{split}2017" for split in splits), "annotations"):
                Path(partial, name).replace(dst / name)
    except OSError as error:
        raise UserError(f"{dst}: cannot be written: {error.strerror}{f' ({error.filename})' if error.filename else ''}") from None
    finally:
        if is_new and dst.is_dir() and not any(dst.iterdir()):
            dst.rmdir()
    return " and ".join(sorted(stored))


def _put(image: Path, target: Path, copy: bool) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        for link, kind in ((os.link, "hard links"), (os.symlink, "symbolic links")):
            try:
                link(image, target)
                return kind
            except OSError:  # another file system, or one without such links: the next way
                target.unlink(missing_ok=True)
    shutil.copyfile(image, target)
    return "copies"
