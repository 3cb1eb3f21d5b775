"""Write a COCO folder in the formats of other tools: COCO, YOLO, PASCAL VOC and labelme."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import yaml

from raydetr.data.formats.coco import read_coco
from raydetr.data.formats.convert import to_coco
from raydetr.data.formats.labels import LabeledImage, LabeledObject, Notes, Options
from raydetr.data.formats.output import check_new, new_folder, put_image
from raydetr.errors import UserError
from raydetr.values import short


@dataclasses.dataclass
class ExportSummary:
    """What :func:`export` wrote.

    Attributes:
        folder: The new folder.
        target: Its annotation format.
        images: Number of images by split.
        boxes: Number of objects by split.
        warnings: One line each.
    """

    folder: Path
    target: str
    images: dict[str, int]
    boxes: dict[str, int]
    warnings: list[str]

    def text(self) -> str:
        """Return a few lines for the terminal."""
        lines = [f"Wrote {self.folder} in the format {self.target}."]
        lines += [f"  {split:<5} {count:>6} images {self.boxes[split]:>7} boxes" for split, count in self.images.items()]
        if self.warnings:
            lines += ["", "Worth a look:", *(f"  {warning}" for warning in self.warnings)]
        return "\n".join(lines)


def export(src: str | Path, dst: str | Path, target: str, copy: bool = False) -> ExportSummary:
    """Write the COCO folder ``src`` in another annotation format; :func:`~raydetr.data.formats.convert.convert` reads all of them back.

    Boxes and polygons are kept without loss. What a format cannot hold (crowd regions, run-length encoded masks, several polygons for one
    object) is noted.

    Args:
        src: A folder that training takes, or any other that ``convert`` reads as ``coco``.
        dst: Folder to write; it must be empty or not exist.
        target: A key of ``WRITERS``.
        copy: Copy the images instead of linking them.

    Returns:
        What was written.

    Raises:
        UserError: Something cannot be read or written.
    """
    src, dst = Path(src), Path(dst)
    if target not in WRITERS:
        raise UserError(f"unknown annotation format {target!r}; known are {', '.join(WRITERS)}")
    if not src.is_dir():
        raise UserError(f"{src}: no such folder")
    check_new(dst)
    notes = Notes()
    splits = read_coco(src, Options(), notes)
    if target != "coco":
        for images in splits.values():
            for image in images:
                image.objects = [each for each in image.objects if _is_kept(each, image, notes)]
    names = sorted({each.category for images in splits.values() for image in images for each in image.objects})
    with new_folder(dst) as partial:
        WRITERS[target](splits, names, partial, copy, notes)
    return ExportSummary(
        folder=dst,
        target=target,
        images={split: len(images) for split, images in splits.items()},
        boxes={split: sum(len(image.objects) for image in images) for split, images in splits.items()},
        warnings=notes.lines(),
    )


def _polygons(each: LabeledObject) -> list[list[float]]:
    return [] if isinstance(each.segmentation, dict) else each.segmentation


def _is_kept(each: LabeledObject, image: LabeledImage, notes: Notes) -> bool:
    if each.iscrowd:
        notes.add("crowd region, left out: the format has none", image.name)
        return False
    if isinstance(each.segmentation, dict):
        notes.add("run-length encoded mask, only its box is written", image.name)
        each.segmentation = []
    return True


def _write_coco(splits: dict[str, list[LabeledImage]], names: list[str], folder: Path, copy: bool, notes: Notes) -> None:
    """annotations/instances_{train,val}2017.json, train2017/ and val2017/."""
    categories = {name: number for number, name in enumerate(names, 1)}
    (folder / "annotations").mkdir()
    for split, images in splits.items():
        for image in images:
            put_image(image.path.resolve(), folder / f"{split}2017" / image.name, copy)
        content = to_coco(images, categories, "exported by raydetr")
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content, allow_nan=False), encoding="ascii")


def _write_yolo(splits: dict[str, list[LabeledImage]], names: list[str], folder: Path, copy: bool, notes: Notes) -> None:
    """data.yaml, images/{train,val}/ and labels/{train,val}/."""
    numbers = {name: number for number, name in enumerate(names)}
    for split, images in splits.items():
        _check_stems(images)
        for image in images:
            put_image(image.path.resolve(), folder / "images" / split / image.name, copy)
            lines = [_yolo_line(each, numbers[each.category], image, notes) for each in image.objects]
            _write_text(folder / "labels" / split / PurePosixPath(image.name).with_suffix(".txt"), "".join(f"{line}\n" for line in lines))
    settings = {**{split: f"images/{split}" for split in splits}, "names": dict(enumerate(names))}
    _write_text(folder / "data.yaml", yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def _yolo_line(each: LabeledObject, number: int, image: LabeledImage, notes: Notes) -> str:
    x, y, width, height = each.box
    values = [x + width / 2, y + height / 2, width, height]
    if len(_polygons(each)) == 1 and len(_polygons(each)[0]) >= 6:
        values = _polygons(each)[0]
    elif _polygons(each):
        notes.add("object of several polygons, only its box is written", image.name)
    sides = [image.width, image.height] * (len(values) // 2)
    return " ".join([str(number), *(f"{value / side:.10g}" for value, side in zip(values, sides, strict=True))])


def _write_voc(splits: dict[str, list[LabeledImage]], names: list[str], folder: Path, copy: bool, notes: Notes) -> None:
    """Annotations/, JPEGImages/ and ImageSets/Main/{train,val,trainval}.txt; splits that share a stem get subfolders."""
    bad = next((name for name in names if not name.isprintable()), None)
    if bad is not None:
        raise UserError(f"category {short(bad)} has characters that XML cannot hold; rename it")
    stems = Counter(PurePosixPath(image.name).with_suffix("").as_posix() for images in splits.values() for image in images)
    lists: dict[str, list[str]] = {}
    for split, images in splits.items():
        _check_stems(images)
        for image in images:
            name = f"{split}/{image.name}" if max(stems.values()) > 1 else image.name
            stem = PurePosixPath(name).with_suffix("")
            put_image(image.path.resolve(), folder / "JPEGImages" / name, copy)
            _write_text(folder / "Annotations" / f"{stem}.xml", _voc_xml(image, name, notes))
            lists.setdefault(split, []).append(stem.as_posix())
    lists["trainval"] = [stem for part in lists.values() for stem in part]
    for name, listed in lists.items():
        _write_text(folder / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{stem}\n" for stem in listed))


def _voc_xml(image: LabeledImage, name: str, notes: Notes) -> str:
    root = ElementTree.Element("annotation")
    path = PurePosixPath(name)
    _tags(root, folder=path.parent.as_posix(), filename=path.name)
    _tags(ElementTree.SubElement(root, "size"), width=image.width, height=image.height, depth=3)
    for each in image.objects:
        node = ElementTree.SubElement(root, "object")
        _tags(node, name=each.category, difficult=0)
        x, y, width, height = each.box
        _tags(ElementTree.SubElement(node, "bndbox"), xmin=x + 1, ymin=y + 1, xmax=x + width, ymax=y + height)
        if len(_polygons(each)) == 1:
            polygon, values = ElementTree.SubElement(node, "polygon"), _polygons(each)[0]
            for index in range(len(values) // 2):
                _tags(polygon, **{f"x{index + 1}": values[2 * index], f"y{index + 1}": values[2 * index + 1]})
        elif _polygons(each):
            notes.add("object of several polygons, only its box is written", image.name)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _tags(node: ElementTree.Element, **values: str | float) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(node, tag).text = value if isinstance(value, str) else f"{value:.10g}"


def _write_labelme(splits: dict[str, list[LabeledImage]], names: list[str], folder: Path, copy: bool, notes: Notes) -> None:
    """{train,val}/ with a JSON file beside each image; the polygons of one object share a group."""
    for split, images in splits.items():
        _check_stems(images)
        for image in images:
            put_image(image.path.resolve(), folder / split / image.name, copy)
            content = {"version": "5.0.0", "flags": {}, "shapes": _labelme_shapes(image), "imagePath": PurePosixPath(image.name).name}
            content |= {"imageData": None, "imageHeight": image.height, "imageWidth": image.width}
            _write_text(folder / split / PurePosixPath(image.name).with_suffix(".json"), json.dumps(content, allow_nan=False))


def _labelme_shapes(image: LabeledImage) -> list[dict]:
    shapes = []
    for number, each in enumerate(image.objects, 1):
        x, y, width, height = each.box
        outlines = [[list(corner) for corner in zip(flat[::2], flat[1::2], strict=True)] for flat in _polygons(each)]
        kind = "polygon" if outlines else "rectangle"
        for points in outlines or [[[x, y], [x + width, y + height]]]:
            group = number if len(outlines) > 1 else None
            shapes.append({"label": each.category, "points": points, "group_id": group, "shape_type": kind, "flags": {}})
    return shapes


def _check_stems(images: list[LabeledImage]) -> None:
    """Raise UserError where two images would share one annotation file."""
    by_stem: dict[str, str] = {}
    for image in images:
        stem = PurePosixPath(image.name).with_suffix("").as_posix()
        if stem in by_stem:
            raise UserError(f"{by_stem[stem]} and {image.name} would share one annotation file; rename one of them")
        by_stem[stem] = image.name


def _write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


WRITERS: dict[str, Callable[[dict[str, list[LabeledImage]], list[str], Path, bool, Notes], None]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "voc": _write_voc,
    "labelme": _write_labelme,
}
