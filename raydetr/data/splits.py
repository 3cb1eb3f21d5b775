"""Divide images into parts: each with its share of every category, and images that look alike in one part.

``raydetr data split`` divides a data set into training, validation and test images with it, and cross-validation into folds.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.nn.functional import adaptive_avg_pool2d

from raydetr.data.images import read_image
from raydetr.errors import UserError

THUMBNAIL = 16  # cells per side that an image is averaged to, to find images that look the same
# Root mean square difference (of 255) between the cells of two images, below which they are taken for the same scene. The same
# photograph compressed or scaled again differs by about 1, another view of a microscope's field by 3, different photographs by 12 or more.
ALIKE = 5.0
ROWS = 256  # images whose distances to all others are computed at a time


def box_counts(coco: Mapping[str, Sequence[Mapping[str, Any]]]) -> np.ndarray:
    """Return the number of boxes of each category on each image, crowd regions left out.

    Args:
        coco: A split as :func:`raydetr.data.coco.load_coco` returns it.

    Returns:
        int64 [N, K], images and categories in the order of the file.
    """
    rows = {image["id"]: row for row, image in enumerate(coco["images"])}
    columns = {category["id"]: column for column, category in enumerate(coco["categories"])}
    counts = np.zeros((len(rows), len(columns)), dtype=np.int64)
    for each in coco["annotations"]:
        if not each["iscrowd"]:
            counts[rows[each["image_id"]], columns[each["category_id"]]] += 1
    return counts


def stratified_parts(
    counts: np.ndarray, shares: Sequence[float], groups: Sequence[int] | np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Divide images into parts so that each part gets its share of the boxes of every category, and of the images.

    Groups are dealt out one after another, those with the rarest category first, as in iterative stratification (Sechidis et al., "On
    the stratification of multi-label data", 2011). Within a category, each goes to the part that is furthest behind by the rule of
    Sainte-Laguë, the groups with most boxes first, so that crowded images are spread as well. The number of images of a part is its
    share, rounded, unless groups are too large for that.

    Args:
        counts: Boxes by image and category, int [N, K].
        shares: Positive share of each part; they sum to 1. Equal shares make folds.
        groups: The group of each image, such as :func:`alike_groups` returns; a group stays whole. None: every image alone.
        seed: Seed of the order of equal images.

    Returns:
        The number of the part of each image, int64 [N].

    Raises:
        UserError: There are fewer groups than parts.
    """
    random = np.random.default_rng(seed)
    _, unit_of = np.unique(np.arange(len(counts)) if groups is None else np.asarray(groups), return_inverse=True)
    sizes = np.bincount(unit_of)
    if len(sizes) < len(shares):
        alike = "" if groups is None or len(sizes) == len(counts) else f" in {len(sizes)} groups of look-alike images"
        raise UserError(f"{len(counts)} images{alike} cannot be divided into {len(shares)} parts")
    boxes = np.zeros((len(sizes), counts.shape[1]), dtype=np.int64)
    np.add.at(boxes, unit_of, counts)
    part_of = np.full(len(sizes), -1)
    room, have, weights = _part_sizes(len(counts), shares), np.zeros((len(shares), counts.shape[1] + 1)), np.asarray(shares, dtype=float)
    columns = np.concatenate([boxes, sizes[:, None]], axis=1)  # the last column, the images, deals out what has no box
    while (part_of < 0).any():
        left = columns * (part_of < 0)[:, None]
        totals = np.where(left.sum(0) > 0, (left > 0).sum(0), np.inf)
        totals[-1] = np.inf if (totals[:-1] < np.inf).any() else totals[-1]
        column = int(totals.argmin())
        order = random.permutation(np.flatnonzero(left[:, column]))
        for unit in order[np.argsort(-columns[order, column], kind="stable")]:
            fitting = np.flatnonzero(room >= sizes[unit])
            fitting = fitting if len(fitting) else np.flatnonzero(room == room.max())
            empty = np.flatnonzero(have[:, -1] == 0)
            fitting = empty if (part_of < 0).sum() <= len(empty) else fitting
            behind = [(have[fitting, key] + columns[unit, key] / 2) / weights[fitting] for key in (-1, column)]
            part = fitting[np.lexsort(behind)[0]]
            part_of[unit] = part
            have[part] += columns[unit]
            room[part] -= sizes[unit]
    return part_of[unit_of]


def _part_sizes(number: int, shares: Sequence[float]) -> np.ndarray:
    """The number of images of each part: its share, rounded so that they sum to ``number``, and at least 1."""
    exact = np.asarray(shares, dtype=float) * number
    sizes = np.maximum(np.floor(exact).astype(np.int64), 1)
    for part in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        sizes[part] += sizes.sum() < number
    sizes[sizes.argmax()] += number - sizes.sum()
    return sizes


def alike_groups(
    files: Sequence[tuple[Path, tuple[int, int] | None]],
    read: Callable[[Path, tuple[int, int] | None], torch.Tensor] = read_image,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Return the group of each image. Images that look alike, and copies of one file, are in one group.

    Args:
        files: Path and annotated (width, height) of each image, such as :attr:`raydetr.data.coco.CocoImages.files`.
        read: Decodes a file, such as :meth:`raydetr.data.coco.Split.read`.
        progress: Called with (done, total) after each image.

    Returns:
        Numbers from 0, int [N], in the order of the groups' first images.

    Raises:
        UserError: An image cannot be read.
    """

    def look(file: tuple[Path, tuple[int, int] | None]) -> tuple[torch.Tensor, bytes]:
        return thumbnail(read(*file)), file_digest(file[0])

    seen = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for done, each in enumerate(pool.map(look, files), 1):
            seen.append(each)
            if progress:
                progress(done, len(files))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all the rest
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digest, row), row) for row, (_, digest) in enumerate(seen)]
    cells = torch.stack([each for each, _ in seen])
    telling = torch.tensor([is_telling(each) for each in cells])
    for start in range(0, len(cells), ROWS):
        near = (alike_distance(cells[start : start + ROWS], cells) < ALIKE) & telling & telling[start : start + ROWS, None]
        pairs += [(start + row, column) for row, column in near.nonzero().tolist()]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(cells), len(cells)))
    labels = connected_components(graph, directed=False)[1]
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(firsts))[inverse]


def thumbnail(pixels: torch.Tensor) -> torch.Tensor:
    """Return an image averaged to a few cells, float32 [3 x 16 x 16].

    Args:
        pixels: uint8 [3, height, width].
    """
    step = max(1, min(pixels.shape[-2:]) // (32 * THUMBNAIL))  # 1000 samples per cell are enough
    return adaptive_avg_pool2d(pixels[:, ::step, ::step].float(), THUMBNAIL).flatten()


def is_telling(cells: torch.Tensor) -> bool:
    """Return whether an image has enough contrast to be recognized by its thumbnail: blank images are all alike."""
    return bool(cells.std() > 2 * ALIKE)


def alike_distance(cells: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the root mean square difference between thumbnails, of 255: below ``ALIKE`` for images that look the same.

    Args:
        cells: [A, C], such as :func:`thumbnail` returns.
        others: [B, C].

    Returns:
        [A, B].
    """
    return torch.cdist(cells, others) / cells.shape[1] ** 0.5


def file_digest(path: Path) -> bytes:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
