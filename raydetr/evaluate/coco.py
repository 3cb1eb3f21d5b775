"""COCO average precision of boxes, by faster-coco-eval: the twelve numbers, each category's own, and the curve behind them.

That is pycocotools in C++: the same numbers, to which the tests hold it, in a fraction of the time. COCO's rules hold as they are: a
category counts at most 100 detections in one image (the highest scores), so an image with more than 100 objects of one category
cannot reach recall 1; crowd regions are neither missed nor hit; a number that is not defined (no object of that size, or none at
all) is None here, where pycocotools says -1.
"""

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

try:
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:  # slower, the same numbers
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

from raydetr.errors import UserError
from raydetr.memory import without_collections

# In the order of pycocotools' ``stats`` and of the official log's ``test_coco_eval_bbox``: what is averaged (precision or recall),
# IoU threshold (None: all ten), size, most detections per image and category.
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


def coco_metrics(coco: dict, results: list[dict]) -> dict[str, Any]:
    """The numbers of ``METRICS`` by name, and under ``per_category`` the same of each category by its name.

    ``coco`` is a COCO data set (images, annotations, categories), ``results`` are COCO results (image_id, category_id, bbox xywh
    in pixels, score); neither is changed, and annotation ids may be anything. Raises UserError as :func:`run_coco_eval`.
    """
    return summarize(run_coco_eval(coco, results), coco["categories"])


def run_coco_eval(coco: dict, results: list[dict]) -> COCOeval:
    """The evaluation, accumulated; it prints nothing.

    Raises UserError for a result that is none, or of an image that is not in ``coco``. Results of categories that ``coco`` does
    not have are left out, as pycocotools does.
    """
    check_results(coco, results)
    # A matched annotation of id 0 would be taken for unmatched, and what is given is written into.
    annotations = [_annotation(annotation, number) for number, annotation in enumerate(coco["annotations"], 1)]
    detections = [_detection(result, number) for number, result in enumerate(results, 1)]
    with contextlib.redirect_stdout(io.StringIO()), without_collections():
        evaluation = COCOeval(_indexed(coco, annotations), _indexed(coco, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def check_results(coco: dict, results: list[dict]) -> None:
    """Raises UserError naming the first entry of ``results`` that is no COCO detection of an image of ``coco``."""
    if not isinstance(results, list):
        raise UserError(f"results: expected a list of detections, found a {type(results).__name__}")
    known = {image["id"] for image in coco["images"]}
    for number, result in enumerate(results):
        if not isinstance(result, dict) or not {"image_id", "category_id", "bbox", "score"} <= result.keys():
            raise UserError(f"results: entry {number} is no detection with image_id, category_id, bbox and score")
        if result["image_id"] not in known:
            raise UserError(f"results: entry {number} is of image {result['image_id']!r}, which the annotations do not have")
        box_xywh, score = result["bbox"], result["score"]
        if not isinstance(box_xywh, (list, tuple)) or len(box_xywh) != 4 or not all(map(_finite, (*box_xywh, score))):
            raise UserError(f"results: entry {number} (image {result['image_id']}) has bbox {box_xywh!r} and score {score!r}")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _annotation(annotation: dict, number: int) -> dict:
    box_xywh = annotation["bbox"]
    area = annotation.get("area", box_xywh[2] * box_xywh[3])
    return {**annotation, "id": number, "area": area, "iscrowd": int(annotation.get("iscrowd", 0))}


def _detection(result: dict, number: int) -> dict:
    box_xywh = result["bbox"]
    return {**result, "id": number, "area": box_xywh[2] * box_xywh[3], "iscrowd": 0}


def _indexed(coco: dict, annotations: list[dict]) -> COCO:
    indexed = COCO()
    indexed.dataset = {"images": coco["images"], "categories": coco["categories"], "annotations": annotations}
    indexed.createIndex()
    return indexed


def summarize(evaluation: COCOeval, categories: Iterable[dict]) -> dict[str, Any]:
    """The result of :func:`coco_metrics`, of an accumulated evaluation. Categories of one name are told apart by their ids."""
    categories = list(categories)
    names = [category["name"] for category in categories]
    ids = [int(number) for number in evaluation.params.catIds]
    per_category = {}
    for category in categories:
        twice = names.count(category["name"]) > 1
        name = f"{category['name']} ({category['id']})" if twice else category["name"]
        per_category[name] = _numbers(evaluation, ids.index(category["id"]))
    return {**_numbers(evaluation, slice(None)), "per_category": per_category}


def _numbers(evaluation: COCOeval, category: int | slice) -> dict[str, float | None]:
    return {name: _mean(evaluation, category, *how) for name, how in METRICS.items()}


def _mean(evaluation: COCOeval, category: int | slice, what: str, iou: float | None, size: str, most: int) -> float | None:
    params = evaluation.params
    values = evaluation.eval[what]  # precision [IoU, recall, category, size, most], recall [IoU, category, size, most]
    values = values[..., category, params.areaRngLbl.index(size), params.maxDets.index(most)]
    if iou is not None:
        values = values[np.isclose(params.iouThrs, iou)]
    values = values[values > -1]
    # Rounded, since pycocotools' precision of one single perfect detection is 1 / (1 + 2e-16).
    return round(float(values.mean()), 12) if values.size else None


def stats(metrics: dict[str, Any]) -> list[float]:
    """pycocotools' ``stats``: the twelve numbers in their order, -1 where undefined."""
    return [-1.0 if metrics[name] is None else metrics[name] for name in METRICS]


def precision_recall(evaluation: COCOeval, thresholds: int = 101) -> dict[str, np.ndarray]:
    """Precision and recall of all categories' detections together at IoU 0.5, as the score threshold goes from 0 to 1.

    Returns arrays [thresholds]: ``threshold``, ``true_positives``, ``false_positives``, ``false_negatives``, ``precision`` (1 where
    nothing is detected) and ``recall`` (0 where there is nothing to find).
    """
    scores, hits, objects = _matched_at_half(evaluation)
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


def _matched_at_half(evaluation: COCOeval) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores [n] of the detections that count, whether each hits an object (IoU 0.5) [n], and the number of objects."""
    truth, found = _by_image_and_category(evaluation.cocoGt), _by_image_and_category(evaluation.cocoDt)
    objects = sum(not each["iscrowd"] for pair, annotations in truth.items() if pair in evaluation.ious for each in annotations)
    scores, hits = [], []
    for pair, detections in found.items():
        if pair not in evaluation.ious:  # a category that does not exist
            continue
        ordered = sorted((detection["score"] for detection in detections), reverse=True)[: evaluation.params.maxDets[-1]]
        if truth[pair]:  # overlaps [detections from the highest score to the lowest, objects in their order]
            crowd = np.array([annotation["iscrowd"] for annotation in truth[pair]], bool)
            hit, counted = _greedy(np.asarray(evaluation.ious[pair]), crowd)
            scores += np.array(ordered)[counted].tolist()
            hits += hit[counted].tolist()
        else:
            scores += ordered
            hits += [False] * len(ordered)
    return np.array(scores, float), np.array(hits, bool), objects


def _greedy(overlaps: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO's matching of detections with objects by their IoU [detections, objects]: which hit and which count, bool [detections].

    The detections choose in their order; what only hits a crowd does not count, however often.
    """
    hit, counted = np.zeros(len(overlaps), bool), np.ones(len(overlaps), bool)
    free = ~crowd
    for row in np.flatnonzero((overlaps >= 0.5).any(1)):
        best = np.where(free, overlaps[row], -1.0)
        chosen = len(best) - 1 - best[::-1].argmax()  # of equals the last one
        hit[row] = best[chosen] >= 0.5
        free[chosen] &= not hit[row]
        counted[row] = hit[row] or not (overlaps[row, crowd] >= 0.5).any()
    return hit, counted


def _by_image_and_category(indexed: COCO) -> defaultdict[tuple[int, int], list[dict]]:
    grouped = defaultdict(list)
    for annotation in indexed.dataset["annotations"]:
        grouped[annotation["image_id"], annotation["category_id"]].append(annotation)
    return grouped
