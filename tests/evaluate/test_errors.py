import json
from collections import Counter

import numpy as np
import pytest

from raydetr.evaluate.coco import coco_metrics, run_coco_eval
from raydetr.evaluate.errors import (
    ap_by_objects,
    calibration,
    category_curves,
    confusion,
    lost_ap,
    suspected_labels,
    suspects_as_coco,
    suspects_as_via,
    worst_images,
)
from tests.evaluate.sets import noisy, perfect, random_set

BOX, MOVED, ELSEWHERE = [10.0, 10.0, 100.0, 100.0], [50.0, 50.0, 100.0, 100.0], [400.0, 300.0, 50.0, 50.0]
CAT, DOG = 5, 9


@pytest.fixture(scope="module")
def coco():
    annotations = [(10, CAT, BOX, 0), (11, DOG, BOX, 0), (12, CAT, BOX, 0), (13, CAT, BOX, 0), (14, CAT, [200.0, 200.0, 50.0, 50.0], 1)]
    annotations += [(15, DOG, BOX, 0), (16, CAT, BOX, 0)]
    return {
        "images": [{"id": number, "file_name": f"all/{number}.jpg"} for number in range(10, 17)],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {"id": 100 + row, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for row, (image, category, box, crowd) in enumerate(annotations)
        ],
    }


@pytest.fixture(scope="module")
def evaluation(coco):
    detections = [
        (10, CAT, BOX, 0.95),
        (10, CAT, [12.0, 12.0, 100.0, 100.0], 0.8),  # duplicate
        (11, CAT, BOX, 0.9),  # the wrong category
        (12, CAT, MOVED, 0.7),  # badly placed
        (13, CAT, ELSEWHERE, 0.85),  # background, and the object is missed
        (14, CAT, [200.0, 200.0, 50.0, 50.0], 0.9),  # within a crowd: no error
        (15, CAT, MOVED, 0.6),  # both
        (16, CAT, BOX, 0.3),  # a hit, but not a sure one
    ]
    results = [dict(zip(("image_id", "category_id", "bbox", "score"), each, strict=True)) for each in detections]
    return run_coco_eval(coco, results)


def test_every_kind_of_error_is_counted_once(evaluation):
    counts = {name: each["count"] for name, each in lost_ap(evaluation).items()}
    expected = {"classification": 1, "localization": 1, "both": 1, "duplicate": 1, "background": 1}
    assert {name: counts[name] for name in expected} == expected
    assert counts["missed"] == 2  # image 13's, and image 15's, which no single correction would find
    assert all(each["AP"] >= 0 for each in lost_ap(evaluation).values())


def test_the_ap_lost_to_wrong_categories_is_what_correcting_them_brings():
    coco = random_set(3, crowds=False)
    results = perfect(coco)
    wrong = [
        each | {"category_id": 7 if each["category_id"] == 3 else 3} if number % 4 == 0 and each["category_id"] != 90 else each
        for number, each in enumerate(results)
    ]
    lost = lost_ap(run_coco_eval(coco, wrong))
    assert lost["classification"]["AP"] == pytest.approx(1 - coco_metrics(coco, wrong)["AP50"], abs=1e-9)
    assert lost["background"] == {"count": 0, "AP": 0}


def test_nothing_is_lost_where_all_is_right():
    coco = random_set(1)
    assert {(each["count"], each["AP"]) for each in lost_ap(run_coco_eval(coco, perfect(coco))).values()} == {(0, 0)}


def test_confusion(coco, evaluation):
    names, counts = confusion(evaluation, coco["categories"])
    assert names == ["cat", "dog"]
    assert counts.tolist() == [[1, 0, 3], [1, 0, 1], [4, 0, 0]]  # what is in the crowd, or unsure, is nowhere
    assert confusion(evaluation, coco["categories"], 0.2)[1].tolist() == [[2, 0, 2], [1, 0, 1], [4, 0, 0]]


def test_another_category_within_a_crowd_is_a_false_positive(coco):
    crowd = coco | {"annotations": [each for each in coco["annotations"] if each["iscrowd"]]}
    result = {"image_id": 14, "category_id": DOG, "bbox": [200.0, 200.0, 50.0, 50.0], "score": 0.9}
    _, counts = confusion(run_coco_eval(crowd, [result]), coco["categories"])
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_the_curve_of_a_category_has_its_ap():
    coco = random_set(2)
    evaluation, metrics = run_coco_eval(coco, noisy(coco)), coco_metrics(coco, noisy(coco))
    for name, curve in category_curves(evaluation, coco["categories"]).items():
        assert curve.shape == (101,)
        assert curve.mean() == pytest.approx(metrics["per_category"][name]["AP50"])
    assert set(category_curves(run_coco_eval(coco | {"annotations": []}, []), coco["categories"]).values()) == {None}


def test_scores_that_are_shares_of_hits_are_calibrated():
    coco = random_set(0, images=150, categories=(3,), crowds=False)
    random = np.random.default_rng(0)
    results = [each | {"score": float(random.random())} for each in perfect(coco)]
    fair = [each if random.random() < each["score"] else each | {"bbox": [630.0, 470.0, 5.0, 5.0]} for each in results]
    assert calibration(run_coco_eval(coco, fair))["error"] < 0.1
    found = calibration(run_coco_eval(coco, results))  # every detection is right, whatever its score
    assert found["error"] == pytest.approx(0.5, abs=0.07)
    assert {each["hits"] for each in found["bins"]} == {1.0}
    assert sum(each["count"] for each in found["bins"]) == len(results)


def test_the_worst_images_come_first(evaluation):
    worst = worst_images(evaluation)
    assert [each["image_id"] for each in worst] == [11, 12, 13, 15, 10, 16]  # 14 has only a crowd, and no error
    assert worst[0] == {"image_id": 11, "hits": 0, "false": 1, "missed": 1}
    assert worst[-2:] == [{"image_id": 10, "hits": 1, "false": 1, "missed": 0}, {"image_id": 16, "hits": 0, "false": 0, "missed": 1}]
    assert len(worst_images(evaluation, 2)) == 2


def test_suspected_labels(coco, evaluation):
    wrong, missing = suspected_labels(evaluation, coco)
    assert wrong == {
        **{"kind": "wrong category", "image_id": 11, "bbox": BOX, "score": 0.9, "category_id": CAT},
        **{"annotation_id": 101, "annotated_category_id": DOG},
    }
    assert (missing["kind"], missing["image_id"], missing["bbox"], missing["annotation_id"]) == ("missing", 13, ELSEWHERE, None)
    assert suspected_labels(evaluation, coco, 0.99) == []


def test_suspects_go_back_into_labeling_tools(coco, evaluation):
    suspects = suspected_labels(evaluation, coco)
    back = suspects_as_coco(suspects, coco)
    assert [image["id"] for image in back["images"]] == [11, 13]
    assert back["annotations"][1]["attributes"] == {"kind": "missing", "score": 0.85, "annotation_id": None}
    assert coco_metrics(back, [{"image_id": 13, "category_id": CAT, "bbox": ELSEWHERE, "score": 1.0}])["AR100"] == 0.5
    via = suspects_as_via(suspects, coco, {image["id"]: 1234 for image in coco["images"]})
    assert set(via) == {"11.jpg1234", "13.jpg1234"}
    assert via["13.jpg1234"]["regions"] == [
        {
            "shape_attributes": {"name": "rect", "x": 400.0, "y": 300.0, "width": 50.0, "height": 50.0},
            "region_attributes": {"name": "cat", "suspect": "missing", "score": "0.85"},
        }
    ]
    json.dumps([back, via], allow_nan=False)


def test_ap_by_number_of_objects_is_that_of_the_images_alone():
    coco = random_set(2)
    results = noisy(coco)
    groups = ap_by_objects(run_coco_eval(coco, results))
    objects = Counter(each["image_id"] for each in coco["annotations"] if not each["iscrowd"])
    assert len(groups) > 1
    assert sum(group["images"] for group in groups) == len(objects)
    for group in groups:
        ids = {each for each, number in objects.items() if group["low"] <= number <= (group["high"] or number)}
        assert group["images"] == len(ids)
        part = {
            "images": [each for each in coco["images"] if each["id"] in ids],
            "annotations": [each for each in coco["annotations"] if each["image_id"] in ids],
            "categories": coco["categories"],
        }
        assert group["AP"] == pytest.approx(coco_metrics(part, [each for each in results if each["image_id"] in ids])["AP"], abs=1e-9)
