"""Which detection matches which object, as arrays: the part of a COCO evaluation that does not depend on how images are weighted.

hotcoco computes the matches. Reading them image by image costs far more than computing them, so hotcoco gets only the detections that
overlap an object enough to match it. All others are unmatched in any case.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from raydetr.data.masks import RLE

if TYPE_CHECKING:  # loaded late: a run needs it at the end of its first epoch
    import hotcoco

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's IoU thresholds
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}  # in square pixels
MOST_DETECTIONS = 100  # that count of a category in one image


@dataclasses.dataclass(frozen=True)
class Boxes:
    """N boxes in some images. Images and categories are identified by their positions, counted from 0.

    Attributes:
        image: Image of each box, int64 [N].
        category: Category of each box, int64 [N].
        xywh: Left, top, width and height in pixels, float64 [N, 4].
        area: Area of the object in square pixels, which may be less than that of its box, float64 [N].
    """

    image: np.ndarray
    category: np.ndarray
    xywh: np.ndarray
    area: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Self:
        """Return the boxes at the positions ``chosen``, int64 [M]."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True)
class AnnotatedBoxes(Boxes):
    """Annotated boxes.

    Attributes:
        crowd: Whether each is a crowd region, bool [N].
    """

    crowd: np.ndarray


@dataclasses.dataclass(frozen=True)
class DetectedBoxes(Boxes):
    """Detected boxes.

    Attributes:
        score: float64 [N].
    """

    score: np.ndarray


@dataclasses.dataclass(frozen=True)
class Matches:
    """The D detections that count, in COCO's order: by category, then from the highest score to the lowest.

    Attributes:
        image: Image of each detection, int64 [D].
        category: Category of each detection, int64 [D], ascending.
        score: float64 [D].
        rank: The detection's position by score in its image and category, from 0, int64 [D]. COCO counts the first 1, 10 or 100.
        row: The detection's row in the detections that were given, int64 [D].
        matched: Whether the detection hits an object that counts, bool [sizes of ``AREAS``, ``IOUS``, D].
        ignored: Whether the detection counts neither as a hit nor as a false positive, bool of the same shape.
        objects: The number of objects that count, int64 [sizes of ``AREAS``, images, categories].
    """

    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    rank: np.ndarray
    row: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


def coco_eval(objects: AnnotatedBoxes, detections: DetectedBoxes, images: int, categories: int) -> "hotcoco.COCOeval":
    """Match detections with objects by hotcoco. Precision and recall are not accumulated yet.

    Args:
        objects: The annotated boxes.
        detections: The detected boxes.
        images: The number of images.
        categories: The number of categories.

    Returns:
        hotcoco's evaluation. Its ids of images, categories, objects and detections are their positions, counted from 1.
    """
    import hotcoco

    truth = hotcoco.COCO.from_arrays(
        [{"id": number} for number in range(1, images + 1)],
        [{"id": number, "name": str(number)} for number in range(1, categories + 1)],
        objects.image + 1,
        objects.category + 1,
        objects.xywh,
        area=objects.area,
        iscrowd=objects.crowd,
    )
    found = np.column_stack([detections.image + 1, detections.xywh, detections.score, detections.category + 1])
    evaluation = hotcoco.COCOeval(truth, truth.load_res(found), "bbox")
    evaluation.evaluate()
    return evaluation


def mask_eval(
    objects: AnnotatedBoxes,
    true_masks: Sequence[RLE],
    detections: DetectedBoxes,
    masks: Sequence[RLE],
    sizes: Sequence[tuple[int, int]],
    categories: int,
) -> "hotcoco.COCOeval":
    """Match the masks of detections with those of objects by hotcoco, as :func:`coco_eval` does with boxes.

    Args:
        objects: The annotated boxes.
        true_masks: The mask of each.
        detections: The detected boxes.
        masks: The mask of each.
        sizes: Height and width of each image.
        categories: The number of categories.
    """
    import hotcoco

    truth = hotcoco.COCO(
        {
            "images": [{"id": number, "height": height, "width": width} for number, (height, width) in enumerate(sizes, 1)],
            "categories": [{"id": number, "name": str(number)} for number in range(1, categories + 1)],
            "annotations": [
                {**entry, "id": number, "bbox": box_xywh, "area": area, "iscrowd": int(crowd)}
                for number, (entry, box_xywh, area, crowd) in enumerate(
                    zip(_entries(objects, true_masks), objects.xywh.tolist(), objects.area.tolist(), objects.crowd, strict=True), 1
                )
            ],
        }
    )
    found = [entry | {"score": score} for entry, score in zip(_entries(detections, masks), detections.score.tolist(), strict=True)]
    evaluation = hotcoco.COCOeval(truth, truth.load_res(found), "segm")
    evaluation.evaluate()
    return evaluation


def _entries(boxes: Boxes, masks: Sequence[RLE]) -> list[dict[str, Any]]:
    return [
        {"image_id": image + 1, "category_id": category + 1, "segmentation": mask}
        for image, category, mask in zip(boxes.image.tolist(), boxes.category.tolist(), masks, strict=True)
    ]


def match(
    objects: AnnotatedBoxes, detections: DetectedBoxes, images: int, categories: int, evaluated: "hotcoco.COCOeval | None" = None
) -> Matches:
    """Match detections with objects as COCO does.

    Args:
        objects: The annotated boxes.
        detections: The detected boxes.
        images: The number of images.
        categories: The number of categories.
        evaluated: hotcoco's evaluation of all detections, from which the matches are read; by default boxes are matched.
    """
    row, rank = _counted(detections)
    if evaluated is None:
        detections = detections[row]
        candidates = np.flatnonzero(_may_match(objects, detections, images))
        evaluated = coco_eval(objects, detections[candidates], images, categories)
    else:
        candidates = np.zeros(len(detections.image), np.int64)
        candidates[row] = np.arange(len(row))
        detections = detections[row]
    low, high = np.array(list(AREAS.values())).T[:, :, None]
    outside = (detections.area < low) | (detections.area > high)
    matched = np.zeros((len(AREAS), len(IOUS), len(row)), bool)
    ignored = np.repeat(outside[:, None], len(IOUS), 1)
    area_numbers = {limits: number for number, limits in enumerate(AREAS.values())}
    for pair in evaluated.eval_imgs:
        if pair is not None and pair["dtIds"]:
            number, chosen = area_numbers[tuple(pair["aRng"])], candidates[np.array(pair["dtIds"]) - 1]
            ignored[number][:, chosen] = pair["dtIgnore"]
            matched[number][:, chosen] = np.array(pair["dtMatched"]) & ~np.array(pair["dtIgnore"])
    return Matches(
        detections.image, detections.category, detections.score, rank, row, matched, ignored, _object_counts(objects, images, categories)
    )


def _counted(detections: DetectedBoxes) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the detections that count, in the order of ``Matches``, and the rank of each in its image and category."""
    order = np.lexsort((-detections.score, detections.image, detections.category))  # stable, as pycocotools' sorting
    image, category = detections.image[order], detections.category[order]
    first = np.r_[True, (np.diff(image) != 0) | (np.diff(category) != 0)][: len(order)]
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    order, rank = order[rank < MOST_DETECTIONS], rank[rank < MOST_DETECTIONS]
    by_score = np.lexsort((-detections.score[order], detections.category[order]))
    return order[by_score], rank[by_score]


def _may_match(objects: AnnotatedBoxes, detections: DetectedBoxes, images: int) -> np.ndarray:
    """Return whether each detection overlaps an object of its category and image by nearly the lowest IoU threshold or more, bool [D]."""
    keys, wanted = (images * boxes.category + boxes.image for boxes in (detections, objects))
    order = np.argsort(keys, kind="stable")
    first, end = np.searchsorted(keys[order], wanted, "left"), np.searchsorted(keys[order], wanted, "right")
    of_object = np.repeat(np.arange(len(wanted)), end - first)
    within = np.arange(len(of_object)) - np.repeat(np.cumsum(end - first) - (end - first), end - first)
    of_detection = order[first[of_object] + within]
    theirs, ours = objects.xywh[of_object], detections.xywh[of_detection]
    corner = np.minimum(theirs[:, :2] + theirs[:, 2:], ours[:, :2] + ours[:, 2:]) - np.maximum(theirs[:, :2], ours[:, :2])
    shared = corner.clip(0).prod(1)
    area, object_area = ours[:, 2:].prod(1), theirs[:, 2:].prod(1)
    whole = np.where(objects.crowd[of_object], area, area + object_area - shared)  # of a crowd, any part suffices
    found = np.zeros(len(keys), bool)
    found[of_detection[shared >= (IOUS[0] - 1e-3) * whole]] = True
    return found


def _object_counts(objects: AnnotatedBoxes, images: int, categories: int) -> np.ndarray:
    counts = np.zeros((len(AREAS), images, categories), np.int64)
    for number, (low, high) in enumerate(AREAS.values()):
        counted = ~objects.crowd & (objects.area >= low) & (objects.area <= high)
        np.add.at(counts[number], (objects.image[counted], objects.category[counted]), 1)
    return counts
