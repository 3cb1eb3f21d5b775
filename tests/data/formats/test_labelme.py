import base64
import io
import math

import numpy as np
import pytest
from PIL import Image

from raydetr.data.formats.labelme import read_labelme
from raydetr.data.formats.labels import Notes, Options
from raydetr.data.masks import decode_masks
from raydetr.errors import UserError


def shape(label="cat", points=((4, 5), (24, 15)), shape_type="rectangle", **others):
    return {"label": label, "points": [list(point) for point in points], "shape_type": shape_type, "group_id": None, **others}


def file(*shapes, path="a.jpg", size=(80, 60)):
    return {"version": "5.4.1", "shapes": list(shapes), "imagePath": path, "imageData": None, "imageHeight": size[1], "imageWidth": size[0]}


def read(folder, category=None):
    notes = Notes()
    return read_labelme(folder, Options(category), notes), notes


def objects(images):
    return [(image.name, each.category, each.box) for image in images for each in image.objects]


def test_shapes(write):
    polygon = [(10, 10), (50, 10), (50, 40)]
    shapes = [
        shape(),
        shape(points=[(24, 15), (4, 5)]),
        shape(points=polygon, shape_type="polygon"),
        shape(points=polygon, shape_type=None),
        shape("dog", points=[(40, 30), (40, 40)], shape_type="circle"),
        shape(points=[(4, 5), (24, 15)], shape_type="mask", mask="..."),
    ]
    splits, notes = read(write({"a.jpg": None, "a.json": file(*shapes)}))
    first, second, third, fourth, circle, mask = splits["train"][0].objects
    assert first == second == mask
    assert (first.box, first.segmentation, first.area) == ([4, 5, 20, 10], [], 200)
    assert third == fourth
    assert (third.segmentation, third.area) == ([[10, 10, 50, 10, 50, 40]], 600)
    assert (circle.category, circle.box, circle.area) == ("dog", [30, 20, 20, 20], pytest.approx(math.pi * 100))
    assert notes == {"mask cannot be read, taken as its box": ["a.jpg shape 6"]}


def painted(pixels):
    """A mask as labelme keeps it."""
    content = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_a_mask_keeps_its_pixels(write):
    pixels = np.zeros((11, 21), int)
    pixels[2:5, 3:9] = 1  # with a margin
    pixels[3, 5] = 0  # and a hole
    entry = shape(points=[(4, 5), (24, 15)], shape_type="mask", mask=painted(pixels))
    splits, notes = read(write({"a.jpg": None, "a.json": file(entry)}))
    (seen,) = splits["train"][0].objects
    assert (seen.box, seen.area) == ([7, 7, 6, 3], 17)
    assert seen.segmentation["size"] == [60, 80]
    mask = decode_masks([seen.segmentation], (60, 80))[0]
    assert (mask[5:16, 4:25] == pixels).all()
    assert mask.sum() == 17
    assert notes == {}


def test_a_mask_of_an_image_of_another_size_is_scaled_with_it(write):
    entry = shape(points=[(20, 30), (59, 49)], shape_type="mask", mask=painted(np.ones((20, 40))))
    splits, _ = read(write({"a.jpg": None, "a.json": file(entry, size=(160, 120))}))
    (seen,) = splits["train"][0].objects
    assert (seen.box, seen.area) == ([10, 15, 20, 10], 200)


@pytest.mark.parametrize(
    "others",
    [
        {"mask": painted(np.ones((3, 3)))},
        {"mask": "iVBORw0KGgo="},
        {"mask": None},
        {"mask": 7},
        {"points": [(70, 5), (90, 15)], "mask": painted(np.ones((11, 21)))},
    ],
)
def test_a_mask_that_does_not_fit_is_taken_as_its_box_and_said(write, others):
    splits, notes = read(write({"a.jpg": None, "a.json": file(shape(shape_type="mask", **others))}))
    assert [each.segmentation for each in splits["train"][0].objects] == [[]]
    assert "mask cannot be read, taken as its box" in notes


def test_a_mask_without_a_pixel_is_left_out(write):
    entry = shape(shape_type="mask", mask=painted(np.zeros((11, 21))))
    splits, notes = read(write({"a.jpg": None, "a.json": file(entry, shape())}))
    assert len(splits["train"][0].objects) == 1
    assert notes == {"shape without area, left out": ["a.jpg shape 1"]}


def test_polygons_of_one_group_are_one_object(write):
    parts = [[(10, 10), (20, 10), (20, 20)], [(40, 10), (50, 10), (50, 40)]]
    shapes = [shape(points=part, shape_type="polygon", group_id=7) for part in parts]
    splits, _ = read(write({"a.jpg": None, "a.json": file(*shapes, shape("dog", group_id=7), shape("dog"))}))
    cat, *dogs = splits["train"][0].objects
    assert (cat.box, cat.area, len(cat.segmentation)) == ([10, 10, 40, 30], 50 + 150, 2)
    assert [dog.category for dog in dogs] == ["dog", "dog"]


def test_points_and_lines_are_left_out(write):
    shapes = [shape(points=[(1, 1)] * count, shape_type=kind) for kind, count in (("point", 1), ("line", 2), ("linestrip", 3))]
    splits, notes = read(write({"a.jpg": None, "a.json": file(*shapes, shape())}))
    assert objects(splits["train"]) == [("a.jpg", "cat", [4, 5, 20, 10])]
    assert len(notes["shape without area, left out"]) == 3


@pytest.mark.parametrize("path", ["a.jpg", "..\\images\\a.jpg", "/home/x/a.jpg", "A.JPG", "old name.jpg"])
def test_the_image_is_found_by_path_or_stem(write, path):
    splits, _ = read(write({"images/a.jpg": None, "labels/a.json": file(shape(), path=path)}))
    assert objects(splits["train"]) == [("images/a.jpg", "cat", [4, 5, 20, 10])]


def test_equal_names_in_different_folders_and_splits(write):
    files = {f"{part}/a.jpg": None for part in ("train/x", "train/y", "val", "test")}
    files |= {f"{part}/a.json": file(shape(part)) for part in ("train/x", "train/y", "val", "test")}
    splits, notes = read(write(files))
    assert objects(splits["train"]) == [("x/a.jpg", "train/x", [4, 5, 20, 10]), ("y/a.jpg", "train/y", [4, 5, 20, 10])]
    assert objects(splits["val"]) == [("a.jpg", "val", [4, 5, 20, 10])]
    assert notes == {"image of the test part, left out": ["test/a.jpg"]}


def test_what_is_passed_over_is_said(write):
    _, notes = read(write({"a.jpg": None, "b.jpg": None, "a.json": file(shape()), "config.json": {"x": 1}}))
    assert notes == {
        "JSON file is no annotation of labelme, left out": ["config.json"],
        "image without a labelme file, left out": ["b.jpg"],
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (file(shape(), path="gone.jpg"), r"a\.json: No such file: image 'gone\.jpg'"),
        (file(shape(label="")), r"a\.json: shape 1 has no label"),
        (file(shape(), 7), r"a\.json: shape 2 has no label"),
        (file(shape(points=[(1, 2)])), r"shape 1: a rectangle needs two points"),
        (file(shape(points=[(1, 2)], shape_type="circle")), r"shape 1: a circle needs two points"),
        (file(shape(points=[(1, 2, 3)])), r"shape 1: points .* are not pairs of numbers"),
        (file(shape(points=[(1, None), (3, 4)])), r"are not pairs of numbers"),
        (file(shape(shape_type="spline")), r"unknown shape_type 'spline'"),
        ({**file(), "shapes": {}}, r"shapes is not a list"),
        (file(shape(), size=(100, 60)), r"the image is 80 x 60 pixels, its annotation says 100 x 60"),
        ("{", r"not a JSON file"),
    ],
)
def test_broken_files_are_told(write, content, complaint):
    name = "b.jpg" if "gone" in complaint else "a.jpg"
    with pytest.raises(UserError, match=complaint) as error:
        read(write({name: None, "a.json": content}))
    assert "\n" not in str(error.value)


def test_a_folder_without_annotations_is_told(write):
    with pytest.raises(UserError, match="no annotation of labelme"):
        read(write({"a.jpg": None}))
