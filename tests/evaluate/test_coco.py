import copy
import io
import json
import sys

import numpy as np
import pytest

from raydetr import UserError
from raydetr.evaluate.coco import METRICS, coco_metrics, mask_metrics, precision_recall, run_coco_eval, stats
from tests.evaluate.sets import many_of_one, noisy, perfect, pycocotools_evaluation, pycocotools_stats, random_set, with_masks


@pytest.mark.parametrize("seed", range(4))
def test_the_twelve_numbers_are_those_of_pycocotools(seed):
    coco = random_set(seed)
    results = noisy(coco, seed)
    metrics = coco_metrics(coco, results)
    assert 0.05 < metrics["AP"] < 0.95
    np.testing.assert_allclose(stats(metrics), pycocotools_stats(coco, results), rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(6))
def test_precision_and_recall_at_every_level_are_those_of_pycocotools(seed):
    for coco, results in ((random_set(seed), noisy(random_set(seed), seed)), many_of_one(seed)):
        ours, theirs = run_coco_eval(coco, results), pycocotools_evaluation(coco, results)
        for name in ("precision", "recall", "scores"):
            np.testing.assert_allclose(ours.numbers.eval[name], theirs.eval[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("seed", range(6))
def test_the_matches_at_half_are_those_of_pycocotools(seed):
    for coco, results in ((random_set(seed), noisy(random_set(seed), seed)), many_of_one(seed)):
        theirs = pycocotools_evaluation(coco, results)
        curve = precision_recall(run_coco_eval(coco, results))
        images = [each for each in theirs.evalImgs if each is not None and each["aRng"] == theirs.params.areaRng[0]]
        counted = [np.logical_not(each["dtIgnore"][0]) for each in images]
        scores = np.concatenate([np.array(each["dtScores"])[keep] for each, keep in zip(images, counted, strict=True)])
        hits = np.concatenate([each["dtMatches"][0][keep] > 0 for each, keep in zip(images, counted, strict=True)])
        for row in (0, 20, 35, 50, 75, 90):
            above = scores >= curve["threshold"][row]
            assert curve["true_positives"][row] == hits[above].sum()
            assert curve["false_positives"][row] == (~hits[above]).sum()


def test_each_category_is_what_it_would_be_alone():
    coco = random_set()
    results = noisy(coco)
    metrics = coco_metrics(coco, results)
    assert list(metrics["per_category"]) == ["c3", "c7", "c90"]
    for category in coco["categories"]:
        alone = coco | {
            "categories": [category],
            "annotations": [each for each in coco["annotations"] if each["category_id"] == category["id"]],
        }
        expected = coco_metrics(alone, [each for each in results if each["category_id"] == category["id"]])
        expected.pop("per_category")
        assert metrics["per_category"][category["name"]] == expected


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crowds", [False, True], ids=["without crowds", "crowds predicted, too"])
def test_perfect_predictions_score_exactly_one(seed, crowds):
    coco = random_set(seed)
    metrics = coco_metrics(coco, perfect(coco, crowds))
    assert {metrics[name] for name in METRICS if name.startswith("AP")} <= {1.0, None}
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 1.0


def test_one_object_found_is_exactly_one():
    # pycocotools alone says 0.9999999999999998
    coco = random_set(crowds=False)
    coco["annotations"] = coco["annotations"][:1]
    assert coco_metrics(coco, perfect(coco))["AP"] == 1.0


def test_annotation_ids_do_not_matter():
    coco = random_set()
    results = noisy(coco)
    expected = coco_metrics(coco, results)
    for each in coco["annotations"]:
        each["id"] = 0
    assert coco_metrics(coco, results) == expected


def test_more_objects_than_coco_counts_in_an_image():
    coco = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "seed"}], "annotations": []}
    for number in range(150):
        box = [20.0 * (number % 15), 20.0 * (number // 15), 10.0, 10.0]
        coco["annotations"].append({"id": number + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 100.0, "iscrowd": 0})
    metrics = coco_metrics(coco, perfect(coco))
    assert metrics["AR100"] == pytest.approx(100 / 150)
    assert metrics["AP"] == pytest.approx(67 / 101)  # 67 of 101 recall levels are at most 2 / 3


def test_nothing_found_is_zero_and_nothing_to_find_is_none():
    coco = random_set()
    assert coco_metrics(coco, [])["AP"] == 0
    empty = coco_metrics(coco | {"annotations": []}, noisy(coco))
    assert {empty[name] for name in METRICS} == {None}
    assert {empty["per_category"]["c7"][name] for name in METRICS} == {None}
    assert stats(empty) == [-1] * 12
    json.dumps(empty, allow_nan=False)


def test_a_size_without_objects_is_none():
    coco = random_set()
    coco["annotations"] = [each for each in coco["annotations"] if each["area"] < 32**2]
    metrics = coco_metrics(coco, perfect(coco))
    assert metrics["AP_small"] == 1
    assert metrics["AP_large"] is None


def test_input_is_left_alone_and_nothing_is_printed(capfd):
    coco = random_set()
    results = noisy(coco)
    before = copy.deepcopy((coco, results))
    coco_metrics(coco, results)
    assert (coco, results) == before
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")
    assert not isinstance(sys.stdout, io.StringIO)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 5}, "entry 1 belongs to image 5"),
        ({"bbox": [1, 2, 3]}, r"entry 1 \(image 1\d\d\) has bbox \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("nan")]}, "entry 1"),
        ({"score": "high"}, "score 'high'"),
    ],
)
def test_bad_results_are_named(change, words):
    coco = random_set()
    results = noisy(coco)
    results[1] |= change
    with pytest.raises(UserError, match=words):
        coco_metrics(coco, results)


def test_results_that_are_no_list():
    with pytest.raises(UserError, match="expected a list"):
        coco_metrics(random_set(), {"annotations": []})
    with pytest.raises(UserError, match="entry 0 is not a detection"):
        coco_metrics(random_set(), [{"id": 3}])


def test_categories_of_one_name_stay_apart():
    coco = random_set(categories=(3, 7))
    for category in coco["categories"]:
        category["name"] = "thing"
    assert set(coco_metrics(coco, perfect(coco))["per_category"]) == {"thing (3)", "thing (7)"}


def test_precision_and_recall_count_every_detection_above_the_threshold():
    coco = random_set(crowds=False)
    results = noisy(coco)
    curve = precision_recall(run_coco_eval(coco, results))
    objects = len(coco["annotations"])
    assert curve["recall"][0] == curve["true_positives"][0] / objects
    assert curve["true_positives"][0] + curve["false_positives"][0] == len(results)
    for threshold in (0.25, 0.5, 0.9):
        above = [each for each in results if each["score"] >= threshold]
        row = round(100 * threshold)
        hits = curve["true_positives"][row]
        assert hits + curve["false_positives"][row] == len(above)
        assert hits + curve["false_negatives"][row] == objects
        assert hits == 0 or coco_metrics(coco, above)["AR100"] > 0
    assert curve["recall"][-1] == 0
    assert curve["precision"][-1] == 1


def test_precision_and_recall_without_anything():
    coco = random_set()
    curve = precision_recall(run_coco_eval(coco | {"annotations": []}, []))
    assert curve["recall"].tolist() == [0] * 101
    assert curve["precision"].tolist() == [1] * 101


# ------------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("seed", range(3))
def test_the_numbers_of_masks_are_those_of_pycocotools(seed):
    coco, results = with_masks(random_set(seed), seed)
    metrics = mask_metrics(coco, results)
    assert 0.05 < metrics["AP"] < 0.95
    np.testing.assert_allclose(stats(metrics), pycocotools_stats(coco, results, "segm"), rtol=0, atol=1e-11)
    assert set(metrics["per_category"]) == {"c3", "c7", "c90"}
    # Boxes among the results change nothing: an object's size is that of its mask.
    boxed = [each | {"bbox": [0.0, 0.0, 1.0, 1.0]} for each in results]
    assert mask_metrics(coco, boxed) == metrics


def test_perfect_masks_score_one():
    coco, _ = with_masks(random_set(4))
    results = [
        {name: each[name] for name in ("image_id", "category_id", "segmentation")} | {"score": 0.9}
        for each in coco["annotations"]
        if not each["iscrowd"]
    ]
    metrics = mask_metrics(coco, results)
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 1


def test_an_object_without_a_mask_is_neither_a_miss_nor_a_hit():
    coco, _ = with_masks(random_set(4, crowds=False))
    results = [{name: each[name] for name in ("image_id", "category_id", "segmentation")} | {"score": 0.9} for each in coco["annotations"]]
    for each in coco["annotations"][::2]:
        each["segmentation"] = None
    assert mask_metrics(coco, results)["AP"] == 1
    assert mask_metrics(coco, results[1::2])["AP"] == 1
    assert mask_metrics(coco, [{**each, "segmentation": None} for each in results])["AP"] == 0


def test_an_evaluation_of_nothing_found_is_zero():
    coco, _ = with_masks(random_set(4))
    assert mask_metrics(coco, [])["AP"] == 0
