"""Masks of objects: read from COCO files, and converted between arrays and COCO's run-length encoding (RLE).

An RLE here is the compressed one that pycocotools reads and JSON holds: ``{"size": [height, width], "counts": "..."}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raydetr.errors import UserError
from raydetr.values import is_finite, is_number, short, whole_number

RLE = dict[str, Any]


def _rle_functions() -> Any:
    """Return hotcoco's functions, which are imported for the first mask: boxes alone do not need them."""
    import hotcoco.mask  # pyright: ignore[reportMissingModuleSource]  # it is compiled

    return hotcoco.mask


def encode_masks(masks: np.ndarray) -> list[RLE]:
    """Return the RLE of each mask, bool [n, height, width]."""
    return [_as_text(_rle_functions().encode(mask)) for mask in masks]


def decode_masks(rles: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> np.ndarray:
    """Return masks as an array.

    Args:
        rles: The RLE of each mask.
        size: Height and width of the image in pixels.

    Returns:
        Bool [n, height, width].
    """
    masks = np.zeros((len(rles), *size), bool)
    for mask, rle in zip(masks, rles, strict=True):
        mask[:] = _rle_functions().decode(dict(rle))
    return masks


def mask_area(rle: Mapping[str, Any]) -> int:
    """Return the number of pixels of a mask."""
    return int(_rle_functions().area(dict(rle)))


def mask_box(rle: Mapping[str, Any]) -> list[float]:
    """Return the box around a mask, xywh in pixels; all zeros if the mask is empty."""
    return [float(value) for value in _rle_functions().to_bbox(dict(rle))]


def box_mask(box_xywh: Sequence[float], size: tuple[int, int]) -> RLE:
    """Return the mask of a box, xywh in pixels, in an image of this height and width."""
    return _as_text(_rle_functions().fr_py_objects([list(box_xywh)], *size)[0])


def no_mask(size: tuple[int, int]) -> RLE:
    """Return a mask without a pixel, in an image of this height and width."""
    return _as_text(_rle_functions().fr_py_objects({"size": list(size), "counts": [size[0] * size[1]]}, *size))


def read_segmentation(value: Any, size: tuple[int, int]) -> RLE | None:
    """Read the ``segmentation`` of an annotation of a COCO file.

    Polygons are filled as pycocotools fills them: where one crosses itself, by the even-odd rule; parts outside the image are cut off.

    Args:
        value: Polygons ``[[x1, y1, x2, y2, ...], ...]`` in pixels, or an RLE, compressed or not.
        size: Height and width of the image in pixels.

    Returns:
        The mask; None where there is none: no segmentation, no polygon of three points or more, or not a pixel inside of the image.

    Raises:
        UserError: The value is neither, a polygon has an odd number of coordinates, or an RLE has another size than the image.
    """
    if value is None or value == [] or value == {}:
        return None
    rle = _read_rle(value, size) if isinstance(value, dict) else _read_polygons(value, size)
    return rle if rle is not None and mask_area(rle) else None


def polygons_of(value: Any) -> list[list[float]]:
    """Return the polygons of a ``segmentation`` that is no RLE.

    Raises:
        UserError: It is not a list of polygons, or a polygon has an odd number of coordinates.
    """
    if not isinstance(value, list):
        raise UserError(f"segmentation {short(value)} is neither polygons [[x1, y1, x2, y2, ...], ...] nor an RLE with size and counts")
    for polygon in value:
        if not isinstance(polygon, list) or not all(is_number(number) and is_finite(number) for number in polygon):
            raise UserError(f"segmentation: polygon {short(polygon)} is not a list of numbers [x1, y1, x2, y2, ...]")
        if len(polygon) % 2:
            raise UserError(f"segmentation: a polygon has {len(polygon)} coordinates; x and y come in pairs")
    return value


def _read_polygons(value: Any, size: tuple[int, int]) -> RLE | None:
    outlines = [polygon for polygon in polygons_of(value) if len(polygon) >= 6]
    return _as_text(_rle_functions().merge(_rle_functions().fr_py_objects(outlines, *size))) if outlines else None


def _read_rle(value: Mapping[str, Any], size: tuple[int, int]) -> RLE:
    counts, theirs = value.get("counts"), value.get("size")
    sides = [whole_number(side) for side in theirs] if isinstance(theirs, list) else []
    if len(sides) != 2 or not isinstance(counts, (list, str)):
        raise UserError(f"segmentation {short(value)} is not an RLE with size [height, width] and counts")
    if tuple(sides) != size:
        raise UserError(
            f"segmentation: an RLE of {sides[1]} x {sides[0]} pixels in an image of {size[1]} x {size[0]}; "
            "encode the mask at the image's size"
        )
    if isinstance(counts, str):
        counts = _runs(counts)
    numbers = [whole_number(run) for run in counts]
    if any(run is None or run < 0 for run in numbers) or sum(run or 0 for run in numbers) != size[0] * size[1]:
        raise UserError(f"segmentation: the counts of an RLE are damaged: they do not add up to {size[1]} x {size[0]} pixels")
    return _as_text(_rle_functions().fr_py_objects({"size": list(size), "counts": numbers}, *size))


def _runs(text: str) -> list[int]:
    """Return the run lengths of a compressed RLE (``rleFrString`` of pycocotools); [-1] if the text is damaged."""
    runs: list[int] = []
    number = shift = 0
    for letter in text:
        code = ord(letter) - 48
        if not 0 <= code < 64 or shift > 60:
            return [-1]
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return runs if not shift else [-1]


def _as_text(rle: Mapping[str, Any]) -> RLE:
    counts = rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}
