"""Compare COCO evaluation with pycocotools, on 5000 images with 100 detections each: ``python -m benchmarks.evaluation``.

Both use one thread, and its CPU time counts.
"""

import contextlib
import copy
import io
import time
from typing import Any, cast

import numpy as np
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.measure import interleaved, machine, options, ratio, spread, table
from raydetr.evaluate.coco import coco_metrics, stats
from raydetr.memory import without_collections

OURS, PEER = "raydetr", "pycocotools"
TARGET = 10.0


def make_set(images: int, detections: int = 100, categories: int = 80) -> tuple[dict, list[dict]]:
    """Return a COCO data set with about 7 objects per image, as COCO has, and results: each object once, roughly, and random boxes."""
    random = np.random.default_rng(0)
    coco = {
        "images": [{"id": number, "width": 640, "height": 480} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": f"category {number}"} for number in range(1, categories + 1)],
        "annotations": [],
    }
    results = []
    for image in coco["images"]:
        true_xywh, labels = _boxes(random, int(random.poisson(7))), random.integers(1, categories + 1, 100)
        for box, label in zip(true_xywh, labels, strict=False):
            crowd = int(random.random() < 0.01)
            annotation = {"image_id": image["id"], "category_id": int(label), "bbox": box.tolist(), "area": float(box[2] * box[3])}
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, "iscrowd": crowd, **annotation})
        near_xywh = true_xywh + random.normal(0, 0.1, true_xywh.shape) * true_xywh[:, [2, 3, 2, 3]]
        boxes = np.concatenate([near_xywh, _boxes(random, detections)])[:detections]
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        found = np.concatenate([labels[: len(true_xywh)], random.integers(1, categories + 1, detections)])[:detections]
        for box, label, score in zip(boxes.tolist(), found.tolist(), random.random(detections).tolist(), strict=True):
            results.append({"image_id": image["id"], "category_id": label, "bbox": box, "score": score})
    return coco, results


def _boxes(random: np.random.Generator, number: int) -> np.ndarray:
    size = np.exp(random.uniform(2, 5.5, (number, 2)))
    return np.concatenate([random.uniform(0, 1, (number, 2)) * (np.array([640, 480]) - size).clip(1), size], 1)


def pycocotools_index(coco: dict) -> COCO:
    """Return pycocotools' index of a data set."""
    truth = COCO()
    truth.dataset = cast(Any, copy.deepcopy(coco))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def pycocotools_evaluation(truth: COCO, found: COCO) -> COCOeval:
    """Run pycocotools' evaluate, accumulate and summarize without output."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def pycocotools_whole(coco: dict, results: list[dict]) -> COCOeval:
    """Run the evaluation of pycocotools from a list of results. The results are copied, because pycocotools modifies them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = pycocotools_index(coco)
        found = truth.loadRes(cast(Any, [dict(each) for each in results]))  # its annotation says a path; a list works
    return pycocotools_evaluation(truth, found)


def our_evaluation(truth: FasterCOCO, found: FasterCOCO) -> COCOeval_faster:
    """Evaluate two indexed sets as ``raydetr.evaluate.coco`` does."""
    with without_collections():
        evaluation = COCOeval_faster(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def main() -> None:
    """Measure and print the tables."""
    parser = options(__doc__, repeats=3)
    parser.add_argument("--images", type=int, default=5000, help="images in the set (default 5000)")
    chosen = parser.parse_args()
    images, repeats = (30, 1) if chosen.quick else (chosen.images, chosen.repeats)
    print(machine(), "\n", sep="")
    coco, results = make_set(images)
    theirs = pycocotools_whole(coco, results)
    difference = np.abs(np.array(stats(coco_metrics(coco, results))) - theirs.stats).max()
    indexed = [FasterCOCO({**coco, "annotations": copy.deepcopy(index.dataset["annotations"])}) for index in (theirs.cocoGt, theirs.cocoDt)]
    contenders = {
        "evaluate and accumulate": {
            OURS: lambda: our_evaluation(*indexed),
            PEER: lambda: pycocotools_evaluation(theirs.cocoGt, theirs.cocoDt),
        },
        "from results to numbers": {
            OURS: lambda: coco_metrics(coco, results),  # also checks the results, and gives each category's numbers
            PEER: lambda: pycocotools_whole(coco, results),
        },
    }
    rows = []
    for what, pair in contenders.items():
        seconds = interleaved(pair, repeats, warmup=0, clock=time.process_time)
        target = {PEER: TARGET} if what == "evaluate and accumulate" else {}
        rows += [[what, name, spread(each), ratio(seconds, name, OURS), target.get(name, "")] for name, each in seconds.items()]
    print(table(rows, [f"{len(results)} detections", "who", "CPU time", "times as long as raydetr", "target"]))
    print(f"\nlargest difference in the twelve numbers: {difference:.1e}")


if __name__ == "__main__":
    main()
