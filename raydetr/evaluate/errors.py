"""Why objects are missed: AP lost to each kind of error, confusion, calibration, the worst images, and labels that look wrong.

hotcoco finds the errors; the functions here translate them to the data set's own ids and names. Unless stated otherwise, AP is at an IoU of
0.5 here, as in TIDE (Bolya et al., 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors"), where the error of a detection
is

- ``classification``: at an object (IoU 0.5 or more), but of the wrong category;
- ``localization``: of the right category, but with an IoU of 0.1 to 0.5;
- ``both``: of a wrong category and with an IoU of 0.1 to 0.5;
- ``duplicate``: a better detection has matched the object already;
- ``background``: no object there (IoU below 0.1);
- ``missed``: an object that no detection of the other kinds explains.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raydetr.evaluate.coco import Evaluation, category_names, summarize
from raydetr.evaluate.intervals import overall, weighted_metrics, with_intervals
from raydetr.evaluate.matches import coco_eval
from raydetr.text import count

KINDS = {
    "Cls": "classification",
    "Loc": "localization",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
MEANINGS = {
    "classification": "right box, wrong category",
    "localization": "right category, loose box",
    "both": "wrong category, loose box",
    "duplicate": "found before",
    "background": "nothing is there",
    "missed": "not found",
}
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}
CROWDED = (1, 2, 4, 8, 16)  # the smallest number of objects per image in each group of images
SURE = 0.5  # lowest score of a detection that counts, by default


def lost_ap(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return how often each kind of error occurs, and how much AP50 would rise without it.

    The gains do not add up to what AP50 lacks, because one error hides another.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.

    Returns:
        ``{"classification": {"count": 3, "AP": 0.021}, ...}``.
    """
    found = evaluation.numbers.tide_errors()
    return {name: {"count": found["counts"][kind], "AP": max(0.0, found["delta_ap"][kind])} for kind, name in KINDS.items()}


def confusion(evaluation: Evaluation, categories: Iterable[dict], min_score: float = SURE) -> tuple[list[str], np.ndarray]:
    """Return how often objects of each category are detected as each category.

    Crowd regions, and detections in them, are left out.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.
        categories: The data set's categories.
        min_score: Lowest score of a detection that counts.

    Returns:
        The names of the K categories in the order of their ids, and the counts, int64 [K + 1, K + 1]. Rows are annotated categories,
        columns detected ones; the last column counts missed objects, the last row detections where there is no object.
    """
    objects, detections, matches = evaluation.objects, evaluation.detections, evaluation.matches
    counts = matches.row[~matches.ignored[0, 0] & (matches.score >= min_score)]
    names = category_names(categories)
    clean = coco_eval(objects, detections[np.sort(counts)], len(evaluation.image_ids), len(evaluation.category_ids))
    return [names[number] for number in evaluation.category_ids], clean.confusion_matrix(iou_thr=0.5)["matrix"].astype(np.int64)


def category_curves(evaluation: Evaluation, categories: Iterable[dict]) -> dict[str, np.ndarray | None]:
    """Return the precision-recall curve of each category at an IoU of 0.5.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.
        categories: The data set's categories.

    Returns:
        The precision at the recalls 0, 0.01, ..., 1, float [101], by category name; None for a category without objects.
    """
    precision = evaluation.accumulated["precision"][0, :, :, 0, -1]  # [recall, category]
    columns = {name: precision[:, evaluation.category_ids.index(number)] for number, name in category_names(categories).items()}
    return {name: None if (column < 0).all() else column for name, column in columns.items()}


def ap_by_objects(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return AP on images with few and with many objects, as if each group of images were a data set of its own.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.

    Returns:
        A dict for each group with at least one image: ``low`` and ``high``, the smallest and the largest number of objects in an image
        (``high`` is None for the last group, which has no limit), ``images``, their number, and ``AP``, over IoUs of 0.5 to 0.95.
    """
    objects = evaluation.matches.objects[0].sum(1)
    ends = [*(least - 1 for least in CROWDED[1:]), None]
    groups = [(low, high, (objects >= low) & (True if high is None else objects <= high)) for low, high in zip(CROWDED, ends, strict=True)]
    groups = [(low, high, chosen) for low, high, chosen in groups if chosen.any()]
    if not groups:
        return []
    aps = overall(weighted_metrics(evaluation.matches, np.array([chosen for *_, chosen in groups]), ["AP"])["AP"])
    return [
        {"low": low, "high": high, "images": int(chosen.sum()), "AP": float(ap)}
        for (low, high, chosen), ap in zip(groups, aps, strict=True)
    ]


def calibration(evaluation: Evaluation, bins: int = 10) -> dict[str, Any]:
    """Return how well the scores of detections predict whether they are right at an IoU of 0.5.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.
        bins: Number of bins of equal width into which the scores from 0 to 1 are divided.

    Returns:
        ``error``, the expected calibration error (ECE): the mean difference between score and share of hits, weighted by the number of
        detections. ``bins``, a dict for each bin with detections: ``low``, ``high``, ``score`` (mean), ``hits`` (share) and ``count``.
    """
    found = evaluation.numbers.calibration(n_bins=bins, iou_threshold=0.5)
    names = {"low": "bin_lower", "high": "bin_upper", "score": "avg_confidence", "hits": "avg_accuracy", "count": "count"}
    rows = [{mine: each[theirs] for mine, theirs in names.items()} for each in found["bins"] if each["count"]]
    return {"error": found["ece"], "bins": rows}


def worst_images(evaluation: Evaluation, most: int = 12, min_score: float = SURE) -> list[dict[str, Any]]:
    """Return the images with the most errors, the worst first. Images without an error are left out.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.
        most: Number of images to return at most.
        min_score: Lowest score of a detection that counts.

    Returns:
        A dict for each image: ``image_id``, and the numbers of ``hits``, of ``false`` detections and of ``missed`` objects at an IoU of
        0.5.
    """
    matches = evaluation.matches
    sure = matches.score >= min_score
    images = len(evaluation.image_ids)
    hits = np.bincount(matches.image[sure & matches.matched[0, 0]], minlength=images)
    false = np.bincount(matches.image[sure & ~matches.matched[0, 0] & ~matches.ignored[0, 0]], minlength=images)
    missed = matches.objects[0].sum(1) - hits
    order = np.lexsort((np.arange(images), -(false + missed)))
    numbers = [(evaluation.image_ids[image], int(hits[image]), int(false[image]), int(missed[image])) for image in order[:most]]
    return [dict(zip(("image_id", "hits", "false", "missed"), each, strict=True)) for each in numbers if each[2] + each[3]]


def suspected_labels(evaluation: Evaluation, coco: dict, min_score: float = SURE) -> list[dict[str, Any]]:
    """Return labels that are probably wrong or missing, the most certain first.

    If a model is sure of another category than the annotation, or of an object where nothing is annotated, it is often right. The image
    should be checked all the same, because the model may have learned the annotator's mistakes.

    Args:
        evaluation: The result of :func:`raydetr.evaluate.coco.run_coco_eval`.
        coco: Its data set.
        min_score: Lowest score of a detection that counts.

    Returns:
        Dicts with ``kind`` (``"wrong category"`` or ``"missing"``), ``image_id``, ``bbox`` (xywh in pixels), ``score``, the ``category_id``
        that the model suggests, and for a wrong category ``annotation_id`` and ``annotated_category_id``, which are None otherwise.
    """
    kinds = {"wrong_label": "wrong category", "missing_annotation": "missing"}
    found = []
    for each in evaluation.numbers.image_diagnostics(iou_thr=0.5, score_thr=min_score)["label_errors"]:
        annotation = None if each["gt_id"] is None else coco["annotations"][each["gt_id"] - 1]
        found.append(
            {
                "kind": kinds[each["type"]],
                "image_id": evaluation.image_ids[each["image_id"] - 1],
                "bbox": evaluation.detections.xywh[each["dt_id"] - 1].tolist() if annotation is None else list(annotation["bbox"]),
                "score": each["dt_score"],
                "category_id": evaluation.category_ids[each["dt_category_id"] - 1],
                "annotation_id": annotation and annotation["id"],
                "annotated_category_id": annotation and annotation["category_id"],
            }
        )
    return sorted(found, key=lambda suspect: -suspect["score"])


def suspects_as_coco(suspects: list[dict[str, Any]], coco: dict) -> dict:
    """Return suspected labels as a COCO data set for a labeling tool, with the categories that the model suggests.

    Each annotation has its ``kind``, ``score`` and ``annotation_id`` under ``attributes``, which CVAT and Label Studio show.

    Args:
        suspects: The result of :func:`suspected_labels`.
        coco: The data set.

    Returns:
        A data set with the images that have suspected labels.
    """
    concerned = {suspect["image_id"] for suspect in suspects}
    annotations = [
        {
            "id": number,
            "image_id": suspect["image_id"],
            "category_id": suspect["category_id"],
            "bbox": suspect["bbox"],
            "area": suspect["bbox"][2] * suspect["bbox"][3],
            "iscrowd": 0,
            "attributes": {name: suspect[name] for name in ("kind", "score", "annotation_id")},
        }
        for number, suspect in enumerate(suspects, 1)
    ]
    images = [image for image in coco["images"] if image["id"] in concerned]
    return {"images": images, "categories": coco["categories"], "annotations": annotations}


def suspects_as_via(suspects: list[dict[str, Any]], coco: dict, sizes: Mapping[Any, int]) -> dict:
    """Return suspected labels as annotations of the VGG Image Annotator, version 2.

    Args:
        suspects: The result of :func:`suspected_labels`.
        coco: The data set.
        sizes: The size of each image's file in bytes, by image id, because VIA identifies an image by its name and size.

    Returns:
        The content of VIA's annotation file.
    """
    names = category_names(coco["categories"])
    files: dict[str, dict] = {}
    for image in coco["images"]:
        regions = [_via_region(suspect, names) for suspect in suspects if suspect["image_id"] == image["id"]]
        if regions:
            name, size = Path(image["file_name"]).name, sizes[image["id"]]
            files[f"{name}{size}"] = {"filename": name, "size": size, "regions": regions, "file_attributes": {}}
    return files


def _via_region(suspect: dict[str, Any], names: Mapping[Any, str]) -> dict:
    x, y, width, height = suspect["bbox"]
    attributes = {"name": names[suspect["category_id"]], "suspect": suspect["kind"], "score": f"{suspect['score']:.2f}"}
    return {"shape_attributes": {"name": "rect", "x": x, "y": y, "width": width, "height": height}, "region_attributes": attributes}


def error_numbers(evaluation: Evaluation, coco: dict) -> dict[str, Any]:
    """Return everything that this module finds, as JSON can hold it.

    Args:
        evaluation: The evaluation of the detections.
        coco: Its data set.
    """
    categories = coco["categories"]
    names, counts = confusion(evaluation, categories)
    return {
        "metrics": with_intervals(summarize(evaluation, categories), evaluation, categories),
        "lost_AP50": lost_ap(evaluation),
        "confusion": {"categories": names, "counts": counts.tolist(), "min_score": SURE},
        "precision_at_recall": {
            name: None if curve is None else [round(float(each), 6) for each in curve]
            for name, curve in category_curves(evaluation, categories).items()
        },
        "AP_by_objects": ap_by_objects(evaluation),
        "calibration": calibration(evaluation),
        "worst_images": worst_images(evaluation),
        "suspects": suspected_labels(evaluation, coco),
    }


def first_sentence(numbers: Mapping[str, Any]) -> str:
    """Return the AP with its interval, and which kind of error costs most."""
    metrics = numbers["metrics"]
    images = count(numbers["images"], f"{SPLIT_NAMES[numbers['split']]} image")
    if metrics["AP"] is None:
        return f"The {images} hold no object to find."
    interval = metrics["AP_interval"]
    known = "" if interval is None else f" (95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
    kind, worst = max(numbers["lost_AP50"].items(), key=lambda each: each[1]["AP"])
    if worst["AP"] > 0:
        most = f"; {kind} errors cost most, {100 * worst['AP']:.1f} of AP50"
    else:  # everything is found, or nothing is
        most = "" if metrics["AP50"] else "; no object is found"
    return f"AP {100 * metrics['AP']:.1f}{known} on {images}{most}."


def errors_markdown(numbers: Mapping[str, Any], file_names: Mapping[Any, str]) -> str:
    """Return the errors as a page in Markdown, for TensorBoard.

    Args:
        numbers: Those of :func:`error_numbers` with ``images`` and ``split``.
        file_names: The name of each image's file by its id.
    """
    lines = [first_sentence(numbers), "", "| error | how often | AP50 lost | meaning |", "|---|---|---|---|"]
    lost = sorted(numbers["lost_AP50"].items(), key=lambda each: -each[1]["AP"])
    lines += [f"| {kind} | {each['count']} | {100 * each['AP']:.1f} | {MEANINGS[kind]} |" for kind, each in lost]
    if numbers["worst_images"]:
        lines += ["", f"Images with the most errors, at a score of {SURE} or more:", ""]
        lines += ["| image | found | missed | false |", "|---|---|---|---|"]
        worst = numbers["worst_images"]
        lines += [f"| {_cell(file_names[each['image_id']])} | {each['hits']} | {each['missed']} | {each['false']} |" for each in worst]
    if numbers["suspects"]:
        lines += ["", f"{count(len(numbers['suspects']), 'label')} may be wrong or missing; raydetr errors shows them."]
    return "\n".join(lines)


def _cell(name: str) -> str:
    """Return a file name for a table of Markdown, which a bar in it would break."""
    return name.replace("|", "\\|")
