"""Check the masks of a data set: polygons and run-length encodings."""

from typing import Any

import numpy as np

from raydetr.data.check.findings import MINOR, Report
from raydetr.data.check.images import CheckedImage
from raydetr.data.coco import box_of
from raydetr.data.masks import mask_box, polygons_of, read_segmentation
from raydetr.errors import UserError
from raydetr.values import as_number, short, whole_number

TOLERANCE = 1.0  # pixels by which a mask may reach beyond its box: boxes are rounded
MOST_POINTS = 1000  # of a polygon that is searched for crossings


def check_masks(entries: list[dict], images: dict[int, CheckedImage], needed: bool, split: str, report: Report) -> None:
    """Check the masks of the annotations of a split; says nothing of a set without any mask, unless ``needed``.

    Args:
        entries: The annotations of the file.
        images: The images by id.
        needed: Whether masks are trained: what cannot be read is an error then, and a warning otherwise.
        split: Of which the annotations are.
        report: Gets the findings.
    """
    labeled = [entry for entry in entries if not as_number(entry.get("iscrowd"))]
    without = [entry for entry in labeled if not entry.get("segmentation")]
    if len(without) == len(labeled):
        if needed and labeled:
            report.error(split, "no box has a mask", None, "model.masks needs outlines: annotate polygons, or set model.masks false")
        return
    for number, entry in enumerate(entries, 1):
        image_id = whole_number(entry.get("image_id"))
        image = None if image_id is None else images.get(image_id)
        where = f"annotation id {short(entry['id'])}" if "id" in entry else f"annotation number {number}"
        where += f" in {image.label}" if image else ""
        if not entry.get("segmentation"):
            report.warn(split, "box has no mask", where, "its box is trained, a mask is not; annotate its outline", MINOR)
        elif image and image.size:
            _check_mask(entry, (image.size[1], image.size[0]), where, needed, split, report)


def _check_mask(entry: dict[str, Any], size: tuple[int, int], where: str, needed: bool, split: str, report: Report) -> None:
    segmentation = entry["segmentation"]
    try:
        rle = read_segmentation(segmentation, size)
        polygons = [] if isinstance(segmentation, dict) else polygons_of(segmentation)
    except UserError as error:
        say, what = (report.error if needed else report.warn), "mask cannot be read"
        say(split, what, f"{where}: {str(error).removeprefix('segmentation: ')}", "training with model.masks stops there; correct it")
        return
    if any(len(polygon) < 6 for polygon in polygons):
        report.warn(split, "polygon has fewer than three points", where, "it is left out of the mask; draw it anew")
    if any(_crosses_itself(polygon) for polygon in polygons):
        report.warn(split, "polygon crosses itself", where, "what it encloses twice is not part of the mask; look at it")
    if rle is None:
        if any(len(polygon) >= 6 for polygon in polygons) or not polygons:
            report.warn(split, "mask has no pixel inside the image", where, "its box is trained, a mask is not; draw it anew")
        return
    box = box_of(entry)
    if box is None:
        return
    x, y, width, height = mask_box(rle)
    beyond = max(box[0] - x, box[1] - y, x + width - box[0] - box[2], y + height - box[1] - box[3])
    if beyond > TOLERANCE:
        what = f"{where}: by {beyond:.0f} pixels"
        report.warn(split, "mask reaches beyond its box", what, "one of the two is wrong; look at it")


def _crosses_itself(polygon: list[float]) -> bool:
    """Whether two sides of a polygon cross, away from their ends."""
    points = np.array(polygon, float).reshape(-1, 2)
    if not 4 <= len(points) <= MOST_POINTS:
        return False
    start, end = points[:, None], np.roll(points, -1, 0)[:, None]
    # Two sides cross if the ends of each are on different sides of the other.
    apart = _side(start, end, points[None]) * _side(start, end, np.roll(points, -1, 0)[None]) < 0
    return bool((apart & apart.T).any())


def _side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
    along, to = end - start, point - start
    return along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0]
