"""Small data sets and results, and what pycocotools says of them."""

import copy

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.data.masks import read_segmentation


def random_set(seed=0, images=12, categories=(3, 7, 90), crowds=True):
    random = np.random.default_rng(seed)
    coco = {"images": [], "annotations": [], "categories": [{"id": each, "name": f"c{each}"} for each in categories]}
    for image_id in range(100, 100 + images):
        coco["images"].append({"id": image_id, "width": 640, "height": 480, "file_name": f"{image_id}.jpg"})
        for _ in range(random.integers(0, 8)):
            w, h = np.exp(random.uniform(1.5, 5.5, 2)).round(1).tolist()
            x, y = random.uniform(0, 640 - w), random.uniform(0, 480 - h)
            crowd = int(crowds and random.random() < 0.15)
            annotation = {"image_id": image_id, "category_id": int(random.choice(categories)), "bbox": [x, y, w, h], "iscrowd": crowd}
            coco["annotations"].append({"id": len(coco["annotations"]), "area": w * h * random.uniform(0.4, 1), **annotation})
    return coco


def perfect(coco, crowds=False):
    return [
        {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": list(each["bbox"]), "score": 0.9}
        for each in coco["annotations"]
        if crowds or not each["iscrowd"]
    ]


def noisy(coco, seed=1):
    random = np.random.default_rng(seed)
    results = perfect(coco)
    for each in results:
        x, y, w, h = each["bbox"]
        moved = np.array([x, y, w, h]) + random.uniform(-0.15, 0.15, 4) * [w, h, w, h]
        each["bbox"] = moved.tolist()
    wrong = [each | {"category_id": 7, "bbox": [1.0, 2.0, 30.0, 40.0]} for each in results[::3]]
    return [each | {"score": float(random.random())} for each in results + wrong]


def pycocotools_evaluation(coco, results, kind="bbox"):
    """As its own documentation uses it, on annotation ids from 1."""
    coco = copy.deepcopy(coco)
    for number, each in enumerate(coco["annotations"], 1):
        each["id"] = number
    truth = COCO()
    truth.dataset = coco
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def pycocotools_stats(coco, results, kind="bbox"):
    evaluation = pycocotools_evaluation(coco, results, kind)
    evaluation.summarize()
    return evaluation.stats


def many_of_one(seed):
    """More detections of a category in an image than count, scores that are equal, boxes that are equal, crowds found."""
    coco = random_set(seed, images=3, categories=(3, 7))
    coco["annotations"][0]["iscrowd"] = 1
    coco["annotations"] = [each | {"id": number} for number, each in enumerate(coco["annotations"] + coco["annotations"][::2])]
    results = [each for number in range(6) for each in noisy(coco, number)] + perfect(coco, crowds=True)
    return coco, [each | {"score": round(each["score"], 1)} for each in results * 4]


def with_masks(coco, seed=0):
    """The set with an ellipse in each box as its mask, and results: shifted ones, with wrong ones among them."""
    random = np.random.default_rng(seed)
    coco, size, results = copy.deepcopy(coco), (480, 640), []
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)

    def ellipse(x, y, w, h):
        points = np.stack([x + w / 2 * (1 + np.cos(turn)), y + h / 2 * (1 + np.sin(turn))], 1)
        return read_segmentation([points.ravel().tolist()], size)

    for each in coco["annotations"]:
        x, y, w, h = each["bbox"]
        each["segmentation"], each["area"] = ellipse(x, y, w, h), w * h * np.pi / 4
        shift = random.uniform(-0.15, 0.15, 2) * [w, h]
        found = ellipse(x + shift[0], y + shift[1], w, h)
        if found and not each["iscrowd"]:
            result = {name: each[name] for name in ("image_id", "category_id")} | {"segmentation": found}
            results += [result | {"score": float(random.random())}, result | {"category_id": 7, "score": float(random.random())}]
    coco["annotations"] = [each for each in coco["annotations"] if each["segmentation"]]
    return coco, results
