"""What every reader of an annotation format returns, and the steps that all readers share."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder, list_files
from raydetr.data.images import Header, read_header
from raydetr.errors import UserError
from raydetr.values import plain

VAL_FOLDERS = ("val", "valid", "validation")  # the usual names of the folder of validation images
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", **dict.fromkeys(VAL_FOLDERS, "val")}
DEFAULT_CATEGORY = "object"  # where a format names no category at all


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user says about the annotations.

    Attributes:
        category: One category for all objects (VIA with ``attribute``: for the regions without a value).
        attribute: The VIA region attribute that holds the category.
        exif: ``upright`` or ``stored``: the image that the labels were drawn on where an EXIF tag turns it and no size tells.
    """

    category: str | None = None
    attribute: str | None = None
    exif: str = "upright"


@dataclasses.dataclass
class LabeledObject:
    """One annotated object.

    Attributes:
        category: Name of the category.
        box: xywh in pixels.
        area: Square pixels.
        segmentation: COCO polygons ([x1, y1, x2, y2, ...] each) or a COCO run-length encoding; empty where only the box is known.
        iscrowd: 1 for a COCO crowd region, else 0.
    """

    category: str
    box: list[float]
    area: float
    segmentation: list[list[float]] | dict[str, Any]
    iscrowd: int = 0


@dataclasses.dataclass
class LabeledImage:
    """An image file with its annotated objects.

    Attributes:
        path: The file.
        name: File name in the converted data set, relative, with forward slashes.
        width: Width in pixels of the image that the boxes refer to.
        height: Height in pixels of the same.
        scale: Factor from the pixels of the annotation file to those of the image.
        objects: What is annotated.
    """

    path: Path
    name: str
    width: int
    height: int
    scale: float = 1.0
    objects: list[LabeledObject] = dataclasses.field(default_factory=list)


class Notes(dict[str, list[str]]):
    """Warnings by their text, each with every image, file or annotation that it concerns."""

    def add(self, text: str, where: str) -> None:
        """Add a warning, or another occurrence of one.

        Args:
            text: The warning.
            where: The image, file or annotation that it concerns.
        """
        self.setdefault(text, []).append(where)

    def lines(self) -> list[str]:
        """Return one line per warning, such as ``2 × shape without area, left out: a.jpg region 1, b.jpg region 4``."""
        return [
            f"{len(places)} × {text}: {', '.join(map(plain, places[:3]))}{', ...' if len(places) > 3 else ''}"
            for text, places in self.items()
        ]


def find_image(finder: ImageFinder, name: object, source: str | Path, notes: Notes) -> str:
    """Return the file that ``name`` means, as :meth:`ImageFinder.find` does, and note where it has another name or folder."""
    found = finder.find(name, source)
    if not finder.is_exact(str(name)):
        notes.add("image found under another name or folder", f"{name} -> {found}")
    return found


def open_image(
    finder: ImageFinder,
    name: str,
    source: str | Path,
    options: Options,
    notes: Notes,
    labeled_size: tuple[int, int] = (0, 0),
    extent: tuple[float, float] = (0, 0),
) -> LabeledImage:
    """Return the image ``name`` of ``finder``, without objects, with the size that its labels refer to.

    An image that an EXIF tag turns counts as upright, as browsers and annotation tools show it, unless ``labeled_size`` is that of the
    stored pixels, or only the stored pixels contain the labels, or ``options.exif`` is ``stored``.

    Args:
        finder: The folder of images.
        name: An exact name of ``finder``.
        source: What refers to the image; error messages start with it.
        options: What the user says about the annotations.
        notes: Receives what the user should know.
        labeled_size: Width and height according to the annotation file; (0, 0) where it does not say.
        extent: Right and lower end of the labels.

    Raises:
        UserError: The image cannot be read, or its size is no whole multiple or fraction of ``labeled_size``.
    """
    path = finder.folder / name
    try:
        header = read_header(path)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    stored = (header.width, header.height)
    candidates = [stored, header.upright] if options.exif == "stored" else [header.upright, stored]
    size, scale = candidates[0], 1.0
    is_told = False  # whether the sizes say which of the two images was annotated
    if all(side > 0 for side in labeled_size):
        size, scale = _match_size(labeled_size, candidates, f"{source}: {name}")
        is_told = header.upright != stored
        if scale != 1:
            sizes = f"{labeled_size[0]} x {labeled_size[1]}, is {size[0]} x {size[1]}"
            notes.add("image has another size than its annotation says, boxes scaled", f"{name} ({sizes})")
    else:
        holds = [extent[0] <= width and extent[1] <= height for width, height in candidates]
        if holds[1] and not holds[0]:
            size, is_told = candidates[1], True
    if header.orientation != 1:
        notes.add(_exif_note(header, size, is_told, options), name)
    return LabeledImage(path, name, *size, scale)


def _match_size(labeled: tuple[int, int], candidates: list[tuple[int, int]], what: str) -> tuple[tuple[int, int], float]:
    for size in candidates:
        if size == labeled:
            return size, 1.0
    for size in candidates:
        (large, small) = sorted((size, labeled), reverse=True)
        if large[0] % small[0] == 0 and small[1] * (large[0] // small[0]) == large[1]:
            return size, size[0] / labeled[0]
    raise UserError(
        f"{what}: the image is {candidates[0][0]} x {candidates[0][1]} pixels, its annotation says {labeled[0]} x {labeled[1]}; "
        "put the annotated image there or correct the size"
    )


def _exif_note(header: Header, size: tuple[int, int], is_told: bool, options: Options) -> str:
    if is_told:
        seen = "upright image" if size == header.upright else "stored pixels"
        return f"image is turned by its EXIF tag; sizes and labels show that it was annotated on the {seen}"
    if options.exif == "stored":
        return "image is turned by its EXIF tag; labels taken as drawn on the stored pixels: train with --data.exif stored too"
    return (
        "image is turned by its EXIF tag and no size tells on which side it was annotated; labels taken as drawn on the upright image "
        "(else convert with --exif stored)"
    )


def add_object(image: LabeledImage, category: str, shape: shapes.Shape, where: str, notes: Notes, outline: bool = True) -> None:
    """Add an object to an image, scaled to its pixels and clipped to it.

    Objects without area and objects outside the image are left out. What was changed is noted under ``where``.

    Args:
        image: The image; its ``objects`` grow.
        category: Name of the category.
        shape: Outline, box and area in pixels of the annotation file.
        where: Names the object in notes.
        notes: Receives what the user should know.
        outline: Whether the outline is known, and not only its box.
    """
    shape = shapes.scale(shape, image.scale)
    inside = shapes.clip(shape, image.width, image.height)
    if not shape.area:
        notes.add("shape without area, left out", where)
    elif not inside.area or not min(inside.box[2:]) > 0:
        notes.add("shape outside the image, left out", where)
    else:
        note_overhang(image, shape.box, where, notes)
        segmentation = [[value for corner in inside.polygon for value in corner]] if outline else []
        image.objects.append(LabeledObject(category, list(inside.box), inside.area, segmentation))


def note_overhang(image: LabeledImage, xywh: tuple[float, ...], where: str, notes: Notes) -> None:
    """Note a box that reaches beyond the image by more than a format's rounding."""
    x, y, width, height = xywh
    if max(-x, -y, x + width - image.width, y + height - image.height) >= 0.5:
        notes.add("shape beyond the image, clipped at its edge", where)


def read_text(file: Path) -> str:
    """Return the text of a file without byte order mark; raise UserError where it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file without surrounding space, empty ones included; raise UserError as :func:`read_text` does."""
    return [line.strip() for line in read_text(file).splitlines()]


def read_json(file: Path) -> Any:
    """Return the content of a JSON file; raise UserError where it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: not a JSON file ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None


def split_folders(src: Path, notes: Notes) -> dict[str, Path]:
    """Return ``src/train`` and ``src/val`` (or valid, validation) by split; ``src`` alone, as train, where it has no train folder.

    Images in ``src/test`` are noted as left out.
    """
    if not (src / "train").is_dir():
        return {"train": src}
    for name in list_images(src / "test"):
        notes.add("image of the test part, left out", f"test/{name}")
    val = next((src / name for name in VAL_FOLDERS if (src / name).is_dir()), None)
    return {"train": src / "train"} | ({"val": val} if val else {})


def split_of(path: Path) -> str:
    """Return the split that a word of the file name, or else of the nearest folder, says; train where none does."""
    for part in reversed(path.with_suffix("").parts):
        splits = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_WORDS}
        if len(splits) == 1:
            return splits.pop()
    return "train"


def split_files(src: Path, suffix: str, is_wanted: Callable[[Path], bool], what: str, notes: Notes) -> list[tuple[str, Path]]:
    """Return the annotation files in and below ``src``, each with its split (see :func:`split_of`); those of test are left out.

    Args:
        src: Folder, or an annotation file, which is train.
        suffix: Of the annotation files.
        is_wanted: Whether the content of a file is of the format.
        what: Names the format in the error message.
        notes: Receives what the user should know.

    Raises:
        UserError: There is no file of train.
    """
    if src.is_file():
        return [("train", src)]
    found = [(split_of(file.relative_to(src)), file) for file in find_files(src, suffix) if is_wanted(file)]
    for split, file in found:
        if split == "test":
            notes.add("file of the test part, left out", file.relative_to(src).as_posix())
    found = [(split, file) for split, file in found if split != "test"]
    if not any(split == "train" for split, _ in found):
        raise UserError(f"{src}: no {what} of training images in or below it")
    return found


def read_splits(
    src: Path, files: list[tuple[str, Path]], read: Callable[[Path, ImageFinder], list[LabeledImage]], unused: str, notes: Notes
) -> dict[str, list[LabeledImage]]:
    """Return the images of annotation files that hold many images each, by split.

    Images are looked for in and below the folder of each file, else in the folders of its split, else in ``src`` (or one folder up where
    ``src`` is a file).

    Args:
        src: The folder or file that was given.
        files: Split and annotation file.
        read: Reads an annotation file whose images are in a folder.
        unused: Text of the note for images that no file mentions.
        notes: Receives what the user should know.
    """
    root = src.parent if src.is_file() else src
    if src.is_file() and not list_images(root):  # annotations/instances_default.json beside images/
        root = root.parent
    finders: dict[Path, ImageFinder] = {}
    splits: dict[str, list[LabeledImage]] = {}
    for split, file in files:
        folder = _image_folder(file, split if len({split for split, _ in files}) > 1 else None, root)
        finder = finders.setdefault(folder, ImageFinder(folder))
        splits.setdefault(split, []).extend(read(file, finder))
    used = {image.path for images in splits.values() for image in images}
    for finder in finders.values():
        note_unused(finder, {name for name in finder.names if finder.folder / name in used}, unused, notes)
    return splits


def _image_folder(file: Path, split: str | None, root: Path) -> Path:
    aliases = {None: (), "train": ("train",), "val": VAL_FOLDERS}[split]
    of_split = [root / form.format(name) for name in aliases for form in ("{}2017", "{}", "images/{}", "images/{}2017")]
    for folder in (*([file.parent] if file.parent != root else []), *of_split, root):
        if list_images(folder):
            return folder
    raise UserError(f"{root}: no images in or below it")


def number_of(value: Any) -> Any:
    """Return text that is a number as the number, anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value


def list_images(folder: Path) -> list[str]:
    """Return the image files in and below ``folder``, relative with forward slashes, sorted; nothing where there is no such folder."""
    return ImageFinder(folder).names if folder.is_dir() else []


def note_unused(finder: ImageFinder, used: set[str], text: str, notes: Notes) -> None:
    """Note every image of ``finder`` that is not among the names ``used``."""
    for name in finder.names:
        if name not in used:
            notes.add(text, name)


def find_files(src: Path, suffix: str) -> list[Path]:
    """Return the files with this suffix (whatever its case) in and below ``src``, sorted; ``src`` itself where it is a file."""
    if src.is_file():
        return [src]
    return [src / name for name in list_files(src) if name.lower().endswith(suffix)]
