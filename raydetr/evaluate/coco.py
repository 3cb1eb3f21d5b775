"""COCO average precision of boxes and masks: the twelve numbers of a data set and of each of its categories.

The numbers come from hotcoco, an implementation of COCO's protocol in Rust; the tests compare it with pycocotools, the reference. COCO's
rules apply unchanged. At most 100 detections of a category count in one image (those with the highest scores), so that an image with more
than 100 objects of one category cannot reach a recall of 1. A crowd region is neither a miss nor a hit. A number that is undefined (no
object of that size, or no object at all) is None here, where pycocotools reports -1.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from raydetr.data.masks import box_mask, mask_area, mask_box
from raydetr.errors import UserError
from raydetr.evaluate.matches import AREAS, IOUS, AnnotatedBoxes, Boxes, DetectedBoxes, Matches, coco_eval, mask_eval, match
from raydetr.memory import without_collections
from raydetr.values import is_finite

if TYPE_CHECKING:
    import hotcoco

# In the order of pycocotools' ``stats`` and of the official log's ``test_coco_eval_bbox``: what is averaged (precision or recall), the
# IoU threshold (None: all ten), the size of the objects, and the number of detections that count per image and category.
METRICS = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "AP_small": ("precision", None, "small", 100),
    "AP_medium": ("precision", None, "medium", 100),
    "AP_large": ("precision", None, "large", 100),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "AR_small": ("recall", None, "small", 100),
    "AR_medium": ("recall", None, "medium", 100),
    "AR_large": ("recall", None, "large", 100),
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An accumulated evaluation of detections on a data set.

    Images and categories are identified by their position in the order of their ids, because hotcoco requires small whole numbers and COCO
    files contain all kinds of ids.

    Attributes:
        image_ids: The ids of the images, sorted.
        category_ids: The ids of the categories, sorted.
        objects: The annotated boxes, in the order of the annotations.
        detections: The detected boxes, in the order of the results, without those of unknown categories.
        numbers: hotcoco's evaluation, which contains precision and recall.
        masks: Whether masks were compared and not boxes.
    """

    image_ids: list
    category_ids: list
    objects: AnnotatedBoxes
    detections: DetectedBoxes
    numbers: "hotcoco.COCOeval"
    masks: bool = False

    @property
    def accumulated(self) -> dict[str, np.ndarray]:
        """``precision`` [IoU, recall level, category, size, most] and ``recall`` [IoU, category, size, most], -1 where undefined."""
        return cast(dict[str, np.ndarray], self.numbers.eval)

    @functools.cached_property
    def matches(self) -> Matches:
        """Which detection matches which object, at each IoU threshold and object size."""
        evaluated = self.numbers if self.masks else None
        return match(self.objects, self.detections, len(self.image_ids), len(self.category_ids), evaluated)


def coco_metrics(coco: dict, results: list[dict]) -> dict[str, Any]:
    """Return the twelve COCO numbers of detections, over all categories and for each category.

    Args:
        coco: A COCO data set with ``images``, ``annotations`` and ``categories``. Annotation ids may be anything, also duplicates.
        results: COCO results: dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``.

    Returns:
        The numbers under the names of ``METRICS``, None where undefined; and under ``per_category`` the same for each category by its name.
        Neither argument is changed.

    Raises:
        UserError: An entry of ``results`` is not a detection, or belongs to an image that ``coco`` does not have.
    """
    return summarize(run_coco_eval(coco, results), coco["categories"])


def run_coco_eval(coco: dict, results: list[dict]) -> Evaluation:
    """Evaluate detections on a data set, and accumulate precision and recall.

    Detections of categories that the data set does not have are left out, as in pycocotools.

    Args:
        coco: A COCO data set with ``images``, ``annotations`` and ``categories``.
        results: COCO results: dicts with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels) and ``score``.

    Raises:
        UserError: An entry of ``results`` is not a detection, or belongs to an image that ``coco`` does not have.
    """
    check_results(coco, results)
    image_ids = sorted(image["id"] for image in coco["images"])
    category_ids = sorted(category["id"] for category in coco["categories"])
    with without_collections():
        objects = _objects(coco["annotations"], image_ids, category_ids)
        detections = _detections(results, image_ids, category_ids)
        numbers = coco_eval(objects, detections, len(image_ids), len(category_ids))
        numbers.accumulate()
    return Evaluation(image_ids, category_ids, objects, detections, numbers)


def check_results(coco: dict, results: list[dict]) -> None:
    """Check that every entry of ``results`` is a COCO detection in an image of the data set.

    Args:
        coco: A COCO data set.
        results: Unchecked value, which should be a list of dicts with ``image_id``, ``category_id``, ``bbox`` and ``score``.

    Raises:
        UserError: An entry is not such a detection; the message names the first.
    """
    if not isinstance(results, list):
        raise UserError(f"results: expected a list of detections, found a {type(results).__name__}")
    known = {image["id"] for image in coco["images"]}
    for number, result in enumerate(results):
        if not isinstance(result, dict) or not {"image_id", "category_id", "bbox", "score"} <= result.keys():
            raise UserError(f"results: entry {number} is not a detection with image_id, category_id, bbox and score")
        if result["image_id"] not in known:
            raise UserError(f"results: entry {number} belongs to image {result['image_id']!r}, which the annotations do not have")
        box_xywh, score = result["bbox"], result["score"]
        if not isinstance(box_xywh, (list, tuple)) or len(box_xywh) != 4 or not all(map(is_finite, (*box_xywh, score))):
            raise UserError(
                f"results: entry {number} (image {result['image_id']}) has bbox {box_xywh!r} and score {score!r}; "
                "a bbox is four numbers, a score one, all of them finite"
            )


def _objects(annotations: list[dict], image_ids: list, category_ids: list) -> AnnotatedBoxes:
    boxes = _boxes(annotations, image_ids, category_ids)
    area = [each.get("area", width * height) for each, (_, _, width, height) in zip(annotations, boxes.xywh.tolist(), strict=True)]
    crowd = [bool(each.get("iscrowd", 0)) for each in annotations]
    return AnnotatedBoxes(boxes.image, boxes.category, boxes.xywh, np.array(area, float), np.array(crowd, bool))


def _detections(results: list[dict], image_ids: list, category_ids: list) -> DetectedBoxes:
    results = _known(results, category_ids)
    boxes = _boxes(results, image_ids, category_ids)
    score = np.array([result["score"] for result in results], float)
    return DetectedBoxes(boxes.image, boxes.category, boxes.xywh, boxes.area, score)


def _known(results: list[dict], category_ids: list) -> list[dict]:
    known = set(category_ids)
    return [result for result in results if result["category_id"] in known]


def _boxes(entries: list[dict], image_ids: list, category_ids: list) -> Boxes:
    image = {number: position for position, number in enumerate(image_ids)}
    category = {number: position for position, number in enumerate(category_ids)}
    xywh = np.array([entry["bbox"] for entry in entries], float).reshape(-1, 4)
    return Boxes(
        image=np.array([image[entry["image_id"]] for entry in entries], np.int64),
        category=np.array([category[entry["category_id"]] for entry in entries], np.int64),
        xywh=xywh,
        area=xywh[:, 2] * xywh[:, 3],
    )


def summarize(evaluation: Evaluation, categories: Iterable[dict]) -> dict[str, Any]:
    """Return the twelve COCO numbers of an evaluation, as :func:`coco_metrics` does.

    Args:
        evaluation: The result of :func:`run_coco_eval`.
        categories: The data set's categories. Those that share a name are told apart by their ids: ``"dog (3)"``.
    """
    return _summary(evaluation.accumulated, evaluation.category_ids, categories)


def mask_metrics(coco: dict, results: list[dict]) -> dict[str, Any]:
    """Return the twelve COCO numbers of masks (``segm``), over all categories and per category.

    The arguments are those of :func:`run_mask_eval`, and the numbers are in the form of :func:`coco_metrics`.
    """
    return summarize(run_mask_eval(coco, results), coco["categories"])


def run_mask_eval(coco: dict, results: list[dict]) -> Evaluation:
    """Evaluate masks (``segm``) on a data set, and accumulate precision and recall.

    An annotation without a mask is neither a miss nor a hit: its box is taken for a crowd region.

    Args:
        coco: A COCO data set with ``images`` (with ``width`` and ``height``), ``annotations`` and ``categories``. A ``segmentation`` is an
            RLE, or None, as :func:`raydetr.data.coco.load_coco` returns it.
        results: COCO results: dictionaries with ``image_id``, ``category_id``, ``segmentation`` (RLE) and ``score``. Those without a
            ``segmentation`` are left out, and those of categories that ``coco`` does not have.
    """
    image_ids = sorted(image["id"] for image in coco["images"])
    category_ids = sorted(category["id"] for category in coco["categories"])
    size = {each["id"]: (each["height"], each["width"]) for each in coco["images"]}
    annotations = [each | {"iscrowd": each["iscrowd"] or not each["segmentation"]} for each in coco["annotations"]]
    true_masks = [each["segmentation"] or box_mask(each["bbox"], size[each["image_id"]]) for each in annotations]
    results = [each | {"bbox": mask_box(each["segmentation"])} for each in _known(results, category_ids) if each.get("segmentation")]
    masks = [each["segmentation"] for each in results]
    with without_collections():
        objects = _objects(annotations, image_ids, category_ids)
        detections = _detections(results, image_ids, category_ids)
        detections = dataclasses.replace(detections, area=np.array(list(map(mask_area, masks)), float))
        numbers = mask_eval(objects, true_masks, detections, masks, [size[each] for each in image_ids], len(category_ids))
        numbers.accumulate()
    return Evaluation(image_ids, category_ids, objects, detections, numbers, masks=True)


def _summary(accumulated: dict[str, np.ndarray], category_ids: list, categories: Iterable[dict]) -> dict[str, Any]:
    categories = list(categories)
    names = category_names(categories)
    precision, recall = accumulated["precision"], accumulated["recall"]
    per_category = {
        names[number]: _numbers(precision, recall, category_ids.index(number)) for number in (each["id"] for each in categories)
    }
    return {**_numbers(precision, recall, slice(None)), "per_category": per_category}


def category_names(categories: Iterable[dict]) -> dict[Any, str]:
    """Return the name under which each category is shown. A name that several categories have gets the id: ``"dog (3)"``.

    Args:
        categories: The data set's categories, dicts with ``id`` and ``name``.

    Returns:
        The names by category id.
    """
    categories = list(categories)
    names = [category["name"] for category in categories]
    return {each["id"]: f"{each['name']} ({each['id']})" if names.count(each["name"]) > 1 else each["name"] for each in categories}


def _numbers(precision: np.ndarray, recall: np.ndarray, category: int | slice) -> dict[str, float | None]:
    values = {"precision": precision, "recall": recall}
    return {name: _mean(values[what], category, *how) for name, (what, *how) in METRICS.items()}


def _mean(values: np.ndarray, category: int | slice, iou: float | None, size: str, most: int) -> float | None:
    # Precision is [IoU, recall level, category, size, most], recall [IoU, category, size, most].
    values = values[..., category, list(AREAS).index(size), (1, 10, 100).index(most)]
    if iou is not None:
        values = values[np.isclose(IOUS, iou)]
    values = values[values > -1]
    # Rounded, since pycocotools' precision of one single perfect detection is 1 / (1 + 2e-16).
    return round(float(values.mean()), 12) if values.size else None


def stats(metrics: dict[str, Any]) -> list[float]:
    """Return the twelve numbers in the form of pycocotools' ``stats``.

    Args:
        metrics: The result of :func:`coco_metrics`.

    Returns:
        The numbers in the order of ``METRICS``, -1 where undefined.
    """
    return [-1.0 if metrics[name] is None else metrics[name] for name in METRICS]


def precision_recall(evaluation: Evaluation, thresholds: int = 101) -> dict[str, np.ndarray]:
    """Return precision and recall of all categories together at an IoU of 0.5, for score thresholds from 0 to 1.

    Args:
        evaluation: The result of :func:`run_coco_eval`.
        thresholds: The number of score thresholds, evenly spaced from 0 to 1.

    Returns:
        Arrays [thresholds]: ``threshold``, ``true_positives``, ``false_positives``, ``false_negatives``, ``precision`` (1 where nothing is
        detected) and ``recall`` (0 if there are no objects).
    """
    matches = evaluation.matches
    counted = ~matches.ignored[0, 0]
    scores, hits, objects = matches.score[counted], matches.matched[0, 0][counted], int(matches.objects[0].sum())
    order = np.argsort(scores, kind="stable")
    threshold = np.linspace(0, 1, thresholds)
    below = np.searchsorted(scores[order], threshold, side="left")
    hits_from = np.append(np.cumsum(hits[order][::-1])[::-1], 0)  # hits among the detections from this one on
    true_positives = hits_from[below]
    detected = len(scores) - below
    return {
        "threshold": threshold,
        "true_positives": true_positives,
        "false_positives": detected - true_positives,
        "false_negatives": objects - true_positives,
        "precision": np.divide(true_positives, detected, out=np.ones(thresholds), where=detected > 0),
        "recall": true_positives / max(objects, 1),
    }
