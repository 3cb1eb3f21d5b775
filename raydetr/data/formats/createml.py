"""Read annotations of Apple's Create ML: JSON lists of images, with boxes given by center and size in pixels."""

from pathlib import Path

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    LabeledImage,
    Notes,
    Options,
    add_object,
    find_image,
    number_of,
    open_image,
    read_json,
    read_splits,
    split_files,
)
from raydetr.errors import UserError
from raydetr.values import is_finite, short


def is_createml(content: object) -> bool:
    """Return whether JSON content is an annotation file of Create ML."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and _name(first) is not None and isinstance(first.get("annotations"), list)


def _name(entry: dict) -> object:
    return entry.get("image", entry.get("imagefilename"))


def read_createml(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split; a word of each file's name or folder says its split, see :func:`split_files`.

    Args:
        src: Folder or file.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read.
    """
    files = split_files(src, ".json", lambda file: is_createml(read_json(file)), "Create ML annotation file (*.json)", notes)

    def read(file: Path, finder: ImageFinder) -> list[LabeledImage]:
        return [_image(file, entry, number, finder, options, notes) for number, entry in enumerate(_entries(file), 1)]

    return read_splits(src, files, read, "image is not in the Create ML file, left out", notes)


def _entries(file: Path) -> list:
    content = read_json(file)
    if not is_createml(content):
        raise UserError(f"{file}: not a file of Create ML: it must be a list of objects with image and annotations")
    return content


def _image(file: Path, entry: object, number: int, finder: ImageFinder, options: Options, notes: Notes) -> LabeledImage:
    where = f"{file}: image number {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("annotations"), list):
        raise UserError(f"{where} has no list of annotations")
    drawn = [_shape(each, f"{where}: annotation {index}") for index, each in enumerate(entry["annotations"], 1)]
    extent = shapes.extent(shape for _, shape in drawn)
    image = open_image(finder, find_image(finder, _name(entry), where, notes), file, options, notes, extent=extent)
    for index, (label, shape) in enumerate(drawn, 1):
        add_object(image, options.category or label, shape, f"{image.name} annotation {index}", notes, outline=False)
    return image


def _shape(annotation: object, where: str) -> tuple[str, shapes.Shape]:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("label"), (str, int)) or not str(annotation["label"]).strip():
        raise UserError(f"{where} has no label")
    coordinates = annotation.get("coordinates")
    values = [number_of(coordinates.get(key)) for key in ("x", "y", "width", "height")] if isinstance(coordinates, dict) else []
    if not values or not all(is_finite(value) and abs(value) < 1e9 for value in values) or min(values[2:]) < 0:
        raise UserError(f"{where}: coordinates {short(coordinates)} are not x, y, width and height in pixels")
    cx, cy, width, height = values
    return str(annotation["label"]).strip(), shapes.from_box(cx - width / 2, cy - height / 2, width, height)
