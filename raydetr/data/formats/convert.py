"""Convert annotated images in any known format into the COCO folder that training takes."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

from raydetr import __version__
from raydetr.data.formats.coco import read_coco
from raydetr.data.formats.createml import read_createml
from raydetr.data.formats.csv_table import read_csv
from raydetr.data.formats.detect import detect_format, find_formats
from raydetr.data.formats.labelme import read_labelme
from raydetr.data.formats.labels import LabeledImage, Notes, Options
from raydetr.data.formats.labelstudio import read_labelstudio
from raydetr.data.formats.output import check_new, new_folder, put_image
from raydetr.data.formats.via import read_via
from raydetr.data.formats.voc import read_voc
from raydetr.data.formats.yolo import read_yolo
from raydetr.errors import UserError
from raydetr.text import count
from raydetr.values import plain

SPLITS = ("train", "val")
READERS = {
    "via": read_via,
    "voc": read_voc,
    "yolo": read_yolo,
    "coco": read_coco,
    "labelme": read_labelme,
    "createml": read_createml,
    "labelstudio": read_labelstudio,
    "csv": read_csv,
}
FROM_A_FILE = ("via", "coco", "createml", "labelstudio", "csv")  # formats that may be given as one file instead of a folder


@dataclasses.dataclass
class Summary:
    """What :func:`convert` wrote.

    Attributes:
        folder: The COCO folder.
        source: The annotation format that was read.
        found_in: The file that showed the format; empty where the user named it.
        images: Number of images by split.
        objects: Number of objects by category and split.
        stored: How images were put into the folder: hard links, symbolic links or copies.
        warnings: One line each.
    """

    folder: Path
    source: str
    found_in: str
    images: dict[str, int]
    objects: dict[str, dict[str, int]]
    stored: str
    warnings: list[str]

    def text(self) -> str:
        """Return a few lines for the terminal."""
        boxes = {split: sum(boxes_of[split] for boxes_of in self.objects.values()) for split in SPLITS}
        lines = [f"Found {self.source} annotations ({plain(self.found_in)})."] if self.found_in else []
        lines += [f"Wrote {self.folder} in COCO format; its images are {self.stored}."]
        lines += [f"  {split:<5} {count(self.images[split], 'image')}, {count(boxes[split], 'box')}" for split in SPLITS]
        names = {name: plain(name) for name in self.objects}
        width = max(map(len, ["category", *names.values()]))
        lines += ["", f"  {'category':<{width}}   train     val"]
        lines += [f"  {names[name]:<{width}} {boxes_of['train']:>7} {boxes_of['val']:>7}" for name, boxes_of in self.objects.items()]
        if self.warnings:
            lines += ["", "Worth a look:", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join([*lines, "", f"Next: raydetr data check {self.folder}"])


def convert(
    src: str | Path,
    dst: str | Path,
    source: str | None = None,
    category: str | None = None,
    copy: bool = False,
    *,
    attribute: str | None = None,
    exif: str = "upright",
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Summary:
    """Write the annotated images in ``src`` as ``dst``/annotations/custom_{train,val}.json, ``dst``/train2017 and ``dst``/val2017.

    Images are hard links (symbolic links to absolute paths where the file system has no hard links across, copies where it has neither),
    or copies with ``copy``; what changes a linked image in place changes the original. Category, image and annotation ids count from 1,
    categories in alphabetical order. ``dst`` appears complete or not at all.

    Args:
        src: Folder of annotated images, or their annotation file.
        dst: Folder to write; it must be empty or not exist.
        source: A key of ``READERS``; the modules of :mod:`raydetr.data.formats` describe the layouts. None finds it out.
        category: One category for all objects (VIA with ``attribute``: for those without a value).
        copy: Copy the images instead of linking them.
        attribute: The VIA region attribute that holds the category.
        exif: ``upright`` or ``stored``: the image that boxes refer to where an EXIF tag turns it and no size tells.
        val_fraction: Part of the images drawn for validation where ``src`` has no validation images.
        seed: Seed of that draw.

    Returns:
        What was written, with everything that the user should know.

    Raises:
        UserError: Something cannot be read or written, or is ambiguous.
    """
    src, dst = Path(src), Path(dst)
    _check_paths(src, dst, source)
    found_in = ""
    if source is None:
        source, found_in = detect_format(src)
    notes = Notes()
    splits = _read(src, source, Options(category, attribute, exif), notes)
    if "val" not in splits:
        splits = _draw_val(splits["train"], src, val_fraction, seed, notes)
    categories = _categories(splits, src, notes)
    description = f"converted from {source} by raydetr {__version__}"
    coco = {split: to_coco(images, categories, description) for split, images in splits.items()}
    stored = _write(splits, coco, dst, copy)
    counts = {split: Counter(each.category for image in splits[split] for each in image.objects) for split in SPLITS}
    return Summary(
        folder=dst,
        source=source,
        found_in=found_in,
        images={split: len(splits[split]) for split in SPLITS},
        objects={name: {split: counts[split][name] for split in SPLITS} for name in categories},
        stored=stored,
        warnings=notes.lines(),
    )


def _check_paths(src: Path, dst: Path, source: str | None) -> None:
    if source is not None and source not in READERS:
        raise UserError(f"unknown annotation format {source!r}; known are {', '.join(READERS)}")
    if not src.exists():
        raise UserError(f"{src}: no such folder")
    if src.is_file() and source is not None and source not in FROM_A_FILE:
        raise UserError(f"{src}: is a file; {source} annotations are read from a folder")
    check_new(dst)


def _read(src: Path, source: str, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    if options.attribute and source != "via":
        raise UserError(f"--attribute {options.attribute} refers to VIA regions; {source} files have none")
    try:
        splits = READERS[source](src, options, notes)
    except UserError as error:
        others = find_formats(src)
        if not others or source in (other.source for other in others) or "--from" in str(error):
            raise
        raise UserError(f"{error}; {others[0].file} is in the format {others[0].source}: try --from {others[0].source}") from None
    for split, images in splits.items():
        twice = [name for name, times in Counter(image.name for image in images).items() if times > 1]
        if twice or not images:
            raise UserError(f"{src}: {f'{twice[0]} appears twice in' if twice else 'no image in'} the {split} part")
    return splits


def _draw_val(images: list[LabeledImage], src: Path, fraction: float, seed: int, notes: Notes) -> dict[str, list[LabeledImage]]:
    """The images as train and val: ``fraction`` of them (rounded, at least one) drawn for val, each part in its old order."""
    if not 0 < fraction < 1:
        raise UserError(f"val_fraction: {fraction} is out of bounds; it takes more than 0 and less than 1")
    if len(images) < 2:
        raise UserError(f"{src}: only {len(images)} image in all; training and validation need at least one each")
    number = min(max(1, round(fraction * len(images))), len(images) - 1)
    drawn = set(random.Random(seed).sample(range(len(images)), number))
    for index in sorted(drawn):
        notes.add(f"image drawn for validation (seed {seed}), as {src} has no validation part", images[index].name)
    return {
        "train": [image for index, image in enumerate(images) if index not in drawn],
        "val": [image for index, image in enumerate(images) if index in drawn],
    }


def _categories(splits: dict[str, list[LabeledImage]], src: Path, notes: Notes) -> dict[str, int]:
    """Category name to id, the same for both splits: ids from 1 in the order of the names."""
    names = sorted({each.category for images in splits.values() for image in images for each in image.objects})
    if not names:
        left_out = "; ".join(line for line in notes.lines() if "left out" in line)
        raise UserError(f"{src}: no object is annotated; there is nothing to learn from{f' ({left_out})' if left_out else ''}")
    folded = Counter(name.casefold() for name in names)
    for name in names:
        if folded[name.casefold()] > 1:
            notes.add("category whose name differs from another's by upper and lower case only, kept apart", name)
    return {name: number for number, name in enumerate(names, start=1)}


def to_coco(images: list[LabeledImage], categories: dict[str, int], description: str) -> dict:
    """Return the content of a COCO file.

    Args:
        images: In the order of the image ids, which count from 1.
        categories: Category name to category id.
        description: Text for the file's ``info``.
    """
    coco = {"info": {"description": description}, "images": [], "annotations": []}
    coco["categories"] = [{"id": number, "name": name, "supercategory": ""} for name, number in categories.items()]
    for image_id, image in enumerate(images, start=1):
        coco["images"].append({"id": image_id, "file_name": image.name, "width": image.width, "height": image.height})
        for each in image.objects:
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": categories[each.category]}
            annotation |= {"bbox": each.box, "area": each.area, "segmentation": each.segmentation, "iscrowd": each.iscrowd}
            coco["annotations"].append(annotation)
    return coco


def _write(splits: dict[str, list[LabeledImage]], coco: dict[str, dict], dst: Path, copy: bool) -> str:
    """Write the folder; return how images are stored."""
    stored = set()
    with new_folder(dst) as partial:
        for split, images in splits.items():
            for image in images:
                stored.add(put_image(image.path.resolve(), partial / f"{split}2017" / image.name, copy))
        for split, content in coco.items():
            file = partial / "annotations" / f"custom_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(content, allow_nan=False), encoding="ascii")
    return " and ".join(sorted(stored))
