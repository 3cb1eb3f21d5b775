import numpy as np
import pytest

from raydetr.errors import UserError
from raydetr.evaluate.coco import run_coco_eval
from raydetr.evaluate.thresholds import Goal, choose_thresholds, read_goal, thresholds_table

CATEGORIES = [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]


def data_set(detections, images=4, objects=1):
    """COCO data with ``objects`` squares on each image; ``detections`` are (image, which object or None for a false one, score)."""
    coco = {"images": [{"id": number, "width": 500, "height": 100} for number in range(images)], "categories": CATEGORIES}
    boxes = {(image, which): [100 * which, 0, 50, 50] for image in range(images) for which in range(objects)}
    coco["annotations"] = [
        {"id": number, "image_id": image, "category_id": 3, "bbox": bbox, "area": 2500, "iscrowd": 0}
        for number, ((image, _), bbox) in enumerate(boxes.items(), 1)
    ]
    results = [
        {"image_id": image, "category_id": 3, "bbox": [440, 60, 20, 20] if which is None else boxes[image, which], "score": score}
        for image, which, score in detections
    ]
    return coco, results


def chosen(detections, goal="f1", **data):
    return choose_thresholds(run_coco_eval(*data_set(detections, **data)), read_goal(goal))


# Four objects. From above: hit, hit, false, hit, false, false; the fourth object is never found.
SIX = [(0, 0, 0.9), (1, 0, 0.8), (2, None, 0.6), (2, 0, 0.5), (3, None, 0.3), (0, None, 0.1)]


@pytest.mark.parametrize(
    ("goal", "score", "precision", "recall", "reached"),
    [
        ("f1", 0.4, 3 / 4, 3 / 4, True),  # F1 is 0.4, 0.67, 0.57, 0.75, 0.67, 0.6: the threshold is half way between 0.5 and 0.3
        ("precision=0.7", 0.4, 3 / 4, 3 / 4, True),
        ("precision=0.9", 0.7, 1, 1 / 2, True),
        ("recall=0.5", 0.7, 1, 1 / 2, True),
        ("recall=0.75", 0.4, 3 / 4, 3 / 4, True),
        ("recall=0.9", 0.4, 3 / 4, 3 / 4, False),
        ("recall=0.2", 0.85, 1, 1 / 4, True),
    ],
)
def test_the_threshold_is_the_one_that_was_asked_for(goal, score, precision, recall, reached):
    (category_id, found), *others = chosen(SIX, goal).items()
    assert (category_id, others) == (3, [])  # nothing is known of oblongs
    assert found.score == pytest.approx(score)
    assert (found.precision, found.recall, found.reached, found.objects) == (precision, recall, reached, 4)
    kept = [which is not None for _, which, each in SIX if each >= found.score]
    assert (sum(kept) / len(kept), sum(kept) / 4) == (precision, recall)


def test_equal_scores_are_kept_or_left_out_together():
    found = chosen([(0, 0, 0.5), (1, None, 0.5), (2, None, 0.5), (3, 0, 0.4)], "precision=0.9")[3]
    assert not found.reached
    assert found.score == pytest.approx(0.2)  # a precision of 1/2 with all four; the first one alone cannot be had


def test_the_interval_is_wide_where_images_disagree_and_narrow_where_they_do_not():
    random = np.random.default_rng(0)

    def detections(images):
        hits = [(image, 0, 0.8 + 0.1 * random.random()) for image in range(images)]
        return hits + [(image, None, 0.2 + 0.1 * random.random()) for image in range(images)]

    alike = chosen(detections(60), images=60)[3]
    assert alike.score == pytest.approx(0.55, abs=0.02)
    assert alike.interval[0] <= alike.score <= alike.interval[1]
    assert alike.interval[1] - alike.interval[0] < 0.05
    mixed = [(image, 0 if random.random() < score else None, score) for image, score in enumerate(random.random(24))]
    unsure = chosen(mixed, images=24)[3]
    assert unsure.interval[1] - unsure.interval[0] > 0.15


def test_a_single_image_has_no_interval_and_the_table_says_what_is_missing():
    thresholds = chosen([(0, 0, 0.9), (0, None, 0.2)], "recall=1", images=1, objects=2)
    assert thresholds[3].interval is None
    lines = thresholds_table([(3, "square"), (7, "oblong")], thresholds, Goal("recall", 1)).splitlines()
    assert lines[0] == "score thresholds for recall=1"
    assert lines[2].split() == ["square", "0.550", "one", "image", "only", "1.000", "0.500", "0.667", "2", "not", "reached"]
    assert lines[3] == "oblong    none: no object of it, or nothing was detected"


def test_nothing_detected_and_nothing_to_detect():
    assert chosen([]) == {}
    assert chosen([(0, None, 0.5)], objects=0) == {}


@pytest.mark.parametrize("text", ["", "f2", "f1=0.5", "precision", "precision=", "precision=0", "recall=1.1", "recall=nan", "recall=x"])
def test_a_goal_that_is_none_is_one_line(text):
    with pytest.raises(UserError, match=r"^--threshold-goal: .* is none of f1, precision=P and recall=R"):
        read_goal(text)
    assert str(read_goal("precision=0.90")) == "precision=0.9"
