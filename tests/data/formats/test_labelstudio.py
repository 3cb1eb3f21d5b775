import math

import pytest

from raydetr.data.formats.labels import Notes, Options
from raydetr.data.formats.labelstudio import read_labelstudio
from raydetr.errors import UserError

SIZE = {"original_width": 80, "original_height": 60}
BOX = {"x": 5, "y": 10, "width": 25, "height": 50, "rotation": 0, "rectanglelabels": ["cat"]}  # percent: 4, 6, 20, 30 pixels
PIXELS = [4, 6, 20, 30]


def result(value=BOX, kind="rectanglelabels", **others):
    return {"type": kind, "image_rotation": 0, "value": value, **SIZE, **others}


def task(*results, image="/data/upload/1/1a2b3c4d-a.jpg"):
    return {"id": 1, "data": {"image": image, "note": "x"}, "annotations": [{"was_cancelled": False, "result": list(results)}]}


def read(folder, category=None):
    notes = Notes()
    return read_labelstudio(folder, Options(category), notes), notes


def objects(images):
    return [(image.name, each.category, each.box) for image in images for each in image.objects]


@pytest.mark.parametrize(
    "image", ["/data/upload/1/1a2b3c4d-a.jpg", "/data/local-files/?d=x/a.jpg", "https://host/x/a.jpg?token=1", "s3://bucket/a.jpg", "a.jpg"]
)
def test_tasks_find_their_images(write, image):
    splits, notes = read(write({"images/a.jpg": None, "project.json": [task(result(), image=image)]}))
    assert objects(splits["train"]) == [("images/a.jpg", "cat", PIXELS)]
    assert set(notes) == {"image found under another name or folder"}


def test_uploads_that_keep_their_prefix_are_told_apart(write):
    files = {"images/1a2b3c4d-a.jpg": None, "images/99999999-a.jpg": None}
    tasks = [task(result(), image=f"/data/upload/1/{name}-a.jpg") for name in ("1a2b3c4d", "99999999")]
    splits, _ = read(write({**files, "project.json": tasks}))
    assert [image.name for image in splits["train"]] == list(files)


def test_shapes(write):
    polygon = {"points": [[10, 10], [50, 10], [50, 50]], "polygonlabels": ["dog"]}
    ellipse = {"x": 50, "y": 50, "radiusX": 12.5, "radiusY": 25, "rotation": 0, "ellipselabels": ["sun"]}
    turned = {**BOX, "x": 50, "y": 50, "rotation": 90}
    brush = {"format": "rle", "rle": [1, 2], "brushlabels": ["cat"]}
    point = {"x": 1, "y": 1, "width": 0.1, "keypointlabels": ["cat"]}
    results = [
        *(result(), result(polygon, "polygonlabels"), result(ellipse, "ellipselabels"), result(turned)),
        *(result(brush, "brushlabels"), result(point, "keypointlabels"), {"type": "choices", "value": {"choices": ["day"]}}),
    ]
    splits, notes = read(write({"a.jpg": None, "project.json": [task(*results)]}))
    rectangle, triangle, sun, rotated = splits["train"][0].objects
    assert (rectangle.box, rectangle.segmentation) == (PIXELS, [])
    assert (triangle.category, triangle.segmentation, triangle.area) == ("dog", [[8, 6, 40, 6, 40, 30]], 32 * 24 / 2)
    assert (sun.box, sun.area) == ([30, 15, 20, 30], pytest.approx(math.pi * 150))
    assert rotated.box == pytest.approx([10, 30, 30, 20])
    assert rotated.area == pytest.approx(600)
    assert len(rotated.segmentation[0]) == 8
    left_out = [text for text in notes if "is no box, polygon or ellipse, left out" in text]
    assert [text.split()[0] for text in left_out] == ["brushlabels", "keypointlabels", "choices"]


def test_json_min(write):
    minimal = {"image": "/data/upload/1/1a2b3c4d-a.jpg", "id": 1, "label": [{**BOX, **SIZE}], "annotator": 1}
    splits, _ = read(write({"a.jpg": None, "min.json": [minimal]}))
    assert objects(splits["train"]) == [("a.jpg", "cat", PIXELS)]


def test_canceled_and_second_annotations(write):
    tasks = [task(result())]
    tasks[0]["annotations"].insert(0, {"was_cancelled": True, "result": [result(), result()]})
    tasks[0]["annotations"].append({"result": []})
    splits, notes = read(write({"a.jpg": None, "project.json": tasks}))
    assert len(splits["train"][0].objects) == 1
    assert notes["image with several annotations, the first is taken"] == ["a.jpg"]


@pytest.mark.parametrize(
    ("tasks", "complaint"),
    [
        ([task(result(), image="gone.jpg")], r"task number 1: No such file: image 'gone\.jpg'"),
        ([task(result(), image="")], r"task number 1: no value of its data names an image"),
        ([task(result({**BOX, "rectanglelabels": ["a", "b"]}))], r"result 1 has several labels \(a, b\)"),
        ([task(result({**BOX, "rectanglelabels": []}))], r"result 1 has no label"),
        ([task(result({**BOX, "x": "left"}))], r"result 1: 'left' is not a percentage"),
        ([task(result({**BOX, "width": -1}))], r"result 1: a negative width or height"),
        ([task(result({"points": [1, 2], "polygonlabels": ["a"]}))], r"are not pairs of numbers"),
        ([task(result(original_width=100))], r"its annotation says 100 x 60"),
        ([task(result()), 7], r"task number 2 is not a task"),
        ([{**task(), "annotations": 7}], r"annotations is not a list"),
        ([], r"no export of Label Studio"),
    ],
)
def test_broken_files_are_told(write, tasks, complaint):
    with pytest.raises(UserError, match=complaint):
        read(write({"a.jpg": None, "project.json": tasks}))
