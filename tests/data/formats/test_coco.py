import json

import pytest
from PIL import Image

from raydetr.data.formats.coco import read_coco
from raydetr.data.formats.convert import convert
from raydetr.data.formats.labels import Notes, Options
from raydetr.errors import UserError


def content(*names, category_id=1, categories=({"id": 1, "name": "cat"},), size=(80, 60)):
    return {
        "images": [{"id": n, "file_name": name, "width": size[0], "height": size[1]} for n, name in enumerate(names, 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": category_id, "bbox": [4, 5, 20, 10], "area": 200, "iscrowd": 0}
            for n in range(1, len(names) + 1)
        ],
        "categories": list(categories),
    }


@pytest.fixture
def folder(tmp_path):
    """A way to write images of 80 x 60 and COCO files."""

    def write(**files):
        for name, value in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if value is None:
                Image.new("RGB", (80, 60), "grey").save(path)
            else:
                path.write_text(json.dumps(value))
        return tmp_path

    return write


def read(folder, category=None):
    notes = Notes()
    return read_coco(folder, Options(category), notes), notes


def boxes(images):
    return [(image.name, each.category, each.box) for image in images for each in image.objects]


ONE = ("a.jpg", "cat", [4, 5, 20, 10])


@pytest.mark.parametrize(
    ("train", "val", "image", "file_name"),
    [
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "{}/a.jpg", "a.jpg"),
        ("annotations/instances_Train.json", "annotations/instances_Validation.json", "images/{}/a.jpg", "a.jpg"),
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "{}2017/a.jpg", "a.jpg"),
        ("annotations/custom_train.json", "annotations/custom_val.json", "{}2017/a.jpg", "a.jpg"),
        ("train.json", "val.json", "images/{}/a.jpg", "a.jpg"),
        ("train.json", "val.json", "{}/a.jpg", "{}/a.jpg"),
        ("labels/train/result.json", "labels/val/result.json", "images/{}/a.jpg", "a.jpg"),
    ],
)
def test_splits(folder, train, val, image, file_name):
    alias = "valid" if "valid/" in val else "val"
    files = {
        train: content(file_name.format("train")),
        val: content(file_name.format(alias)),
        image.format("train"): None,
        image.format(alias): None,
    }
    splits, notes = read(folder(**files))
    assert {split: boxes(images) for split, images in splits.items()} == {"train": [ONE], "val": [ONE]}
    assert splits["train"][0].path != splits["val"][0].path
    assert set(notes) <= {"image found under another name or folder"}


@pytest.mark.parametrize(
    ("file", "image"),
    [
        ("result.json", "images/a.jpg"),
        ("annotations/instances_default.json", "images/default/a.jpg"),
        ("annotations/instances_default.json", "images/a.jpg"),
        ("coco.json", "a.jpg"),
        ("annotations.json", "train/deep/a.jpg"),
    ],
)
def test_one_file_for_all_images_is_split(folder, tmp_path, file, image):
    other = image.replace("a.jpg", "b.jpg")
    root = folder(**{f"src/{file}": content("a.jpg", "b.jpg"), f"src/{image}": None, f"src/{other}": None}) / "src"
    summary = convert(root, tmp_path / "dst", "coco", val_fraction=0.5)
    assert summary.images == {"train": 1, "val": 1}
    assert convert(root / file, tmp_path / "file", "coco", val_fraction=0.5).images == {"train": 1, "val": 1}


def test_the_test_part_and_unlisted_images_are_said(folder):
    root = folder(
        **{f"{split}/_annotations.coco.json": content("a.jpg") for split in ("train", "valid", "test")},
        **{f"{split}/a.jpg": None for split in ("train", "valid", "test")},
        **{"train/x.jpg": None},
    )
    splits, notes = read(root)
    assert set(splits) == {"train", "val"}
    assert notes == {
        "file of the test part, left out": ["test/_annotations.coco.json"],
        "image is in no COCO file, left out": ["x.jpg"],
    }


@pytest.mark.parametrize("convert_id", [str, float, lambda n: f"{n}.0", lambda n: f"c33c-{n:04x}", lambda n: n + 2**40])
def test_ids_in_any_form(folder, convert_id):
    coco = content("a.jpg", "b.jpg")
    for image in coco["images"]:
        image["id"] = convert_id(image["id"])
    for annotation in coco["annotations"]:
        annotation |= {key: convert_id(annotation[key]) for key in ("id", "image_id", "category_id")}
    coco["categories"][0] = {"id": convert_id(1), "name": "cat"}
    splits, _ = read(folder(**{"coco.json": coco, "a.jpg": None, "b.jpg": None}))
    assert boxes(splits["train"]) == [ONE, ("b.jpg", *ONE[1:])]


def test_ids_of_one_kind_may_be_text_only_on_one_side(folder):
    coco = content("a.jpg")
    coco["annotations"][0] |= {"image_id": "1", "category_id": 1.0}
    assert boxes(read(folder(**{"coco.json": coco, "a.jpg": None}))[0]["train"]) == [ONE]


@pytest.mark.parametrize("root_category", [{"id": 0, "name": "animals", "supercategory": "none"}, {"id": 0, "name": "_background_"}])
def test_a_root_category_that_no_annotation_has_is_left_out(folder, tmp_path, root_category):
    categories = [root_category, {"id": 1, "name": "cat", "supercategory": "animals"}]
    root = folder(**{"src/coco.json": content("a.jpg", "b.jpg", categories=categories), "src/a.jpg": None, "src/b.jpg": None})
    summary = convert(root / "src", tmp_path / "dst", "coco")
    assert list(summary.objects) == ["cat"]
    assert f"1 × category without any annotation, left out: {root_category['name']}" in summary.warnings


def test_a_category_of_one_split_only_is_kept(folder):
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    train, val = (content("a.jpg", category_id=number, categories=categories) for number in (1, 2))
    splits, notes = read(folder(**{"train/c.json": train, "val/c.json": val, "train/a.jpg": None, "val/a.jpg": None}))
    assert [images[0].objects[0].category for images in splits.values()] == ["cat", "dog"]
    assert not notes


def test_categories_of_one_name_are_joined_and_noted(folder):
    coco = content("a.jpg", category_id=2, categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": " cat"}])
    splits, notes = read(folder(**{"coco.json": coco, "a.jpg": None}))
    assert boxes(splits["train"]) == [ONE]
    assert notes == {"category whose name several ids have, joined": ["cat"]}


def test_category_zero_with_annotations_is_kept(folder):
    coco = content("a.jpg", category_id=0, categories=[{"id": 0, "name": "cat"}])
    assert boxes(read(folder(**{"coco.json": coco, "a.jpg": None}))[0]["train"]) == [ONE]


def test_categories_are_joined_by_name_where_ids_differ(folder):
    root = folder(
        **{
            "train/_annotations.coco.json": content("a.jpg"),
            "valid/_annotations.coco.json": content("a.jpg", category_id=11, categories=[{"id": 11, "name": "cat"}]),
            **{"train/a.jpg": None, "valid/a.jpg": None},
        }
    )
    assert [boxes(images) for images in read(root)[0].values()] == [[ONE], [ONE]]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("/home/someone/photos/a b.jpg", "a b.jpg"),
        ("C:\\Users\\x\\a b.jpg", "a b.jpg"),
        ("images\\a b.jpg", "images/a b.jpg"),
        ("sub\\deep\\a b.jpg", "sub/deep/a b.jpg"),
        ("..\\..\\label-studio\\media\\upload\\4\\a b.jpg", "a b.jpg"),
        ("https://host/bucket/a%20b.jpg?token=1", "a b.jpg"),
        ("s3://bucket/x/a b.jpg", "a b.jpg"),
        ("file:///data/a b.jpg", "a b.jpg"),
        ("/data/local-files/?d=x/a%20b.jpg", "x/a b.jpg"),
        ("/data/upload/4/1a2b3c4d-a b.jpg", "a b.jpg"),
        ("a%20b.jpg", "a b.jpg"),
        ("a%20b.jpg", "a%20b.jpg"),
        ("train/a b.jpg", "a b.jpg"),
        ("a b.jpg", "sub/a b.jpg"),
        ("a b.JPG", "a b.jpg"),
        ("a b.jpg", "A B.JPEG"),
        ("a b.jpg ", "a b.jpg"),
        ("a b", "a b.PNG"),
        ("Gro\u0308\u00dfe.jpg", "Gr\u00f6\u00dfe.jpg"),
        ("Gr\u00f6\u00dfe.jpg", "Gro\u0308\u00dfe.jpg"),
    ],
)
def test_names_of_other_computers(folder, name, file):
    splits, notes = read(folder(**{"coco.json": content(name), file: None}))
    assert boxes(splits["train"]) == [(file, *ONE[1:])]
    assert notes == ({} if name == file else {"image found under another name or folder": [f"{name} -> {file}"]})


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "C:\\x.jpg", None, "", 7, "a\nb.jpg"])
def test_names_that_mean_no_image_of_the_folder_are_refused(folder, name):
    with pytest.raises(UserError, match=r"coco\.json: image number 1: file name .*(leads out|is no file name)"):
        read(folder(**{"coco.json": content(name), "a.jpg": None}))


def test_a_missing_image_names_the_nearest(folder):
    with pytest.raises(UserError, match=r"image 'photo_12\.jpg' is not in .*; the nearest name is photo_13\.jpg"):
        read(folder(**{"coco.json": content("photo_12.jpg"), "photo_13.jpg": None}))


def test_a_mask_gives_the_box_and_the_area_that_are_missing(folder):
    """Run lengths go down the columns: 10 pixels of the first column are free, then 20 are the object's."""
    coco = content("a.jpg")
    del coco["annotations"][0]["bbox"]
    coco["annotations"][0] |= {"segmentation": {"counts": [10, 20, 50, 10, 4710], "size": [60, 80]}}
    coco["annotations"][0].pop("area", None)
    splits, _ = read(folder(**{"coco.json": coco, "a.jpg": None}))
    (seen,) = splits["train"][0].objects
    assert seen.box == [0, 10, 2, 20]
    assert seen.area == 30
    assert seen.segmentation == coco["annotations"][0]["segmentation"]


def test_segmentations_and_crowds_are_kept(folder):
    coco = content("a.jpg", "b.jpg", "c.jpg")
    polygons = [[4, 5, 24, 5, 24, 15], [5, 6, 7, 6, 7, 8.5]]
    encoded = {"counts": [10, 20, 4770], "size": [60, 80]}
    coco["annotations"][0] |= {"segmentation": polygons, "area": 102.5}
    coco["annotations"][1] |= {"segmentation": encoded, "iscrowd": 1, "area": 20}
    del coco["annotations"][2]["bbox"]
    coco["annotations"][2] |= {"segmentation": polygons[0], "area": 0}
    splits, _ = read(folder(**{"coco.json": coco, **{f"{stem}.jpg": None for stem in "abc"}}))
    first, second, third = (image.objects[0] for image in splits["train"])
    assert (first.segmentation, first.area, first.iscrowd) == (polygons, 102.5, 0)
    assert (second.segmentation, second.area, second.iscrowd) == (encoded, 20, 1)
    assert (third.segmentation, third.box, third.area) == ([polygons[0]], [4, 5, 20, 10], 100)


def test_boxes_beyond_the_image_are_clipped_and_empty_ones_left_out(folder):
    coco = content("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    for annotation, box in zip(coco["annotations"], ([70, 50, 20, 20], [90, 5, 5, 5], [4, 5, 0, 5], []), strict=True):
        annotation |= {"bbox": box, "segmentation": []}
    coco["annotations"][0]["segmentation"] = [[70, 50, 90, 50, 90, 70, 70, 70]]
    splits, notes = read(folder(**{"coco.json": coco, **{f"{stem}.jpg": None for stem in "abcd"}}))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [70, 50, 10, 10])]
    assert splits["train"][0].objects[0].area == 100
    assert notes == {
        "shape beyond the image, clipped at its edge": ["a.jpg annotation id 1"],
        "shape outside the image, left out": ["b.jpg annotation id 2"],
        "annotation without area, left out": ["c.jpg annotation id 3", "d.jpg annotation id 4"],
    }


def test_a_size_by_a_whole_factor_scales_everything_any_other_is_an_error(folder):
    coco = content("a.jpg", size=(160, 120))
    coco["annotations"][0]["segmentation"] = [[4, 5, 24, 5, 24, 15, 4, 15]]
    splits, _ = read(folder(**{"coco.json": coco, "a.jpg": None}))
    (seen,) = splits["train"][0].objects
    assert (seen.box, seen.area, seen.segmentation) == ([2, 2.5, 10, 5], 50, [[2, 2.5, 12, 2.5, 12, 7.5, 2, 7.5]])
    with pytest.raises(UserError, match="the image is 80 x 60 pixels, its annotation says 100 x 60"):
        read(folder(**{"coco.json": content("a.jpg", size=(100, 60))}))


@pytest.mark.parametrize("size", [(-1, -1), (None, None), ("80", "60"), (80.0, 60.0), (0, 0)])
def test_sizes_may_be_missing_or_text(folder, size):
    splits, notes = read(folder(**{"coco.json": content("a.jpg", size=size), "a.jpg": None}))
    assert (splits["train"][0].width, splits["train"][0].height) == (80, 60)
    assert not notes


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("image_id", 7, "annotation id 1: image_id 7 is not among the file's images"),
        ("image_id", None, "annotation id 1: image_id is missing"),
        ("category_id", 7, "annotation id 1: category_id 7 is not among the file's categories"),
        ("category_id", None, "annotation id 1: category_id is missing"),
        ("category_id", True, "annotation id 1: category_id is True"),
        ("bbox", [1, 2, 3], "is not a list of four numbers"),
        ("bbox", [1, 2, float("nan"), 4], "is not a list of four numbers"),
        ("bbox", {"x": 1}, "is not a list of four numbers"),
        ("bbox", [1, 2, -3, 4], "has a negative width or height"),
        ("iscrowd", 5, "iscrowd is 5, not 0 or 1"),
        ("segmentation", [[1, 2, 3]], "is not a list of polygons"),
        ("segmentation", [[1, 2, 3, 4, 5, "x"]], "is not a list of polygons"),
        ("segmentation", {"counts": [1], "size": [1, 1]}, "a mask of size"),
    ],
)
def test_a_broken_annotation_is_named(folder, key, value, complaint):
    coco = content("a.jpg")
    coco["annotations"][0][key] = value
    with pytest.raises(UserError, match=complaint) as error:
        read(folder(**{"coco.json": coco, "a.jpg": None}))
    assert "coco.json" in str(error.value)


def test_boxes_and_flags_may_be_text(folder):
    coco = content("a.jpg")
    coco["annotations"][0] |= {"bbox": ["4", "5.0", "20", "10"], "iscrowd": "0"}
    assert boxes(read(folder(**{"coco.json": coco, "a.jpg": None}))[0]["train"]) == [ONE]


def test_broken_sets_are_told(folder, tmp_path):
    with pytest.raises(UserError, match="no COCO annotation file"):
        read(tmp_path)
    folder(**{"a.json": content("a.jpg"), "b.json": content("a.jpg"), "a.jpg": None})
    with pytest.raises(UserError, match=r"several COCO files for train: a\.json, b\.json; name the one"):
        read(tmp_path)
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.json").rename(tmp_path / "val.json")
    with pytest.raises(UserError, match=r"val\.json: validation annotations but no training annotations"):
        read(tmp_path)
    twice = content("a.jpg", "b.jpg")
    twice["images"][1]["id"] = 1
    folder(**{"val.json": twice, "b.jpg": None})
    with pytest.raises(UserError, match=r"image number 2: id 1 appears twice"):
        read(tmp_path / "val.json")


def test_numbers_are_category_names_too(folder):
    coco = content("a.jpg", categories=[{"id": 1, "name": 0}])
    assert [category for _, category, _ in boxes(read(folder(**{"coco.json": coco, "a.jpg": None}))[0]["train"])] == ["0"]


def test_annotated_on_the_stored_pixels_is_found_out_by_the_size(folder):
    root = folder(**{"coco.json": content("a.jpg", "b.jpg", size=(80, 60))})
    for name, size in (("a.jpg", (80, 60)), ("b.jpg", (60, 80))):  # annotated as stored, and upright
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", size).save(root / name, exif=exif)
    splits, notes = read(root)
    assert [(image.width, image.height) for image in splits["train"]] == [(80, 60), (80, 60)]
    start = "image is turned by its EXIF tag; sizes and labels show that it was annotated on the"
    assert notes == {f"{start} stored pixels": ["a.jpg"], f"{start} upright image": ["b.jpg"]}
