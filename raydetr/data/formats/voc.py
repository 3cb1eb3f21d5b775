"""Labels in PASCAL VOC's XML: one file a picture.

VOC counts pixels from 1 and names the first and the last pixel of a box, so a box from 1 to W spans the whole picture. In continuous
coordinates that is x = xmin - 1 and width = xmax - xmin + 1. A box that starts at pixel 0 was written by a tool that counts from 0;
it is cut at the picture's edge, which moves its side by one pixel at most.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from raydetr.data.formats import shapes
from raydetr.data.formats.labels import IMAGE_SUFFIXES, Notes, Picture, add_object, open_picture, pictures_in, read_lines, split_folders
from raydetr.data.images import image_path
from raydetr.errors import UserError


def read_voc(src: Path, category: str | None, notes: Notes) -> dict[str, list[Picture]]:
    """The labelled pictures by split.

    Layouts: VOC's own (Annotations/, JPEGImages/, ImageSets/Main/{train,val}.txt; without these lists everything is train; the folders may
    be called annotations and images), or XML files beside their pictures in SRC/train and SRC/val or in SRC. ``category``: one name for
    all objects. Objects marked difficult stay objects like others (VOC's own evaluation leaves them out); they are noted.
    Raises UserError for anything that cannot be read.
    """
    annotations = next((src / name for name in ("Annotations", "annotations") if (src / name).is_dir()), None)
    if not annotations:
        return {split: _all_pictures(folder, folder, category, notes) for split, folder in split_folders(src).items()}
    images = next((src / name for name in ("JPEGImages", "images") if (src / name).is_dir()), None)
    if not images:
        raise UserError(f"{src}: has {annotations.name} but no folder JPEGImages or images")
    lists = {split: src / "ImageSets" / "Main" / f"{split}.txt" for split in ("train", "val")}
    found = [file for file in lists.values() if file.is_file()]
    if not found:
        return {"train": _all_pictures(annotations, images, category, notes)}
    if len(found) == 1:
        raise UserError(f"{found[0].parent}: {found[0].name} is there alone; both train.txt and val.txt are needed")
    stems = {split: [line for line in read_lines(file) if line] for split, file in lists.items()}
    for stem in sorted(set(_stems(annotations)) - {stem for part in stems.values() for stem in part}):
        notes.add("picture is neither in train.txt nor in val.txt, left out", stem)
    return {split: _pictures(annotations, images, part, category, notes) for split, part in stems.items()}


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.xml"))


def _all_pictures(annotations: Path, images: Path, category: str | None, notes: Notes) -> list[Picture]:
    stems = set(_stems(annotations))
    for name in pictures_in(images):
        if Path(name).stem not in stems:
            notes.add("picture without an XML file, left out", name)
    return _pictures(annotations, images, sorted(stems), category, notes)


def _pictures(annotations: Path, images: Path, stems: list[str], category: str | None, notes: Notes) -> list[Picture]:
    if not stems:
        raise UserError(f"{annotations}: no VOC annotation (*.xml) for a picture there")
    return [_picture(image_path(annotations, f"{stem}.xml"), images, stem, category, notes) for stem in stems]


def _picture(file: Path, images: Path, stem: str, category: str | None, notes: Notes) -> Picture:
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file}: not an XML file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    name = next((stem + suffix for suffix in IMAGE_SUFFIXES if (images / (stem + suffix)).is_file()), None)
    said = _said_size(root)
    picture = open_picture(images, name or root.findtext("filename") or f"{stem}.jpg", file, notes, said)
    if said not in ((picture.width, picture.height), (0, 0)):
        notes.add("picture has another size than its XML says", picture.name)
    for number, node in enumerate(root.findall("object"), start=1):
        place = f"{picture.name} object {number}"
        shows = category or (node.findtext("name") or "").strip()
        if not shows:
            raise UserError(f"{file}: object {number} has no name")
        if (node.findtext("difficult") or "0").strip() == "1":
            notes.add("object marked difficult, kept", place)
        add_object(picture, shows, _shape(node, file, number), place, notes, outline=False)
    return picture


def _said_size(root: ElementTree.Element) -> tuple[int, int]:
    """Width and height in the XML; (0, 0) where it does not know, as many tools leave it."""
    width, height = ((root.findtext(f"size/{side}") or "").strip() for side in ("width", "height"))
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else (0, 0)


def _shape(node: ElementTree.Element, file: Path, number: int) -> shapes.Shape:
    try:
        left, top, right, bottom = (float(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        raise UserError(f"{file}: object {number}: bndbox needs a number in each of xmin, ymin, xmax, ymax") from None
    if not (0 <= right - left < 1e9 and 0 <= bottom - top < 1e9):  # false for NaN as well
        raise UserError(f"{file}: object {number}: box from ({left}, {top}) to ({right}, {bottom}) is turned inside out or not finite")
    return shapes.from_box(left - 1, top - 1, right - left + 1, bottom - top + 1)
