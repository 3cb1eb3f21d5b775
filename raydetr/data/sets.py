"""The training and the validation set of a run: those of the files, or divided anew by ``data.folds`` or ``data.reshuffle``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from raydetr.config import Data
from raydetr.data.cache import DecodedImages
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.splits import alike_groups, box_counts, stratified_parts
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import UserError
from raydetr.text import count
from raydetr.values import short

Categories = Sequence[Mapping[str, Any]]
Reader = Callable[[Path, tuple[int, int] | None], torch.Tensor]  # every file here has its size


def load_sets(
    data: Data,
    seed: int = 0,
    *,
    normalized: bool = True,
    categories: Categories | None = None,
    decoded: DecodedImages | None = None,
    limit: int = 0,
    masks: bool = False,
) -> tuple[CocoImages, CocoImages]:
    """Load the training and the validation set.

    With ``data.fold``, that fold of the training set takes the place of the validation set, which need not exist. With
    ``data.reshuffle``, the images of both are divided anew. Both keep look-alike images together and give each part its share of every
    category. Of the training set, ``data.fraction`` remains.

    Args:
        data: The settings ``data.*``.
        seed: Seed of the random transforms and of the images that ``data.fraction`` leaves.
        normalized: As for :func:`raydetr.data.transforms.train_transforms`.
        categories: The categories in label order, of a trained model; None: those of the training set.
        decoded: Reads images that were decoded before; None: at most ``limit`` bytes of them are kept.
        limit: See ``decoded``.
        masks: Whether the targets have masks.

    Raises:
        UserError: The data cannot be read, or there are too few images for the folds.
    """
    read_masks = masks or data.copy_paste > 0
    train = CocoImages(find_split(data, "train"), train_transforms(data, normalized), seed, categories, read_masks)
    train.target_masks = masks
    if data.fold is not None:
        _decode_once([train], decoded, limit)
        train, val = _with_fold_held_out(train, data, val_transforms(data, normalized))
    else:
        val = CocoImages(find_split(data, "val"), val_transforms(data, normalized), seed, train.categories, read_masks)
        val.target_masks = masks
        _decode_once([train, val], decoded, limit)
        train, val = _divided_anew(train, val, data.reshuffle_seed) if data.reshuffle else (train, val)
    train.copy_paste = data.copy_paste
    if data.fraction < 1:
        order = nested_order(box_counts(train.coco), seed)
        train = _keeping_warnings(train, order[: max(1, round(data.fraction * len(train)))])
    return train, val


def _decode_once(sets: Sequence[CocoImages], decoded: DecodedImages | None, limit: int) -> None:
    """Let data sets decode their images, and their masks if they have some, through one cache."""
    files = [file for each in sets for file in each.files]
    rles = [of_image for each in sets for of_image in each.rles or []]  # of all sets, or of none
    images = decoded or DecodedImages(files, limit, sets[0].split.read, rles or None)
    for each in sets:
        each.images, each.decode_masks = images, images.masks


def _with_fold_held_out(images: CocoImages, data: Data, transforms: Callable) -> tuple[CocoImages, CocoImages]:
    folds, fold = data.folds or 0, data.fold or 0
    check_folds(images.coco, folds)
    groups = alike_groups(images.files, cast(Reader, images.images))
    held_out = stratified_parts(box_counts(images.coco), [1 / folds] * folds, groups) == fold - 1
    return _keeping_warnings(images, np.flatnonzero(~held_out)), images.selected(np.flatnonzero(held_out), transforms)


def _divided_anew(train: CocoImages, val: CocoImages, seed: int) -> tuple[CocoImages, CocoImages]:
    both, share = train.joined(val), len(val) / (len(train) + len(val))
    groups = alike_groups(both.files, cast(Reader, both.images))
    to_val = stratified_parts(box_counts(both.coco), [1 - share, share], groups, seed) == 1
    new_train, new_val = both.selected(np.flatnonzero(~to_val)), both.selected(np.flatnonzero(to_val), val.transforms)
    new_train.warnings, new_val.warnings = train.warnings, val.warnings
    return new_train, new_val


def _keeping_warnings(images: CocoImages, rows: np.ndarray) -> CocoImages:
    part = images.selected(rows)
    part.warnings = images.warnings
    return part


def check_folds(coco: Mapping[str, Sequence[Mapping[str, Any]]], folds: int) -> None:
    """Check that every fold can have an image of each category.

    Args:
        coco: The training set, as :func:`raydetr.data.coco.load_coco` returns it.
        folds: The number of folds.

    Raises:
        UserError: A category is on fewer images.
    """
    images = (box_counts(coco) > 0).sum(0)
    few = [(number, category["name"]) for number, category in zip(images.tolist(), coco["categories"], strict=True) if 0 < number < folds]
    if few:
        number, name = min(few)
        at_most = f"use {number} folds at most" if number > 1 else "label more images"
        raise UserError(f"data.folds: {folds} folds are more than the {count(number, 'image')} of category {short(name)}; {at_most}")


def check_cut_outs(coco: Mapping[str, Sequence[Mapping[str, Any]]], annotations: Path) -> None:
    """Check that a training set has objects that ``data.copy_paste`` can cut out.

    Args:
        coco: The training set, as :func:`raydetr.data.coco.load_coco` returns it with masks.
        annotations: Its file, for the message.

    Raises:
        UserError: No object has a mask.
    """
    if not any(each["segmentation"] and not each["iscrowd"] for each in coco["annotations"]):
        raise UserError(
            f"data.copy_paste: {annotations} has no mask, neither polygons nor RLE, to cut objects out by; annotate outlines, "
            "or set data.copy_paste 0"
        )


def nested_order(counts: np.ndarray, seed: int) -> np.ndarray:
    """Return an order of images whose beginnings, however long, have their share of the boxes of every category.

    The next image is always the one after which the shares of all categories, and of the images, differ least. A shorter beginning is
    part of every longer one.

    Args:
        counts: Boxes by image and category, int [N, K].
        seed: Seed of the order of equal images, and of the first image.

    Returns:
        Positions of the images, int64 [N].
    """
    order = np.random.default_rng(seed).permutation(len(counts))
    shares = counts[order][:, counts.sum(0) > 0] / counts.sum(0)[counts.sum(0) > 0]
    chosen, left, have = [], np.ones(len(counts), dtype=bool), np.zeros(shares.shape[1])
    for number in range(1, len(counts) + 1):
        behind = ((have + shares - number / len(counts)) ** 2).sum(1)
        position = int(np.where(left, behind, np.inf).argmin()) if chosen else 0
        chosen.append(position)
        left[position] = False
        have += shares[position]
    return order[chosen]


def describe_sets(data: Data) -> str | None:
    """Return which images a run trains and scores on, in words; None where they are those of the files."""
    if data.fold is not None:
        return f"fold {data.fold} of {data.folds} of the training set is held out and scored"
    if data.reshuffle:
        return f"training and validation images are divided anew (data.reshuffle_seed {data.reshuffle_seed})"
    return None
