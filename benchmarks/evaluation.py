"""COCO evaluation against pycocotools, on 5000 images with 100 detections each: ``python -m benchmarks.evaluation``.

faster-coco-eval, pycocotools in C++, takes part where it is installed. All compute in one thread: what counts is their CPU time.
``--peers`` names who takes part: pycocotools alone takes two minutes a round on 5000 images.
"""

import contextlib
import importlib.util
import io
import os
import time
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read by hotcoco when it is imported

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.measure import interleaved, machine, options, ratio, spread, table
from raydetr.evaluate.coco import run_coco_eval, stats, summarize
from raydetr.evaluate.intervals import bootstrap_weights, left_out_metrics, weighted_metrics
from raydetr.evaluate.matches import match

OURS, PEER, FASTER = "raydetr", "pycocotools", "faster-coco-eval"


def make_set(images: int, detections: int = 100, categories: int = 80) -> tuple[dict, list[dict]]:
    """A COCO data set with about as many objects as COCO's has (7 an image), and results: each object found, and chance."""
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


def peer_evaluation(name: str, coco: dict, results: list[dict]) -> COCOeval:
    """A peer's numbers from a data set and results, silent; both are copied, since it writes into them."""
    Index: Any
    Evaluation: Any
    if name == FASTER:
        from faster_coco_eval import COCO as Index  # pyright: ignore[reportMissingImports]
        from faster_coco_eval import COCOeval_faster as Evaluation  # pyright: ignore[reportMissingImports]
    else:
        Index, Evaluation = COCO, COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = Index()
        truth.dataset = coco | {"annotations": [dict(each) for each in coco["annotations"]]}
        truth.createIndex()
        evaluation = Evaluation(truth, truth.loadRes([dict(each) for each in results]), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def main() -> None:
    """Measure and print."""
    parser = options(__doc__, repeats=3)
    parser.add_argument("--images", type=int, default=5000, help="images in the set (default 5000)")
    parser.add_argument("--peers", nargs="+", choices=[PEER, FASTER], default=None, help="who takes part (default: both, if installed)")
    chosen = parser.parse_args()
    images, repeats = (30, 1) if chosen.quick else (chosen.images, chosen.repeats)
    installed = [PEER, *([FASTER] if importlib.util.find_spec("faster_coco_eval") else [])]
    print(machine(), "\n", sep="")
    coco, results = make_set(images)
    evaluation = run_coco_eval(coco, results)
    parts = (evaluation.objects, evaluation.detections, len(evaluation.image_ids), len(evaluation.category_ids))
    contenders = {
        OURS: lambda: summarize(run_coco_eval(coco, results), coco["categories"]),  # also checks the results; each category's numbers
        **{name: lambda name=name: peer_evaluation(name, coco, results) for name in chosen.peers or installed},
    }
    seconds = interleaved(contenders, repeats, warmup=0, clock=time.process_time)
    rows = [["from results to numbers", name, spread(each), ratio(seconds, name, OURS)] for name, each in seconds.items()]
    ours = {
        "matches": lambda: match(*parts),
        "the twelve, without each image": lambda: left_out_metrics(evaluation.matches),
        "AP of 2000 resamples": lambda: weighted_metrics(evaluation.matches, bootstrap_weights(images, 2000), ["AP"]),
    }
    if images > 1000:
        del ours["AP of 2000 resamples"]  # the images are held apart there: gigabytes
    rows += [[what, OURS, spread(each), ""] for what, each in interleaved(ours, repeats, warmup=0, clock=time.process_time).items()]
    print(table(rows, [f"{len(results)} detections", "who", "CPU time", "times as long as raydetr"]))
    if PEER in contenders:
        numbers = stats(summarize(evaluation, coco["categories"]))
        difference = np.abs(np.array(numbers) - peer_evaluation(PEER, coco, results).stats).max()
        print(f"\nlargest difference in the twelve numbers: {difference:.1e}")


if __name__ == "__main__":
    main()
