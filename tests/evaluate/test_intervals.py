import json
import time

import numpy as np
import pytest
from scipy.stats import t as student_t

from raydetr import UserError
from raydetr.evaluate import intervals
from raydetr.evaluate.coco import METRICS, mask_metrics, run_coco_eval, run_mask_eval, stats, summarize
from raydetr.evaluate.intervals import (
    bootstrap_weights,
    compare,
    jackknife_interval,
    jackknife_variance,
    leave_out_weights,
    left_out_metrics,
    mask_interval_metrics,
    overall,
    verdict,
    weighted_metrics,
    with_intervals,
)
from tests.evaluate.sets import many_of_one, noisy, perfect, pycocotools_stats, random_set, with_masks


def duplicated(coco, results, weights):
    """The data set in which each image occurs as often as its weight says, and its results."""
    images, annotations, detections = [], [], []
    for image, weight in zip(coco["images"], weights, strict=True):
        for _ in range(int(weight)):
            number = len(images) + 1
            images.append(image | {"id": number})
            annotations += [each | {"image_id": number} for each in coco["annotations"] if each["image_id"] == image["id"]]
            detections += [each | {"image_id": number} for each in results if each["image_id"] == image["id"]]
    return coco | {"images": images, "annotations": [each | {"id": i} for i, each in enumerate(annotations, 1)]}, detections


def left_out_stats(coco, results, kind="bbox"):
    """pycocotools' twelve numbers without each image, [images, 12]; NaN where undefined."""
    every = np.ones((len(coco["images"]),) * 2) - np.eye(len(coco["images"]))
    found = np.array([pycocotools_stats(*duplicated(coco, results, weights), kind) for weights in every])
    return np.where(found == -1, np.nan, found)


def numbers(evaluation, weights):
    values = weighted_metrics(evaluation.matches, weights)
    return np.stack([overall(values[name]) for name in METRICS], 1)


@pytest.mark.parametrize("seed", range(3))
def test_leaving_an_image_out_is_pycocotools_without_it(seed):
    # More detections than count, equal scores, crowds; and a set of three categories.
    for coco, results in (many_of_one(seed), (random_set(seed, images=8), noisy(random_set(seed, images=8), seed))):
        mine = numbers(run_coco_eval(coco, results), leave_out_weights(len(coco["images"])))
        np.testing.assert_allclose(mine, left_out_stats(coco, results), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_pycocotools_on_the_duplicated_images(seed):
    coco = random_set(seed, images=7)
    results = noisy(coco, seed)
    weights = bootstrap_weights(7, 8, seed)
    mine = numbers(run_coco_eval(coco, results), weights)
    for row, each in zip(mine, weights, strict=True):
        np.testing.assert_allclose(np.nan_to_num(row, nan=-1), pycocotools_stats(*duplicated(coco, results, each)), rtol=0, atol=1e-9)


def test_masks_left_out_and_resampled_are_pycocotools_on_those_images():
    coco, results = with_masks(random_set(3, images=7), 3)
    evaluation, weights = run_mask_eval(coco, results), bootstrap_weights(7, 4)
    np.testing.assert_allclose(numbers(evaluation, leave_out_weights(7)), left_out_stats(coco, results, "segm"), rtol=0, atol=1e-9)
    for row, each in zip(numbers(evaluation, weights), weights, strict=True):
        expected = pycocotools_stats(*duplicated(coco, results, each), "segm")
        np.testing.assert_allclose(np.nan_to_num(row, nan=-1), expected, rtol=0, atol=1e-9)


def test_the_interval_of_masks_is_the_jackknife_of_pycocotools_and_not_that_of_boxes():
    coco, results = with_masks(random_set(5, images=9, categories=(3, 7)), 5)
    metrics, values = mask_interval_metrics(coco, results), left_out_stats(coco, results, "segm")
    assert {name: metrics[name] for name in METRICS} == {name: mask_metrics(coco, results)[name] for name in METRICS}
    for column, name in enumerate(METRICS):
        half = student_t.ppf(0.975, 8) * np.sqrt(8 / 9 * ((values[:, column] - values[:, column].mean()) ** 2).sum())
        expected = [max(0, metrics[name] - half), min(1, metrics[name] + half)]
        np.testing.assert_allclose(metrics[f"{name}_interval"], expected, rtol=0, atol=1e-9)
    assert set(mask_interval_metrics(coco, results, ["AP"])) - set(METRICS) == {"AP_interval", "per_category"}


def test_each_category_is_weighted_as_if_it_were_alone():
    coco = random_set(4, images=6)
    results = noisy(coco)
    weights = bootstrap_weights(6, 5)
    values = weighted_metrics(run_coco_eval(coco, results).matches, weights)
    for column, category in enumerate(coco["categories"]):
        keep = {
            name: [each for each in part if each["category_id"] == category["id"]]
            for name, part in (("a", coco["annotations"]), ("r", results))
        }
        alone = run_coco_eval(coco | {"categories": [category], "annotations": keep["a"]}, keep["r"])
        np.testing.assert_array_equal(np.stack([values[name][:, column] for name in METRICS], 1), numbers(alone, weights))


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_the_jackknife_of_pycocotools(seed):
    coco = random_set(seed, images=10, categories=(3, 7))
    results = noisy(coco, seed)
    evaluation = run_coco_eval(coco, results)
    metrics = with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"])
    left_out, whole = left_out_stats(coco, results), stats(metrics)
    for column, name in enumerate(METRICS):
        values = left_out[:, column]
        if np.isnan(values).any():
            assert metrics[f"{name}_interval"] is None
            continue
        half = student_t.ppf(0.975, 9) * np.sqrt(9 / 10 * ((values - values.mean()) ** 2).sum())
        expected = [max(0, whole[column] - half), min(1, whole[column] + half)]
        np.testing.assert_allclose(metrics[f"{name}_interval"], expected, rtol=0, atol=1e-9)
    json.dumps(metrics, allow_nan=False)
    low, high = metrics["per_category"]["c3"]["AP_interval"]
    assert 0 <= low < metrics["per_category"]["c3"]["AP"] < high <= 1


def test_the_interval_of_a_difference_is_the_jackknife_of_pycocotools():
    coco = random_set(5, images=10, categories=(3, 7))
    mine, theirs = noisy(coco, 1), noisy(coco, 2)[::2]
    found = compare(run_coco_eval(coco, mine), run_coco_eval(coco, theirs), coco["categories"])
    left_out = left_out_stats(coco, mine) - left_out_stats(coco, theirs)
    difference = pycocotools_stats(coco, mine) - pycocotools_stats(coco, theirs)
    for column, name in enumerate(METRICS):
        half = student_t.ppf(0.975, 9) * np.sqrt(9 / 10 * ((left_out[:, column] - left_out[:, column].mean()) ** 2).sum())
        assert found[name] == pytest.approx(difference[column], abs=1e-9)
        np.testing.assert_allclose(found[f"{name}_interval"], [found[name] - half, found[name] + half], rtol=0, atol=1e-9)
    assert found["per_category"]["c7"]["AP_interval"][0] < found["per_category"]["c7"]["AP"] < found["per_category"]["c7"]["AP_interval"][1]


def test_the_variance_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=20)
    left_out = (values.sum() - values) / 19
    assert jackknife_variance(left_out) == pytest.approx(values.var(ddof=1) / 20)
    low, high = jackknife_interval(values.mean(), left_out, -9, 9)
    half = student_t.ppf(0.975, 19) * (values.var(ddof=1) / 20) ** 0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))


def test_many_images_are_left_out_in_groups(monkeypatch):
    monkeypatch.setattr(intervals, "MOST_GROUPS", 7)
    coco = random_set(1, images=17)
    matches = run_coco_eval(coco, noisy(coco)).matches
    mine = left_out_metrics(matches)
    expected = weighted_metrics(matches, np.arange(7)[:, None] != np.arange(17) % 7)
    for name in METRICS:
        np.testing.assert_array_equal(mine[name], expected[name])


def test_groups_estimate_the_variance_that_single_images_do():
    values = np.random.default_rng(1).normal(size=(400, 250))  # 400 samples of 250
    groups = (np.arange(100)[:, None] != np.arange(250) % 100).astype(float)  # of two and three
    means = values @ groups.T / groups.sum(1)
    assert np.mean([jackknife_variance(row) for row in means]) == pytest.approx(1 / 250, rel=0.05)


def test_what_is_undefined_has_no_interval():
    coco = random_set(images=6)
    coco["annotations"] = [each for each in coco["annotations"] if each["category_id"] != 7 or each["image_id"] == 100]
    coco["annotations"].append({"image_id": 100, "category_id": 7, "bbox": [1, 2, 50, 60], "area": 3000, "iscrowd": 0, "id": 999})
    evaluation = run_coco_eval(coco, noisy(coco))
    metrics = with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"])
    assert metrics["per_category"]["c7"]["AP"] is not None
    assert metrics["per_category"]["c7"]["AP_interval"] is None  # all of its objects are in one image
    assert metrics["AP_interval"] is not None
    nothing = run_coco_eval(coco | {"annotations": []}, noisy(coco))
    metrics = with_intervals(summarize(nothing, coco["categories"]), nothing, coco["categories"])
    assert {metrics[f"{name}_interval"] for name in METRICS} == {None}
    one = coco | {"images": coco["images"][:1], "annotations": [each for each in coco["annotations"] if each["image_id"] == 100]}
    evaluation = run_coco_eval(one, perfect(one))
    assert with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"])["AP_interval"] is None


def test_intervals_stay_within_what_an_ap_can_be():
    coco = random_set(3, images=4)
    evaluation = run_coco_eval(coco, noisy(coco))
    metrics = with_intervals(summarize(evaluation, coco["categories"]), evaluation, coco["categories"])
    for name in METRICS:
        low, high = metrics[f"{name}_interval"] or (0, 1)
        assert 0 <= low <= high <= 1


def test_results_on_other_images_are_not_compared():
    coco = random_set()
    other = coco | {"images": coco["images"][1:], "annotations": [each for each in coco["annotations"] if each["image_id"] != 100]}
    with pytest.raises(UserError, match="same images"):
        compare(run_coco_eval(coco, perfect(coco)), run_coco_eval(other, perfect(other)), coco["categories"])


def test_the_verdict_on_masks_says_so():
    for gain, interval, words in (
        (0.1, [0.05, 0.15], "better than the other by 10.0 mask AP (95 %"),
        (-0.1, [-0.15, -0.05], "worse than the other by 10.0 mask AP (95 %"),
        (0.1, [-0.05, 0.25], "these images: +10.0 mask AP (95 %"),
    ):
        assert words in verdict({"AP": gain, "AP_interval": interval}, 9, "mask AP")


def test_the_verdict_in_words():
    coco = random_set(images=40, crowds=False)
    good, bad = run_coco_eval(coco, perfect(coco)), run_coco_eval(coco, noisy(coco))
    better = verdict(compare(good, bad, coco["categories"]), 40)
    assert better.startswith("The checkpoint is better than the other by ")
    assert better.endswith("; 40 images).")
    assert "worse than the other by" in verdict(compare(bad, good, coco["categories"]), 40)
    same = verdict(compare(bad, bad, coco["categories"]), 40)
    assert same == "No difference can be shown with these images: +0.0 AP (95 % interval 0.0 to 0.0; 40 images)."
    assert "no object" in verdict({"AP": None, "AP_interval": None}, 3)
    assert "Nothing can be said about a difference: 1 image" in verdict({"AP": 0.1, "AP_interval": None}, 1)


def test_resamples_take_seconds_and_not_minutes():
    # Two thousand resamples of 500 images take 1.5 s alone on one core; the bound is for a machine with other work.
    random = np.random.default_rng(0)
    coco = {"images": [{"id": i} for i in range(500)], "categories": [{"id": 1, "name": "thing"}], "annotations": []}
    results = []
    for image in range(500):
        for _ in range(7):
            box = [*random.uniform(0, 400, 2).tolist(), *random.uniform(20, 200, 2).tolist()]
            coco["annotations"].append({"id": 0, "image_id": image, "category_id": 1, "bbox": box})
            moved = [side * random.uniform(0.9, 1.1) for side in box]
            results.append({"image_id": image, "category_id": 1, "bbox": moved, "score": random.random()})
        results += [
            {**results[-1], "bbox": [*random.uniform(0, 400, 2).tolist(), 30.0, 30.0], "score": random.random() / 2} for _ in range(20)
        ]
    matches = run_coco_eval(coco, results).matches
    began = time.process_time()
    values = overall(weighted_metrics(matches, bootstrap_weights(500, 2000), ["AP"])["AP"])
    assert time.process_time() - began < 10
    assert 0.001 < values.std() < 0.05
