"""What of a data set a fingerprint notices, what it does not, and how a difference reads."""

import copy
import io
import random
import shutil

import pytest
import torch

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, find_split
from raydetr.data.fingerprint import data_fingerprint, fingerprint_difference


def small(images=6):
    """Images 1 to ``images`` with as many boxes as their id is modulo 3."""
    entries = [{"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48} for number in range(1, images + 1)]
    boxes = [
        {"image_id": number, "category_id": 5 + box, "bbox": [8.0 + box, 8, 16.5, 12], "area": 100.0, "iscrowd": 0}
        for number in range(1, images + 1)
        for box in range(number % 3)
    ]
    for number, box in enumerate(boxes, 1):
        box["id"] = number
    return {"images": entries, "annotations": boxes, "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]}


def difference(change):
    before, now = small(), small()
    change(now)
    return fingerprint_difference(data_fingerprint(before), data_fingerprint(now))


def shuffle(coco):
    for entries in coco.values():
        random.Random(0).shuffle(entries)


def rename_files(coco):
    for image in coco["images"]:
        image["file_name"] = f"elsewhere/{image['file_name']}"


def renumber_annotations(coco):
    for annotation in coco["annotations"]:
        annotation["id"] += 100


def as_other_numbers(coco):
    for annotation in coco["annotations"]:
        annotation["bbox"] = [float(value) for value in annotation["bbox"]]
        annotation["area"] = 100


@pytest.mark.parametrize("change", [shuffle, rename_files, renumber_annotations, as_other_numbers])
def test_order_paths_and_annotation_ids_do_not_matter(change):
    assert difference(change) == []


def image(coco, image_id):
    return next(each for each in coco["images"] if each["id"] == image_id)


def first_box(coco, image_id):
    return next(each for each in coco["annotations"] if each["image_id"] == image_id)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda coco: first_box(coco, 4).update(bbox=[8.0, 8, 16.5, 12.001]), ["boxes of image 4 changed"]),
        (lambda coco: first_box(coco, 4).update(category_id=6), ["boxes of image 4 changed"]),
        (lambda coco: first_box(coco, 4).update(iscrowd=1), ["boxes of image 4 changed"]),
        (lambda coco: first_box(coco, 4).update(area=99), ["boxes of image 4 changed"]),
        (lambda coco: coco["annotations"].remove(first_box(coco, 5)), ["boxes of image 5 changed (2 before, 1 now)"]),
        (lambda coco: coco["annotations"].append(dict(first_box(coco, 5), image_id=3)), ["boxes of image 3 changed (0 before, 1 now)"]),
        (lambda coco: coco["annotations"].append(dict(first_box(coco, 1))), ["boxes of image 1 changed (1 before, 2 now)"]),
        (lambda coco: image(coco, 2).update(width=48, height=64), ["size of image 2 changed (64 x 48 before, 48 x 64 now)"]),
        (lambda coco: coco["images"].remove(image(coco, 3)), ["image 3 removed"]),
        (
            lambda coco: coco["images"].extend({"id": each, "file_name": "", "width": 9, "height": 9} for each in (9, 7, 8, 10)),
            ["4 images added (ids 7, 8, 9, ...)"],
        ),
        (
            lambda coco: [each.update(area=1.0) for each in coco["annotations"]],
            ["boxes of 4 images changed (ids 1, 2, 4, ...)"],
        ),
        (lambda coco: coco["categories"].append({"id": 9, "name": "bird"}), ["category 'bird' added"]),
        (
            lambda coco: coco["categories"][1].update(name="wolf"),
            ["category 'wolf' added", "category 'dog' removed", "boxes of 2 images changed (ids 2, 5)"],
        ),
        (
            lambda coco: [
                *(each.update(category_id=8) for each in coco["annotations"] if each["category_id"] == 6),
                coco["categories"][1].update(id=8),
            ],
            ["id of category 'dog' changed (6 before, 8 now)"],
        ),
    ],
)
def test_a_difference_is_noticed_and_named(change, lines):
    assert difference(change) == lines


def test_boxes_that_move_to_another_image_are_noticed():
    def swap(coco):
        for annotation in coco["annotations"]:
            annotation["image_id"] = {1: 4, 4: 1, 2: 5, 5: 2}[annotation["image_id"]]

    assert difference(swap) == []  # the boxes of 1 and 4, and of 2 and 5, are the same
    assert difference(lambda coco: [each.update(image_id=6) for each in coco["annotations"] if each["image_id"] == 5]) == [
        "boxes of 2 images changed (ids 5, 6)"
    ]


def test_it_goes_through_a_checkpoint():
    file = io.BytesIO()
    torch.save(data_fingerprint(small()), file)
    file.seek(0)
    assert fingerprint_difference(torch.load(file, weights_only=True), data_fingerprint(small())) == []


def test_a_moved_data_set_has_the_same_fingerprint(coco_folder, tmp_path):
    root = coco_folder()
    shutil.copytree(root, tmp_path / "moved")
    before, now = (
        data_fingerprint(CocoImages(find_split(load_config({"data.path": str(each)}).data, "val"), lambda *pair: pair).coco)
        for each in (root, tmp_path / "moved")
    )
    assert fingerprint_difference(before, now) == []


def test_a_split_without_boxes():
    empty = small() | {"annotations": []}
    assert fingerprint_difference(data_fingerprint(empty), data_fingerprint(copy.deepcopy(empty))) == []
    assert difference(lambda coco: coco["annotations"].clear()) == ["boxes of 4 images changed (ids 1, 2, 4, ...)"]


def outlined(*counts):
    """:func:`small` with a mask for each box, whose run lengths are ``counts`` (None: no mask)."""
    coco = small()
    for number, box in enumerate(coco["annotations"]):
        text = counts[number] if number < len(counts) else "a"
        box["segmentation"] = text and {"size": [48, 64], "counts": text}
    return coco


def test_edited_masks_are_noticed_where_both_have_masks():
    before = data_fingerprint(outlined("x", "y", "z"))
    assert fingerprint_difference(before, data_fingerprint(outlined("x", "y", "z"))) == []
    assert fingerprint_difference(before, data_fingerprint(outlined("x", "y", None))) == ["masks of image 2 changed"]
    assert fingerprint_difference(before, data_fingerprint(outlined("v", "w", "z"))) == ["masks of 2 images changed (ids 1, 2)"]
    assert fingerprint_difference(before, data_fingerprint(outlined("x", "z", "y"))) == ["masks of image 2 changed"], "of other boxes"
    boxes = outlined("x", "y", "z")
    first_box(boxes, 1)["bbox"] = [1.0, 2, 3, 4]
    assert fingerprint_difference(before, data_fingerprint(boxes)) == ["boxes of image 1 changed"]


def test_without_masks_a_fingerprint_is_what_it_always_was():
    without, masks = data_fingerprint(small()), data_fingerprint(outlined("x"))
    assert "masks" not in without
    assert without["digests"].tolist()[:3] == [7165043371007031337, -3799269490746982722, -5426141060434712860]
    assert torch.equal(without["digests"], masks["digests"])
    assert fingerprint_difference(without, masks) == fingerprint_difference(masks, without) == []


def test_the_order_of_equal_boxes_with_different_masks_does_not_matter():
    one, other = outlined("x", "y", "z"), outlined("x", "z", "y")
    for coco in (one, other):
        boxes = [each for each in coco["annotations"] if each["image_id"] == 2]
        boxes[1] |= {"bbox": boxes[0]["bbox"], "category_id": boxes[0]["category_id"]}
    assert fingerprint_difference(data_fingerprint(one), data_fingerprint(other)) == []
