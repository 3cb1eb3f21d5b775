"""Masks of objects: read from COCO files, and converted between arrays and COCO's run-length encoding (RLE).

An RLE here is the compressed one that pycocotools reads and JSON holds: ``{"size": [height, width], "counts": "..."}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import hotcoco.mask
import numpy as np

RLE = dict[str, Any]


def encode_masks(masks: np.ndarray) -> list[RLE]:
    """Return the RLE of each mask, bool [n, height, width]."""
    return [_as_text(hotcoco.mask.encode(mask)) for mask in masks]


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
        mask[:] = hotcoco.mask.decode(dict(rle))
    return masks


def _as_text(rle: Mapping[str, Any]) -> RLE:
    counts = rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode() if isinstance(counts, bytes) else counts}
