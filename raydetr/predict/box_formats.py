"""Recognize results files whose boxes are in another format than COCO's [x, y, width, height] in pixels."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchvision.ops import box_convert, box_iou

from raydetr.text import count

# Mean IoU of the most certain detections with the true boxes that another format must reach, and how many times COCO's it must be.
LEAST_IOU, LEAST_GAIN = 0.4, 1.5
_FORMATS = {  # torchvision's name, whether in fractions of the image: as users write it
    ("xyxy", False): "[x1, y1, x2, y2] in pixels",
    ("cxcywh", False): "[center x, center y, width, height] in pixels",
    ("xywh", True): "[x, y, width, height] in fractions of the image",
    ("xyxy", True): "[x1, y1, x2, y2] in fractions of the image",
    ("cxcywh", True): "[center x, center y, width, height] in fractions of the image",
}


def box_format_notes(coco: Mapping[str, list[dict]], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines for the user where boxes of a results file do not look like COCO's.

    Args:
        coco: The annotated data set; its images have ``width`` and ``height``.
        results: Detections that :func:`raydetr.evaluate.coco.check_results` accepts.
    """
    negative = sum(min(result["bbox"][2:]) < 0 for result in results)
    notes = []
    if negative:
        boxes = count(negative, "detection has", "detections have")
        notes.append(f"{boxes} a negative width or height and can match nothing; a box is [x, y, width, height] in pixels")
    as_coco = _agreement(coco, results, "xywh", False)
    others = {name: _agreement(coco, results, *name) for name in _FORMATS}
    best = max(others, key=others.__getitem__)
    if others[best] >= LEAST_IOU and others[best] > LEAST_GAIN * as_coco:
        notes.append(
            f"the boxes look like {_FORMATS[best]}, but are read as COCO's [x, y, width, height] in pixels, so the scores are wrong: "
            "convert them"
        )
    return notes


def _agreement(coco: Mapping[str, list[dict]], results: Sequence[Mapping[str, Any]], box_format: str, fractions: bool) -> float:
    """Return how well the boxes fit the true ones if they are in a format: the mean IoU of each image's most certain detections."""
    true, found = defaultdict(list), defaultdict(list)
    for annotation in coco["annotations"]:
        true[annotation["image_id"]].append(annotation["bbox"])
    for result in results:
        found[result["image_id"]].append(result)
    overlaps = []
    for image in coco["images"]:
        boxes = true[image["id"]]
        certain = sorted(found[image["id"]], key=lambda result: result["score"], reverse=True)[: len(boxes)]
        if certain:
            scale = torch.tensor([image["width"], image["height"]] * 2) if fractions else 1
            guessed = box_convert(torch.tensor([result["bbox"] for result in certain], dtype=torch.float64) * scale, box_format, "xyxy")
            truth = box_convert(torch.tensor(boxes, dtype=torch.float64), "xywh", "xyxy")
            overlaps.append(box_iou(guessed, truth).amax(1))
    return float(torch.cat(overlaps).nan_to_num().mean()) if overlaps else 0.0
