import pytest

from raydetr.data.formats.createml import read_createml
from raydetr.data.formats.labels import Notes, Options
from raydetr.errors import UserError

BOX = {"x": 14, "y": 10, "width": 20, "height": 10}


def entry(name="a.jpg", *boxes, label="cat"):
    return {"image": name, "annotations": [{"label": label, "coordinates": box} for box in boxes or (BOX,)]}


def read(folder, category=None):
    notes = Notes()
    return read_createml(folder, Options(category), notes), notes


def objects(images):
    return [(image.name, each.category, each.box) for image in images for each in image.objects]


def test_boxes_are_given_by_their_center(write):
    splits, notes = read(write({"a.jpg": None, "annotations.json": [entry()]}))
    assert objects(splits["train"]) == [("a.jpg", "cat", [4, 5, 20, 10])]
    assert splits["train"][0].objects[0].segmentation == []
    assert not notes


def test_splits_and_what_is_passed_over(write):
    files = {f"{split}/_annotations.createml.json": [entry()] for split in ("train", "valid", "test")}
    splits, notes = read(write({**files, **{f"{split}/a.jpg": None for split in ("train", "valid", "test")}, "train/b.jpg": None}))
    assert {split: objects(images) for split, images in splits.items()} == {
        split: [("a.jpg", "cat", [4, 5, 20, 10])] for split in ("train", "val")
    }
    assert notes == {
        "file of the test part, left out": ["test/_annotations.createml.json"],
        "image is not in the Create ML file, left out": ["b.jpg"],
    }


def test_the_older_key_numbers_as_text_and_images_elsewhere(write):
    old = {"imagefilename": "C:\\x\\A.JPG", "annotations": [{"label": 3, "coordinates": {key: str(value) for key, value in BOX.items()}}]}
    splits, _ = read(write({"images/a.jpg": None, "labels/a.json": [old]}))
    assert objects(splits["train"]) == [("images/a.jpg", "3", [4, 5, 20, 10])]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([entry("gone.jpg")], r"image number 1: No such file: image 'gone\.jpg'"),
        ([entry(), {"image": "a.jpg"}], r"image number 2 has no list of annotations"),
        ([entry("a.jpg", {"x": 1, "y": 2, "width": 3})], r"annotation 1: coordinates .* are not x, y, width and height"),
        ([entry("a.jpg", BOX | {"width": -1})], r"are not x, y, width and height"),
        ([entry("a.jpg", BOX | {"x": "left"})], r"are not x, y, width and height"),
        ([entry(label=" ")], r"annotation 1 has no label"),
        ({}, r"no Create ML annotation file"),
    ],
)
def test_broken_files_are_told(write, content, complaint):
    with pytest.raises(UserError, match=complaint):
        read(write({"a.jpg": None, "annotations.json": content}))
