"""Tell whether a data set is still the one that a run was trained on, and what has changed if not.

The fingerprint of one split covers image ids, image sizes, boxes with their categories, and the categories; of a set that was loaded with
masks also these. It does not cover file names, folders, pixels, or the order of the entries, so that a data set that was moved is the same
data set. It holds one digest per image (36 bytes; 44 with masks), which is what allows :func:`fingerprint_difference` to name the images
that changed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raydetr.values import short

SHOWN = 3  # ids or names listed per difference


def data_fingerprint(coco: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the fingerprint of one split.

    Args:
        coco: The split as :func:`raydetr.data.coco.load_coco` returns it, or ``CocoImages.coco``.

    Returns:
        A dict that ``torch.save`` writes and ``torch.load(weights_only=True)`` reads, with N images in ascending order of their ids:
        ``image_ids`` int64 [N], ``sizes`` int64 [N, 2] (width and height in pixels), ``boxes`` int32 [N] (boxes per image),
        ``digests`` int64 [N] (of an image's boxes), and ``categories``, a list of dicts with ``id`` and ``name``. With masks it also has
        ``masks`` int64 [N] (a digest of an image's masks and the boxes that they belong to).
    """
    images = sorted(coco["images"], key=lambda image: image["id"])
    rows = {image["id"]: row for row, image in enumerate(images)}
    names = {category["id"]: _digest(category["name"].encode("utf-8", "surrogatepass")) for category in coco["categories"]}
    annotations = coco["annotations"]
    # One row of 64-bit integers per box, sorted: an image's boxes are then adjacent and in an order that the file cannot change.
    numbers = np.array([(*each["bbox"], each["area"]) for each in annotations], dtype=np.float64).reshape(-1, 5) + 0.0  # -0.0 is 0.0
    keys = np.array(
        [(rows[each["image_id"]], each["category_id"], names[each["category_id"]], each["iscrowd"]) for each in annotations], dtype=np.int64
    ).reshape(-1, 4)
    with_masks = any("segmentation" in each for each in annotations)
    masks = [_digest(str(each["segmentation"] and each["segmentation"]["counts"]).encode()) for each in annotations] if with_masks else []
    boxes = np.concatenate([keys, numbers.view(np.int64), np.array(masks, np.int64).reshape(len(keys), int(with_masks))], axis=1)
    boxes = boxes[np.lexsort(boxes.T[::-1])]
    ends = np.searchsorted(boxes[:, 0], np.arange(len(images)), side="right")
    starts = np.concatenate([[0], ends[:-1]])
    content = boxes[:, 2:]  # by name: other category ids with the same names are a difference of the categories alone

    def digests(rows: np.ndarray) -> torch.Tensor:
        return torch.tensor([_digest(rows[start:end].tobytes()) for start, end in zip(starts, ends, strict=True)], dtype=torch.int64)

    return {
        "image_ids": torch.tensor([image["id"] for image in images], dtype=torch.int64),
        "sizes": torch.tensor([(image["width"], image["height"]) for image in images], dtype=torch.int64).view(-1, 2),
        "boxes": torch.from_numpy((ends - starts).astype(np.int32)),
        "digests": digests(content[:, :7]),
        **({"masks": digests(content)} if with_masks else {}),
        "categories": [{"id": each["id"], "name": each["name"]} for each in coco["categories"]],
    }


def fingerprint_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two fingerprints of :func:`data_fingerprint`, one readable line each; empty where nothing does.

    Examples of lines: ``3 images added (ids 4, 5, 6)``, ``boxes of image 17 changed (2 before, 3 now)``, ``masks of image 17 changed``,
    ``category 'dog' removed``. Masks are compared where both fingerprints have them.
    """
    old = {image_id: row for row, image_id in enumerate(before["image_ids"].tolist())}
    new = {image_id: row for row, image_id in enumerate(now["image_ids"].tolist())}
    differences = _category_differences(before["categories"], now["categories"])
    for verb, ids in (("added", [each for each in new if each not in old]), ("removed", [each for each in old if each not in new])):
        if ids:
            differences.append(f"image {ids[0]} {verb}" if len(ids) == 1 else f"{len(ids)} images {verb} ({_ids(ids)})")
    shared = [(row, new[each]) for each, row in old.items() if each in new]
    there, here = (torch.tensor(rows, dtype=torch.int64) for rows in (zip(*shared, strict=True) if shared else ((), ())))
    sizes = [[f"{width} x {height}" for width, height in each.tolist()] for each in (before["sizes"][there], now["sizes"][here])]
    counts = [[f"{count}" for count in each.tolist()] for each in (before["boxes"][there], now["boxes"][here])]
    ids = before["image_ids"][there].tolist()
    differences += _changes("size", ids, (before["sizes"][there] != now["sizes"][here]).any(1), *sizes)
    boxes = before["digests"][there] != now["digests"][here]
    differences += _changes("boxes", ids, boxes, *counts)
    if "masks" in before and "masks" in now:
        differences += _changes("masks", ids, (before["masks"][there] != now["masks"][here]) & ~boxes, counts[0], counts[0])
    return differences


def _changes(what: str, ids: list[int], changed: torch.Tensor, before: list[str], now: list[str]) -> list[str]:
    rows = changed.nonzero().flatten().tolist()
    if not rows:
        return []
    if len(rows) > 1:
        return [f"{what} of {len(rows)} images changed ({_ids([ids[row] for row in rows])})"]
    values = f" ({before[rows[0]]} before, {now[rows[0]]} now)" if before[rows[0]] != now[rows[0]] else ""
    return [f"{what} of image {ids[rows[0]]} changed{values}"]


def _category_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    old, new = [(each["id"], each["name"]) for each in before], [(each["id"], each["name"]) for each in now]
    removed, added = [each for each in old if each not in new], [each for each in new if each not in old]
    renumbered = [(name, category_id, other) for category_id, name in removed for other, same in added if same == name]
    moved = {name for name, _, _ in renumbered}
    lines = [f"id of category {short(name)} changed ({category_id} before, {other} now)" for name, category_id, other in renumbered]
    for verb, entries in (("added", added), ("removed", removed)):
        lines += [f"category {short(name)} {verb}" for _, name in entries if name not in moved]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"{len(lines) - SHOWN} more differences of the categories"]


def _ids(ids: list[int]) -> str:
    return "ids " + ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
