"""Tiles: parts of an image that are enlarged and predicted one by one, because a network misses objects of a few pixels.

The whole image is predicted as well, for what is larger than a tile. A box that a tile's border cuts is left out: where tiles overlap, the
object is whole in the next one. Of boxes that find one object, class-wise non-maximum suppression keeps that with the highest score.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from raydetr.errors import UserError

View = tuple[int, int, int, int]  # the part of an image: left, top, right, bottom in pixels, the last two exclusive

OVERLAP = 0.2  # of neighboring tiles, as a fraction of their size
SAME_OBJECT = 0.5  # IoU of boxes of one category above which they are one object
MARGIN = 0.02  # of a tile's size: a box that comes so near to a border inside of the image is cut there
MOST_TILES, MOST_OVERLAP = 16, 0.9


@dataclass(frozen=True)
class Tiles:
    """How images are divided.

    Attributes:
        columns: Tiles side by side.
        rows: Tiles above each other.
        overlap: What neighbors share, as a fraction of a tile's width or height.
    """

    columns: int
    rows: int
    overlap: float = OVERLAP

    def views(self, size: tuple[int, int]) -> list[View]:
        """Return the whole image of this width and height, and the tiles, row by row."""
        whole = (0, 0, *size)
        across, down = _spans(size[0], self.columns, self.overlap), _spans(size[1], self.rows, self.overlap)
        tiles = [(left, top, right, bottom) for top, bottom in down for left, right in across]
        return [whole, *tiles] if len(tiles) > 1 else [whole]


def _spans(length: int, number: int, overlap: float) -> list[tuple[int, int]]:
    side = length / (number - (number - 1) * overlap)
    starts = [index * side * (1 - overlap) for index in range(number)]
    return [(int(start), min(length, max(int(start) + 1, round(start + side)))) for start in starts]


def parse_tiles(tiles: str | None, overlap: float | None) -> Tiles | None:
    """Read the values of ``--tiles`` and ``--overlap``.

    Args:
        tiles: Columns and rows such as ``"2x2"``; None for no tiles.
        overlap: Fraction of a tile; None for the default.

    Returns:
        The tiles; None if there are none.

    Raises:
        UserError: A value is out of bounds, or there is an overlap without tiles.
    """
    if tiles is None:
        if overlap is not None:
            raise UserError("--overlap: is for tiles; give --tiles 2x2 as well")
        return None
    found = re.fullmatch(r"([0-9]{1,3})x([0-9]{1,3})", tiles.strip().lower())
    if not found:
        raise UserError(f"--tiles {tiles}: is not COLUMNSxROWS, such as 2x2")
    columns, rows = map(int, found.groups())
    if not (1 <= columns <= MOST_TILES and 1 <= rows <= MOST_TILES):
        raise UserError(f"--tiles {tiles}: is out of bounds; it takes 1x1 to {MOST_TILES}x{MOST_TILES}")
    overlap = OVERLAP if overlap is None else overlap
    if not 0 <= overlap <= MOST_OVERLAP:  # true for NaN
        raise UserError(f"--overlap {overlap:g}: is out of bounds; it takes 0 to {MOST_OVERLAP}")
    return Tiles(columns, rows, overlap)


def is_whole(boxes_xyxy: Tensor, view: View, size: tuple[int, int]) -> Tensor:
    """Return which boxes, float [n, 4] in pixels of a view, are not cut by a border of it inside of the image: bool [n].

    Args:
        boxes_xyxy: The boxes.
        view: The part of the image.
        size: Width and height of the image.
    """
    left, top, right, bottom = view
    width, height = right - left, bottom - top
    low = torch.tensor([MARGIN * width if left > 0 else -1.0, MARGIN * height if top > 0 else -1.0])
    high = torch.tensor(
        [(1 - MARGIN) * width if right < size[0] else width + 1.0, (1 - MARGIN) * height if bottom < size[1] else height + 1.0]
    )
    return (boxes_xyxy[:, :2] > low).all(1) & (boxes_xyxy[:, 2:] < high).all(1)


def merge_boxes(boxes_xyxy: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Return which boxes of all views are kept, the highest score first: int64 [m].

    Args:
        boxes_xyxy: Float [n, 4] in pixels of the image.
        labels: Int64 [n].
        scores: Float [n].
    """
    return batched_nms(boxes_xyxy, scores, labels, SAME_OBJECT)
