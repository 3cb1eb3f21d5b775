"""Results files whose boxes are in another format than COCO's are recognized by the true boxes."""

import pytest

from raydetr.predict.box_formats import box_format_notes

COCO = {
    "images": [{"id": 1, "width": 200, "height": 100}, {"id": 2, "width": 200, "height": 100}],
    "annotations": [
        {"image_id": 1, "bbox": [20, 10, 60, 40]},
        {"image_id": 1, "bbox": [120, 50, 30, 45]},
        {"image_id": 2, "bbox": [90, 30, 40, 20]},
    ],
}


def written(change):
    """Perfect results, and uncertain ones that are anywhere, with every box as ``change`` writes it."""
    sure = [{"image_id": each["image_id"], "bbox": change(*each["bbox"]), "score": 0.9} for each in COCO["annotations"]]
    return [*sure, *({"image_id": 2, "bbox": change(5, 5, 10, 10), "score": 0.1} for _ in range(50))]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda x, y, w, h: [x, y, x + w, y + h], "[x1, y1, x2, y2] in pixels"),
        (lambda x, y, w, h: [x + w / 2, y + h / 2, w, h], "[center x, center y, width, height] in pixels"),
        (lambda x, y, w, h: [x / 200, y / 100, w / 200, h / 100], "[x, y, width, height] in fractions of the image"),
        (lambda x, y, w, h: [x / 200, y / 100, (x + w) / 200, (y + h) / 100], "[x1, y1, x2, y2] in fractions of the image"),
        (lambda x, y, w, h: [(x + w / 2) / 200, (y + h / 2) / 100, w / 200, h / 100], "height] in fractions of the image"),
    ],
)
def test_another_format_is_named(change, shown):
    (note,) = box_format_notes(COCO, written(change))
    assert shown in note
    assert "the scores are wrong" in note


@pytest.mark.parametrize("change", [lambda *box: list(box), lambda x, y, w, h: [x + 9, y - 9, w * 1.2, h], lambda x, y, w, h: [0, 0, 9, 9]])
def test_right_and_poor_detections_are_nothing_to_note(change):
    assert box_format_notes(COCO, written(change)) == []


def test_no_detections_are_nothing_to_note():
    assert box_format_notes(COCO, []) == []


def test_negative_sides_are_counted():
    results = [*written(lambda *box: list(box)), {"image_id": 1, "bbox": [9, 9, -5, 5], "score": 0.5}]
    assert box_format_notes(COCO, results) == [
        "1 detection has a negative width or height and can match nothing; a box is [x, y, width, height] in pixels"
    ]
