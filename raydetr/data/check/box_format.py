"""Recognize boxes that were written in another format than COCO's [x, y, width, height] in pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_SHARE, LEAST_BOXES = 0.25, 2  # that must be impossible as COCO's, before another format is suggested


class Guess(NamedTuple):
    """Another format that all boxes of a split fit."""

    what: str  # "these boxes look like ..."
    advice: str


def guess_box_format(boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]], areas: Sequence[float | None]) -> Guess | None:
    """Return the format that the boxes of a split are in, if it is another than COCO's.

    A format is suggested if all boxes fit it, and either enough boxes reach beyond their image when read as COCO's, or the annotated
    areas are those of that format.

    Args:
        boxes: The ``bbox`` of each annotation, four finite numbers.
        sizes: Width and height in pixels of the image of each.
        areas: The annotated area of each; None where there is none.

    Returns:
        The guess; None if the boxes are COCO's, or too few to tell.
    """
    if len(boxes) < 2:
        return None
    a, b, c, d = np.array(boxes, dtype=float).T
    width, height = np.array(sizes, dtype=float).T
    smallest = min(map(min, sizes))
    box = np.stack([a, b, c, d])
    if box.min() >= 0 and box.max() <= 1.001 and (box % 1 != 0).any() and smallest > 4:
        return Guess("these boxes look like fractions of the image (0 to 1), not pixels", "multiply them by the image's width and height")
    beyond = (a + c > width + 1) | (b + d > height + 1)
    many_beyond = beyond.mean() >= LEAST_SHARE and beyond.sum() >= LEAST_BOXES
    known = np.array([area if area else np.nan for area in areas], dtype=float)
    corners = (a >= -1).all() and (b >= -1).all() and (c > a).all() and (d > b).all() and (c <= width + 1).all() and (d <= height + 1).all()
    of_corners = _are_areas(known, (c - a) * (d - b)) and not _are_areas(known, c * d)
    if corners and (many_beyond or of_corners):
        return Guess("these boxes look like [x1, y1, x2, y2], not [x, y, width, height]", "subtract x1 from x2, and y1 from y2")
    centers = (a - c / 2 >= -1).all() and (b - d / 2 >= -1).all() and (a + c / 2 <= width + 1).all() and (b + d / 2 <= height + 1).all()
    if centers and many_beyond:
        return Guess(
            "these boxes look like [center x, center y, width, height], not [x, y, width, height]",
            "subtract half the width and half the height from the center",
        )
    right, bottom = (a + c).max(), (b + d).max()
    if len(boxes) >= 8 and smallest > 200 and box.min() >= 0 and 60 < right <= 101 and 60 < bottom <= 101:
        return Guess("these boxes look like percentages of the image (0 to 100), not pixels", "multiply them by its width and height / 100")
    return None


def _are_areas(known: np.ndarray, computed: np.ndarray) -> bool:
    return bool(np.isclose(known, computed, rtol=0.01).mean() > 0.9)
