import numpy as np
import pytest

from raydetr.evaluate.coco import run_coco_eval, run_mask_eval
from tests.evaluate.sets import many_of_one, noisy, perfect, pycocotools_evaluation, random_set, with_masks


def within_crowds(seed):
    """Detections that are a small part of a crowd, or of an object."""
    coco = random_set(seed)
    for each in coco["annotations"][::2]:
        each["iscrowd"] = 1
    results = perfect(coco, crowds=True)
    return coco, [each | {"bbox": [x, y, w / 3, h / 3]} for each in results for x, y, w, h in [each["bbox"]]] + noisy(coco, seed)


@pytest.mark.parametrize("seed", range(4))
def test_every_match_is_that_of_pycocotools(seed):
    for coco, results in (
        (random_set(seed), noisy(random_set(seed), seed)),
        many_of_one(seed),
        within_crowds(seed),
        (random_set(seed), perfect(random_set(seed), True)),
    ):
        assert_equal(run_coco_eval(coco, results).matches, pycocotools_evaluation(coco, results))


@pytest.mark.parametrize("seed", range(2))
def test_every_match_of_masks_is_that_of_pycocotools(seed):
    coco, results = with_masks(random_set(seed), seed)
    many = [each | {"score": round(each["score"], 1)} for each in results * 30 if each["image_id"] == results[0]["image_id"]]
    for found in (results, many):  # the same masks, many of them, and many scores that are equal
        assert_equal(run_mask_eval(coco, found).matches, pycocotools_evaluation(coco, found, "segm"))


def assert_equal(matches, theirs):
    params, images = theirs.params, len(theirs.params.imgIds)
    each = iter(theirs.evalImgs)
    for category in range(len(params.catIds)):
        for area in range(len(params.areaRng)):
            for image in range(images):
                pair = next(each)
                mine = np.flatnonzero((matches.image == image) & (matches.category == category))
                mine = mine[np.argsort(matches.rank[mine])]
                assert (pair is None) <= (len(mine) == 0)
                if pair is None:
                    assert matches.objects[area, image, category] == 0
                    continue
                assert matches.rank[mine].tolist() == list(range(len(pair["dtScores"])))
                assert matches.score[mine].tolist() == list(pair["dtScores"])
                np.testing.assert_array_equal(matches.ignored[area][:, mine], pair["dtIgnore"].astype(bool))
                np.testing.assert_array_equal(matches.matched[area][:, mine], (pair["dtMatches"] > 0) & ~pair["dtIgnore"].astype(bool))
                assert matches.objects[area, image, category] == np.sum(~np.array(pair["gtIgnore"], bool))


def test_rows_lead_back_to_the_detections():
    coco = random_set(2)
    results = noisy(coco)
    evaluation = run_coco_eval(coco, results)
    matches = evaluation.matches
    assert sorted(matches.row.tolist()) == list(range(len(results)))
    assert matches.score.tolist() == [results[row]["score"] for row in matches.row]
    assert [evaluation.image_ids[image] for image in matches.image] == [results[row]["image_id"] for row in matches.row]
