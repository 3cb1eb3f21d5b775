"""Read PASCAL VOC annotations: one XML file per image.

VOC counts pixels from 1 and names the first and the last pixel of a box, so a box from 1 to W spans the whole image. In continuous
coordinates that is x = xmin - 1 and width = xmax - xmin + 1. A box that starts at pixel 0 was written by a tool that counts from 0;
it is clipped at the edge of the image, which moves its side by one pixel at most.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path, PurePosixPath
from xml.parsers import expat

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder, list_files
from raydetr.data.formats.labels import (
    LabeledImage,
    Notes,
    Options,
    add_object,
    find_files,
    find_image,
    note_unused,
    open_image,
    read_lines,
    split_folders,
)
from raydetr.data.images import IMAGE_SUFFIXES
from raydetr.errors import UserError

ANNOTATION_FOLDERS = ("Annotations", "annotations")
IMAGE_FOLDERS = ("JPEGImages", "images")


def read_voc(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split.

    Layouts, with subfolders in each: VOC's own (Annotations/, JPEGImages/ and the lists ImageSets/Main/{train,val,trainval,test}.txt; the
    folders may be called annotations and images), one or several such folders below ``src``, or XML files beside their images in train/ and
    val/ or in ``src``. Images of test.txt are left out. Without train.txt and val.txt everything else is train.

    Objects marked difficult are kept and noted (VOC's own evaluation ignores them).

    Args:
        src: Folder.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read.
    """
    if _annotations(src) or (src / "train").is_dir():
        return _read_root(src, "", options, notes)
    roots = sorted({src / PurePosixPath(name).parts[0] for name in list_files(src) if len(PurePosixPath(name).parts) > 1})
    roots = [root for folder in roots for root in (folder, *sorted(each for each in folder.iterdir() if each.is_dir()))]
    roots = [root for root in roots if _annotations(root)]
    if not roots:
        return {"train": _all_images(src, src, options, notes)}
    splits: dict[str, list[LabeledImage]] = {}
    for root in roots:
        prefix = f"{root.relative_to(src).as_posix()}/" if len(roots) > 1 else ""
        for split, images in _read_root(root, prefix, options, notes).items():
            splits.setdefault(split, []).extend(images)
    return splits


def _read_root(src: Path, prefix: str, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    if annotations := _annotations(src):
        splits = _read_devkit(src, annotations, options, notes)
    else:
        splits = {}
        for split, folder in split_folders(src, notes).items():
            annotations = _annotations(folder)
            splits[split] = _all_images(annotations or folder, _images_folder(folder) if annotations else folder, options, notes)
    for images in splits.values():
        for image in images:
            image.name = prefix + image.name
    return splits


def _annotations(root: Path) -> Path | None:
    return next((root / name for name in ANNOTATION_FOLDERS if (root / name).is_dir()), None)


def _images_folder(root: Path) -> Path:
    folder = next((root / name for name in IMAGE_FOLDERS if (root / name).is_dir()), root)
    if folder == root and not ImageFinder(root).names:
        raise UserError(f"{root}: has annotations but no images; they belong in the folder JPEGImages or images")
    return folder


def _read_devkit(src: Path, annotations: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    images = _images_folder(src)
    lists = _lists(src)
    if not lists:
        return {"train": _all_images(annotations, images, options, notes)}
    stems = _stems(annotations)
    listed = {split: _listed(file, stems) for split, file in lists.items()}
    for stem in listed.pop("test", []):
        notes.add("image is in test.txt, left out", stem)
    parts = _train_and_val(listed, next(iter(lists.values())).parent)
    test = set(notes.get("image is in test.txt, left out", []))
    taken = {stem for part in parts.values() for stem in part}
    for stem in sorted(test & taken):
        notes.add("image is in test.txt, but also in another list: taken", stem)
    if test & taken:
        notes["image is in test.txt, left out"] = sorted(test - taken)
    for stem in sorted(set(parts["train"]) & set(parts.get("val", []))):
        notes.add("image is in both train.txt and val.txt", stem)
    for stem in sorted(stems - taken - test):
        notes.add("image is in none of the lists, left out", stem)
    finder = ImageFinder(images)
    return {split: _images(annotations, finder, part, options, notes) for split, part in parts.items()}


def _lists(src: Path) -> dict[str, Path]:
    """The lists of images by their names train, val, trainval and test, from the first folder that has any."""
    for folder in (src / "ImageSets" / "Main", src / "ImageSets", src):
        lists = {name: folder / f"{name}.txt" for name in ("train", "val", "trainval", "test")}
        if found := {name: file for name, file in lists.items() if file.is_file()}:
            return found
    return {}


def _train_and_val(listed: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """The lists as train and val; train alone where nothing says which images are for validation."""
    if "train" in listed and "val" in listed:
        return {split: listed[split] for split in ("train", "val")}
    if "trainval" in listed:
        for split, other in (("train", "val"), ("val", "train")):
            if split in listed:
                known = set(listed[split])
                rest = [stem for stem in listed["trainval"] if stem not in known]
                return {name: {split: listed[split], other: rest}[name] for name in ("train", "val")}
        return {"train": listed["trainval"]}
    found = ", ".join(f"{name}.txt" for name in listed) or "test.txt"
    if list(listed) == ["train"] and (folder / "test.txt").is_file():
        return {"train": listed["train"]}
    raise UserError(f"{folder}: {found} is there alone; both train.txt and val.txt are needed, or trainval.txt")


def _listed(file: Path, stems: set[str]) -> list[str]:
    """The images of a list, each as the path of its XML without suffix; a line may end in a flag, have a suffix or a folder."""
    unique: dict[str, list[str]] = {}
    for stem in stems:
        unique.setdefault(PurePosixPath(stem).name, []).append(stem)
    found = []
    for number, line in enumerate(read_lines(file), 1):
        if not line:
            continue
        words = line.split()
        entries = [line, " ".join(words[:-1])] if words[-1] in ("-1", "0", "1") and len(words) > 1 else [line]
        entries = [each for entry in entries for each in (entry, _without_suffix(entry))]
        stem = next((entry for entry in entries if entry in stems), None)
        names = [unique.get(entry.replace("\\", "/").rsplit("/", 1)[-1], []) for entry in entries if ".." not in entry]
        if stem is None and (several := next((each for each in names if len(each) > 1), None)):
            raise UserError(f"{file}, line {number}: {line!r} is ambiguous: {', '.join(several[:3])}")
        stem = stem or next((each[0] for each in names if each), None)
        if stem is None:
            raise UserError(f"{file}, line {number}: No such file: there is no XML for {line!r}")
        found.append(stem)
    return list(dict.fromkeys(found))


def _without_suffix(entry: str) -> str:
    path = PurePosixPath(entry)
    return entry.removesuffix(path.suffix) if path.suffix.lower() in {*IMAGE_SUFFIXES, ".xml"} else entry


def _stems(annotations: Path) -> set[str]:
    return {file.relative_to(annotations).with_suffix("").as_posix() for file in find_files(annotations, ".xml")}


def _all_images(annotations: Path, images: Path, options: Options, notes: Notes) -> list[LabeledImage]:
    finder = ImageFinder(images)
    read = _images(annotations, finder, sorted(_stems(annotations)), options, notes)
    note_unused(finder, {image.name for image in read}, "image without an XML file, left out", notes)
    return read


def _images(annotations: Path, finder: ImageFinder, stems: list[str], options: Options, notes: Notes) -> list[LabeledImage]:
    if not stems:
        raise UserError(f"{annotations}: no VOC annotation (*.xml) for an image there")
    files = {file.relative_to(annotations).with_suffix("").as_posix(): file for file in find_files(annotations, ".xml")}
    return [_image(files[stem], stem, finder, options, notes) for stem in stems]


def parse_xml(file: Path) -> ElementTree.Element:
    """Return the root of an XML file; raise UserError where it cannot be read, is no XML, or declares entities (none is expanded)."""

    def refuse(name: str, *_: object) -> None:
        raise UserError(f"{file}: declares the XML entity {name!r}; annotation files need none, remove it")

    try:
        content = file.read_bytes()
        parser = expat.ParserCreate()
        parser.EntityDeclHandler = refuse
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{file}: not an XML file ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def _image(file: Path, stem: str, finder: ImageFinder, options: Options, notes: Notes) -> LabeledImage:
    root = parse_xml(file)
    if root.tag == "annotations":
        raise UserError(f"{file}: not a VOC annotation but CVAT's own XML; export from CVAT as COCO or VOC")
    name = _image_name(root, stem, finder, file, notes)
    labeled_size = _labeled_size(root)
    outlines = [_outline(node, file, number) for number, node in enumerate(root.findall("object"), start=1)]
    extent = shapes.extent(shape for shape, _ in outlines)
    image = open_image(finder, name, file, options, notes, labeled_size, extent)
    for number, (node, (shape, is_outline)) in enumerate(zip(root.findall("object"), outlines, strict=True), start=1):
        where = f"{image.name} object {number}"
        category = options.category or (node.findtext("name") or "").strip()
        if not category:
            raise UserError(f"{file}: object {number} has no name")
        if (node.findtext("difficult") or "0").strip() == "1":
            notes.add("object marked difficult, kept", where)
        add_object(image, category, shape, where, notes, outline=is_outline)
    return image


def _image_name(root: ElementTree.Element, stem: str, finder: ImageFinder, file: Path, notes: Notes) -> str:
    """The image of an XML file: the one with its path and stem, whatever the suffix, else the one of its <filename>."""
    said = (root.findtext("filename") or "").strip()
    found = finder.candidates(stem)
    if len(found) == 1:
        return found[0]
    named = [name for name in found if name == said] or [name for name in found if PurePosixPath(name).name == said]
    if len(named) == 1:
        return named[0]
    if found:
        raise UserError(f"{file}: its image is ambiguous in {finder.folder}: {' and '.join(found[:3])}; keep one, or name it in <filename>")
    return find_image(finder, said or f"{stem}.jpg", file, notes)


def _labeled_size(root: ElementTree.Element) -> tuple[int, int]:
    """Width and height in the XML; (0, 0) where it does not know, as many tools leave it."""
    width, height = ((root.findtext(f"size/{side}") or "").strip() for side in ("width", "height"))
    return (int(width), int(height)) if width.isdecimal() and height.isdecimal() else (0, 0)


def _outline(node: ElementTree.Element, file: Path, number: int) -> tuple[shapes.Shape, bool]:
    """The shape of an object and whether its outline is known: a polygon or rotated box beside or instead of the box."""
    try:
        if node.find("bndbox") is None and (rotated := node.find("robndbox")) is not None:
            cx, cy, width, height, angle = (float(rotated.findtext(key) or "") for key in ("cx", "cy", "w", "h", "angle"))
            turned = shapes.from_rotated_box(0, 0, width, height, angle)
            x, y = cx - sum(u for u, _ in turned.polygon) / 4, cy - sum(v for _, v in turned.polygon) / 4
            return shapes.from_polygon([(round(u + x, 2), round(v + y, 2)) for u, v in turned.polygon]), True
    except ValueError:
        raise UserError(f"{file}: object {number}: robndbox needs a number in each of cx, cy, w, h, angle") from None
    box = _box(node, file, number)
    corners = _polygon(node)
    if len(corners) < 3:
        return box, False
    outline = shapes.from_polygon(corners)
    return (shapes.Shape(corners, box.box, outline.area), True) if outline.area else (box, False)


def _polygon(node: ElementTree.Element) -> list[tuple[float, float]]:
    """The corners of a <polygon>, as <x1>, <y1>, <x2>, ... (Roboflow) or <pt><x/><y/></pt> (LabelMe's web tool)."""
    polygon = node.find("polygon")
    if polygon is None:
        return []
    texts = [(point.findtext("x"), point.findtext("y")) for point in polygon.findall("pt")]
    if not texts:
        texts = [(polygon.findtext(f"x{k}"), polygon.findtext(f"y{k}")) for k in range(1, len(polygon) // 2 + 1)]
    try:
        corners = [(float(x or ""), float(y or "")) for x, y in texts]
    except ValueError:
        return []
    return corners if all(abs(value) < 1e9 for corner in corners for value in corner) else []


def _box(node: ElementTree.Element, file: Path, number: int) -> shapes.Shape:
    try:
        left, top, right, bottom = (float(node.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise UserError(f"{file}: object {number}: bndbox needs a number in each of xmin, ymin, xmax, ymax") from None
    if not (0 <= right - left < 1e9 and 0 <= bottom - top < 1e9):  # false for NaN as well
        raise UserError(f"{file}: object {number}: box from ({left}, {top}) to ({right}, {bottom}) is turned inside out or not finite")
    return shapes.from_box(left - 1, top - 1, right - left + 1, bottom - top + 1)
