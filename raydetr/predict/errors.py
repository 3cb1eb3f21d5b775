"""Why a model misses objects, as a page and as files: what ``raydetr errors`` writes.

The folder gets

- ``index.html``: the page, which needs nothing but itself;
- ``errors.json``: its numbers;
- ``suspects_coco.json`` and ``suspects_via.json``: labels that look wrong or missing, for a labeling tool. Somebody has to look at them.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetr.draw import Box, category_colours, draw_boxes
from raydetr.errors import UserError
from raydetr.evaluate.coco import category_names, run_coco_eval
from raydetr.evaluate.errors import MEANINGS, SPLIT_NAMES, SURE, error_numbers, first_sentence, suspects_as_coco, suspects_as_via
from raydetr.files import atomic_write_text
from raydetr.pages import page_environment
from raydetr.predict.score import Detected, detections_of
from raydetr.text import count

MOST_CATEGORIES = 12  # shown of the confusion matrix and of the curves; the rest is in errors.json
MOST_IMAGES, MOST_SUSPECTS = 12, 24  # drawn; all of them are in the files
IMAGE_SIDE, LETTERS = 560, 13  # pixels


def explain_errors(source: str | Path, out: str | Path, *layers: Mapping[str, Any], split: str = "val") -> str:
    """Write why a model misses objects into a folder.

    Args:
        source: Path or URL of a checkpoint, or a COCO results file (``.json``).
        out: The folder; files of an earlier call in it are replaced.
        *layers: Settings, later ones winning; they name the data set.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Returns:
        A few lines for the terminal.

    Raises:
        UserError: The checkpoint or the data set cannot be read, or the folder cannot be written.
    """
    out = Path(out).expanduser()
    detected = detections_of(source, *layers, split=split)
    evaluation = run_coco_eval(detected.coco, detected.results)
    numbers = error_numbers(evaluation, detected.coco)
    numbers = {"checkpoint": str(source), "split": split, "images": len(detected.coco["images"]), **numbers, "notes": detected.notes}
    headline = first_sentence(numbers)
    suspects = numbers["suspects"]
    files = {image_id: path for image_id, (path, _) in zip(detected.dataset.image_ids, detected.dataset.files, strict=True)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        sizes = {suspect["image_id"]: files[suspect["image_id"]].stat().st_size for suspect in suspects}
        _write_json(out / "errors.json", numbers)
        _write_json(out / "suspects_coco.json", suspects_as_coco(suspects, detected.coco))
        _write_json(out / "suspects_via.json", suspects_as_via(suspects, detected.coco, sizes))
        atomic_write_text(out / "index.html", errors_page(numbers, detected, headline))
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
    lines = [headline, f"look at {out / 'index.html'}"]
    if suspects:
        lines.append(f"{count(len(suspects), 'label')} may be wrong or missing: load {out / 'suspects_coco.json'} or suspects_via.json")
    return "\n".join([*(f"{note[0].upper()}{note[1:]}." for note in detected.notes), *lines])


def _write_json(file: Path, content: Any) -> None:
    atomic_write_text(file, json.dumps(content, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------------------- page


def errors_page(numbers: Mapping[str, Any], detected: Detected, headline: str) -> str:
    """Return the page as HTML.

    Args:
        numbers: Those of :func:`error_numbers` with ``checkpoint``, ``split`` and ``images``.
        detected: The data set and the detections.
        headline: The first sentence.
    """
    template = page_environment("raydetr.predict").get_template("errors.html")
    return template.render(
        checkpoint=numbers["checkpoint"],
        split=SPLIT_NAMES[numbers["split"]],
        notes=numbers["notes"],
        headline=headline,
        errors=errors_content(numbers, detected, files="suspects_coco.json and suspects_via.json hold them for a labeling tool."),
    )


def errors_content(
    numbers: Mapping[str, Any],
    detected: Detected,
    files: str,
    most_images: int = MOST_IMAGES,
    most_suspects: int = MOST_SUSPECTS,
    image_side: int = IMAGE_SIDE,
) -> dict[str, Any]:
    """Return what the template ``errors_sections.html`` shows.

    Args:
        numbers: Those of :func:`raydetr.evaluate.errors.error_numbers`.
        detected: The data set and the detections.
        files: A sentence that says where the suspected labels can be had.
        most_images: The number of images to draw.
        most_suspects: The number of suspected labels to draw.
        image_side: Longest side of a drawn image in pixels; a suspected label gets half of it.
    """
    painter = Painter(detected, image_side)
    shown, matrix = _most_confused(**{name: numbers["confusion"][name] for name in ("categories", "counts")})
    per_category = numbers["metrics"]["per_category"]
    known = [name for name, each in per_category.items() if each["AP"] is not None]
    known.sort(key=lambda name: per_category[name]["AP"])
    names = category_names(detected.coco["categories"])
    return {
        "numbers": numbers,
        "metrics": numbers["metrics"],
        "meanings": MEANINGS,
        "largest": max(each["AP"] for each in numbers["lost_AP50"].values()) or 1.0,
        "confused": shown,
        "matrix": matrix,
        "curves": {name: numbers["precision_at_recall"][name] for name in known[:MOST_CATEGORIES]},
        "categories_left_out": max(0, len(known) - MOST_CATEGORIES),
        "worst": [each | painter.draw_image(each["image_id"]) for each in numbers["worst_images"][:most_images]],
        "suspects": [
            suspect | painter.draw_suspect(suspect) | {"name": names[suspect["category_id"]]}
            for suspect in numbers["suspects"][:most_suspects]
        ],
        "files": files,
        "names": names,
        "sure": SURE,
    }


def _most_confused(categories: Sequence[str], counts: Sequence[Sequence[int]]) -> tuple[list[str], list[list[int]]]:
    """Return the part of a confusion matrix with the most errors: names, and rows with the column of missed objects last."""
    matrix = np.array(counts)
    errors = matrix.sum(0)[:-1] + matrix.sum(1)[:-1] - 2 * np.diag(matrix)[:-1]
    chosen = np.sort(np.argsort(-errors, kind="stable")[:MOST_CATEGORIES])
    rows = matrix[np.ix_([*chosen, -1], [*chosen, -1])]
    return [categories[int(each)] for each in chosen], [[int(number) for number in row] for row in rows]


class Painter:
    """Draws images with their detections and true boxes for the page.

    Args:
        detected: The data set and the detections; those with a score below ``SURE`` are not drawn.
        side: Longest side of a drawn image in pixels; a suspected label gets half of it.
    """

    def __init__(self, detected: Detected, side: int = IMAGE_SIDE):
        self._side = side
        self._dataset = detected.dataset
        self._names = category_names(detected.coco["categories"])
        self._colours = category_colours(self._names.values())
        self._rows = {image_id: row for row, image_id in enumerate(detected.dataset.image_ids)}
        self._file_names = {image["id"]: image["file_name"] for image in detected.coco["images"]}
        self._true: dict[Any, list[dict]] = {}
        self._found: dict[Any, list[dict]] = {}
        for annotation in detected.coco["annotations"]:
            self._true.setdefault(annotation["image_id"], []).append(annotation)
        for result in detected.results:
            if result["score"] >= SURE and result["category_id"] in self._names:
                self._found.setdefault(result["image_id"], []).append(result)

    def draw_image(self, image_id: Any) -> dict[str, Any]:
        """Return ``file_name``, ``picture`` (a data URI), ``width`` and ``height`` of an image with all its boxes."""
        picture = self._read(image_id)
        scale = min(1.0, self._side / max(picture.size))
        small = picture.resize([max(1, round(side * scale)) for side in picture.size])
        found = [self._box(each, scale) for each in self._found.get(image_id, ())]
        true = [self._box(each, scale) for each in self._true.get(image_id, ())]
        return self._shown(image_id, draw_boxes(small, found, true, self._colours, LETTERS / max(small.size), True))

    def draw_suspect(self, suspect: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same for the surroundings of a suspected label, with its box alone."""
        picture = self._read(suspect["image_id"])
        x, y, width, height = suspect["bbox"]
        margin = 0.5 * max(width, height)
        left, top = max(0, round(x - margin)), max(0, round(y - margin))
        right, bottom = min(picture.width, round(x + width + margin)), min(picture.height, round(y + height + margin))
        part = picture.crop((left, top, max(left + 1, right), max(top + 1, bottom)))
        scale = self._side / 2 / max(part.size)
        part = part.resize([max(1, round(side * scale)) for side in part.size])
        box = self._box({**suspect, "bbox": [x - left, y - top, width, height]}, scale)
        return self._shown(suspect["image_id"], draw_boxes(part, [box], [], self._colours, LETTERS / max(part.size), False))

    def _read(self, image_id: Any) -> Image.Image:
        path, size = self._dataset.files[self._rows[image_id]]
        return Image.fromarray(self._dataset.split.read(path, size).permute(1, 2, 0).numpy())

    def _box(self, entry: Mapping[str, Any], scale: float) -> Box:
        x, y, width, height = (scale * each for each in entry["bbox"])
        return Box((x, y, x + width, y + height), self._names[entry["category_id"]], entry.get("score"))

    def _shown(self, image_id: Any, picture: Image.Image) -> dict[str, Any]:
        content = io.BytesIO()
        picture.save(content, "JPEG", quality=80)
        uri = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
        return {"file_name": self._file_names[image_id], "picture": uri, "width": picture.width, "height": picture.height}
