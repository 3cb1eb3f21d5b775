"""Read annotations of Label Studio, exported as JSON or JSON-MIN: a list of tasks, with shapes in percent of the image."""

import math
from pathlib import Path, PurePosixPath

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
from raydetr.data.images import IMAGE_SUFFIXES
from raydetr.errors import UserError
from raydetr.values import is_finite, short, whole_number

LABEL_KEYS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")


def is_labelstudio(content: object) -> bool:
    """Return whether JSON content is an export of Label Studio's, in full or as JSON-MIN."""
    first = content[0] if isinstance(content, list) and content else None
    return isinstance(first, dict) and (
        ("data" in first and any(key in first for key in ("annotations", "completions", "predictions"))) or bool(_minimal(first))
    )


def read_labelstudio(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split; a word of each file's name or folder says its split, see :func:`split_files`.

    Of several annotations of a task the first that was not canceled counts. Rotated rectangles, polygons and ellipses keep their outline.
    Brush masks and key points are left out.

    Args:
        src: Folder or file.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read.
    """
    files = split_files(src, ".json", lambda file: is_labelstudio(read_json(file)), "export of Label Studio (*.json)", notes)

    def read(file: Path, finder: ImageFinder) -> list[LabeledImage]:
        return [_image(file, task, number, finder, options, notes) for number, task in enumerate(_tasks(file), 1)]

    return read_splits(src, files, read, "image is in no task, left out", notes)


def _tasks(file: Path) -> list:
    content = read_json(file)
    if not is_labelstudio(content):
        raise UserError(f"{file}: not an export of Label Studio: it must be a list of tasks with data and annotations")
    return content


def _minimal(task: dict) -> list[str]:
    """The keys of a JSON-MIN task that hold shapes."""
    return [
        key
        for key, value in task.items()
        if isinstance(value, list) and value and isinstance(value[0], dict) and "original_width" in value[0]
    ]


def _image(file: Path, task: object, number: int, finder: ImageFinder, options: Options, notes: Notes) -> LabeledImage:
    where = f"{file}: task number {number}"
    if not isinstance(task, dict):
        raise UserError(f"{where} is not a task of Label Studio")
    data = task["data"] if isinstance(task.get("data"), dict) else task
    texts = [value for value in data.values() if isinstance(value, str)]
    texts = [value for value in texts if PurePosixPath(value.split("?")[0]).suffix.lower() in IMAGE_SUFFIXES or finder.candidates(value)]
    if not texts:
        raise UserError(f"{where}: no value of its data names an image")
    name = find_image(finder, texts[0], where, notes)
    results = _results(task, where, name, notes)
    first = results[0] if results else {}
    width, height = (whole_number(number_of(first.get(key))) or 0 for key in ("original_width", "original_height"))
    image = open_image(finder, name, file, options, notes, (width, height))
    size = (image.width / image.scale, image.height / image.scale)
    for index, result in enumerate(results, 1):
        _add(image, result, size, f"{where}: result {index}", f"{name} result {index}", options, notes)
    return image


def _results(task: dict, where: str, name: str, notes: Notes) -> list[dict]:
    """The shapes of a task."""
    annotations = task.get("annotations", task.get("completions"))
    if annotations is None or _minimal(task):
        return [shape for key in _minimal(task) for shape in task[key]]
    if not isinstance(annotations, list) or not all(isinstance(each, dict) for each in annotations):
        raise UserError(f"{where}: annotations is not a list of objects")
    annotations = [each for each in annotations if not each.get("was_cancelled")]
    if len(annotations) > 1:
        notes.add("image with several annotations, the first is taken", name)
    results = annotations[0].get("result", []) if annotations else []
    if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
        raise UserError(f"{where}: result is not a list of objects")
    return results


def _add(image: LabeledImage, result: dict, size: tuple[float, float], where: str, noted_as: str, options: Options, notes: Notes) -> None:
    value = result.get("value", result)
    if not isinstance(value, dict):
        raise UserError(f"{where}: value is not an object")
    shape, is_outline = _shape(value, size, where)
    if shape is None:
        notes.add(f"{result.get('type') or 'result'} is no box, polygon or ellipse, left out", noted_as)
        return
    labels = next((value[key] for key in LABEL_KEYS if isinstance(value.get(key), list) and value[key]), [])
    if len(labels) > 1:
        raise UserError(f"{where} has several labels ({', '.join(map(str, labels))}); an object has one category")
    if not labels and not options.category:
        raise UserError(f"{where} has no label; give it one in Label Studio, or name it with --category NAME")
    add_object(image, options.category or str(labels[0]).strip(), shape, noted_as, notes, outline=is_outline)


def _shape(value: dict, size: tuple[float, float], where: str) -> tuple[shapes.Shape | None, bool]:
    """The shape in pixels and whether its outline is more than its box; None for what is no shape with an area."""
    width, height = size
    if "points" in value:
        if not isinstance(value["points"], list) or not all(isinstance(point, list) and len(point) == 2 for point in value["points"]):
            raise UserError(f"{where}: points {short(value['points'])} are not pairs of numbers")
        pixels = [(_percent(x, width, where), _percent(y, height, where)) for x, y in value["points"]]
        return shapes.from_polygon(pixels), True
    theta = math.radians(_percent(value.get("rotation") or 0, 100, where))
    if "radiusX" in value:
        cx, rx = (_percent(value.get(key), width, where) for key in ("x", "radiusX"))
        cy, ry = (_percent(value.get(key), height, where) for key in ("y", "radiusY"))
        return shapes.from_ellipse(cx, cy, abs(rx), abs(ry), theta), True
    if "width" in value and "height" in value and "rle" not in value:
        x, w = (_percent(value.get(key), width, where) for key in ("x", "width"))
        y, h = (_percent(value.get(key), height, where) for key in ("y", "height"))
        if w < 0 or h < 0:
            raise UserError(f"{where}: a negative width or height")
        return (shapes.from_rotated_box(x, y, w, h, theta), True) if theta else (shapes.from_box(x, y, w, h), False)
    return None, False


def _percent(value: object, side: float, where: str) -> float:
    number = number_of(value)
    if not is_finite(number) or abs(number) > 1e6:
        raise UserError(f"{where}: {short(value)} is not a percentage of the image")
    return round(number * side / 100, 4)
