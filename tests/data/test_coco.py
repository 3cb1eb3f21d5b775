import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.data.coco import CocoImages, Split, find_split, has_split, load_coco, read_coco
from raydetr.data.transforms import val_transforms
from raydetr.errors import UserError
from tests.data.coco_files import dataset, one_line, rewrite, settings, small


@pytest.fixture
def write(tmp_path):
    def write_coco(coco) -> Path:
        path = tmp_path / "a.json"
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return path

    return write_coco


def test_the_layout_of_the_field(coco_folder):
    root = coco_folder()
    assert find_split(settings(root), "train") == Split(root / "train2017", root / "annotations" / "custom_train.json")
    for split in ("train", "val"):
        (root / "annotations" / f"custom_{split}.json").rename(root / "annotations" / f"instances_{split}2017.json")
    assert find_split(settings(root), "val") == Split(root / "val2017", root / "annotations" / "instances_val2017.json")
    (root / "annotations" / "custom_val.json").write_text("{}")
    assert find_split(settings(root), "val").annotations.name == "custom_val.json"


def test_explicit_paths_come_first_and_need_no_layout(coco_folder, tmp_path):
    root = coco_folder()
    file = (root / "annotations" / "custom_val.json").rename(tmp_path / "mine.json")
    assert find_split(settings(root, val_annotations=file), "val") == Split(root / "val2017", file)
    images = (root / "val2017").rename(tmp_path / "pictures")
    assert find_split(settings(val_annotations=file, val_images=images), "val") == Split(images, file)
    assert find_split(settings("/nowhere", val_annotations=file, val_images=images), "val") == Split(images, file)


def test_what_is_missing_is_said_with_where_it_was_looked_for(coco_folder, tmp_path):
    root = coco_folder()
    (root / "annotations" / "custom_val.json").unlink()
    with pytest.raises(UserError) as error:
        find_split(settings(root), "val")
    assert str(root / "annotations" / "custom_val.json") in one_line(error)
    assert str(root / "annotations" / "instances_val2017.json") in one_line(error)
    (root / "train2017").rename(root / "pictures")
    with pytest.raises(UserError, match=r"train2017.*data\.train_images") as error:
        find_split(settings(root), "train")
    with pytest.raises(UserError, match=r"no folder .*nowhere") as error:
        find_split(settings(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=r"data\.path is not set"):
        find_split(settings(), "train")
    with pytest.raises(UserError, match=r"data\.path is not set"):
        find_split(settings(train_images=root), "train")
    with pytest.raises(UserError, match=r"gone\.json") as error:
        find_split(settings(root, val_annotations=tmp_path / "gone.json"), "val")
    assert one_line(error)


COCO_KEYS = '{"images": [], "annotations": [], "categories": []}'


@pytest.mark.parametrize(
    ("file", "content", "advice"),
    [
        ("train/_annotations.coco.json", COCO_KEYS, "_annotations.coco.json is in the format coco"),  # Roboflow
        ("annotations/instances_default.json", COCO_KEYS, "instances_default.json is in the format coco"),  # CVAT
        ("result.json", COCO_KEYS, "result.json is in the format coco"),  # Label Studio
        ("labels.json", COCO_KEYS, "labels.json is in the format coco"),
        ("data.yaml", "names: [a]", "data.yaml is in the format yolo"),
        ("Annotations/a.xml", "<annotation></annotation>", "Annotations/a.xml is in the format voc"),
    ],
)
def test_a_folder_in_another_format_is_said_how_to_convert(tmp_path, file, content, advice):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{advice}: raydetr data convert {tmp_path} NEW_FOLDER --from ")):
        find_split(settings(tmp_path), "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1, column 2: not valid JSON"),
        ('{"images": [],\n "annotations": [}', "line 2, column 18: not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ('{"images": ' + "1" * 5000 + "}", "not valid JSON"),
        ([{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}], r"a list of results \(detections\)"),
        ([1, 2], "a list of 2 entries"),
        ("3", "not a COCO annotation file"),
        ("null", "not a COCO annotation file"),
        ({"a.jpg123": {"filename": "a.jpg", "size": 123, "regions": []}}, "a VIA file.*raydetr data convert"),
        ({"_via_img_metadata": {}, "_via_settings": {}}, "a VIA file.*raydetr data convert"),
        ({"images": [], "annotations": []}, "'categories' is missing"),
        ({}, "'images' is missing"),
        (small(images={"a": 1}), "'images' is not a list of objects"),
        (small(annotations=[1]), "'annotations' is not a list of objects"),
    ],
)
def test_files_that_are_no_coco(write, content, message):
    path = write(content)
    with pytest.raises(UserError, match=message) as error:
        read_coco(path)
    assert one_line(error).startswith(str(path))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_coco(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(UserError, match="not valid JSON") as error:
        read_coco(tmp_path / "b.json")
    assert one_line(error)
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(small()).encode())  # as some Windows programs write
    assert read_coco(tmp_path / "c.json") == small()


def with_image(**changes):
    return small(images=[small()["images"][0], small()["images"][1] | changes])


def with_box(**changes):
    return small(annotations=[small()["annotations"][0], small()["annotations"][1] | changes])


@pytest.mark.parametrize(
    ("coco", "message"),
    [
        (small(images=[]), "there are no images"),
        (small(categories=[]), "there are no categories"),
        (small(annotations=[]), "none of the 2 images has a box"),
        (small(annotations=[small()["annotations"][0] | {"iscrowd": 1}]), "none of the 2 images has a box"),
        (with_image(id=1), "image id 1 is used twice"),
        (with_image(id="a2"), "id of image number 2 is 'a2'; it must be a whole number"),
        (with_image(id="1"), "image id 1 is used twice"),
        (with_image(id=2.5), "id of image number 2 is 2.5"),
        (with_image(id=None), "id of image number 2 is missing"),
        (with_image(id=True), "id of image number 2 is True"),
        (with_image(id=2**63), "id of image number 2 is 9223372036854775808"),
        (with_image(file_name="../../etc/passwd"), "image id 2: file name '../../etc/passwd' leads out of the image folder"),
        (with_image(file_name="/etc/passwd"), "image id 2: file name '/etc/passwd' leads out of the image folder"),
        (with_image(file_name=None), "image id 2: file name None is no file name"),
        (small(categories=[{"id": 5}]), "category id 5 has no name"),
        (small(categories=[{"id": 5, "name": " "}]), "category id 5 has no name"),
        (small(categories=[{"id": 5, "name": True}]), "category id 5 has no name"),
        (small(categories=[{"name": "thing"}]), "id of category number 1 is missing"),
        (small(categories=[{"id": "5.5", "name": "thing"}]), "id of category number 1 is '5.5'"),
        (small(categories=[{"id": 5, "name": "a"}, {"id": 5, "name": "b"}]), "category id 5 is used twice"),
        (with_box(image_id=99), "annotation id 12: image id 99 is not among"),
        (with_box(image_id="one"), "annotation id 12: image_id is 'one'"),
        (with_box(image_id=[1]), "annotation id 12: image_id is"),
        (with_box(category_id=6), "annotation id 12: category id 6 is not among"),
        (with_box(category_id=None), "annotation id 12: category_id is missing"),
        (with_box(bbox=None), r"annotation id 12: bbox None is not a list of four numbers"),
        (with_box(bbox=[1, 2, 3]), r"annotation id 12: bbox \[1, 2, 3\] is not a list of four numbers"),
        (with_box(bbox="1234"), "annotation id 12: bbox '1234' is not"),
        (with_box(bbox=[1, 2, "wide", 4]), "annotation id 12: bbox .* is not"),
        (with_box(bbox=[1, 2, None, 4]), "annotation id 12: bbox .* is not"),
        (with_box(iscrowd=2), "annotation id 12: iscrowd is 2"),
        (with_box(iscrowd="no"), "annotation id 12: iscrowd is 'no'"),
        (small(annotations=[{"image_id": 1, "category_id": 5}]), r"annotation number 1 \(without id\): bbox None"),
    ],
)
def test_what_would_make_training_fail_or_lie(write, coco, message):
    path = write(coco)
    with pytest.raises(UserError, match=message) as error:
        load_coco(path)
    assert one_line(error).startswith(str(path))


def test_annotations_are_numbered_from_one_whatever_the_file_says(write):
    boxes = [small()["annotations"][0] | {"id": number} for number in (0, 7, 7, "x")]
    coco, warnings = load_coco(write(small(annotations=boxes)))
    assert [box["id"] for box in coco["annotations"]] == [1, 2, 3, 4]
    assert warnings == []


def test_what_the_file_leaves_out_is_filled_in(write):
    box = {"image_id": 1, "category_id": 5, "bbox": [8, 8, 16, 12]}
    areas = [{}, {"area": 0}, {"area": -3}, {"area": math.nan}, {"area": None}, {"area": 77.5}, {"area": 1e400}]
    coco, warnings = load_coco(write(small(annotations=[box | area for area in areas])))
    assert [box["area"] for box in coco["annotations"]] == [192, 192, 192, 192, 192, 77.5, 192]
    assert all(box["iscrowd"] == 0 for box in coco["annotations"])
    assert warnings == []


@pytest.mark.parametrize(
    "bbox", [[10, 10, -5, 0], [10, 10, 5, 0], [10, 10, 0, 5], [10, 10, 5, -5], [math.nan, 1, 2, 3], [1, 2, math.inf, 3], [1, 2, 3, 10**400]]
)
def test_boxes_without_area_are_left_out_and_counted(write, bbox):
    good = small()["annotations"]
    bad = [good[0] | {"id": 30 + number, "bbox": bbox} for number in range(2)]
    coco, warnings = load_coco(write(small(annotations=[good[0], *bad, good[1]])))
    assert [box["bbox"] for box in coco["annotations"]] == [[8, 8, 16, 12]] * 2
    assert [box["id"] for box in coco["annotations"]] == [1, 2]
    (warning,) = warnings
    assert "2 annotations (first: annotation id 30) without area" in warning


@pytest.mark.parametrize("bbox", [[64, 0, 5, 5], [0, 48, 5, 5], [-5, 0, 5, 5], [0, -9, 5, 5], [1000, 1000, 5, 5]])
def test_boxes_outside_their_image_are_left_out_and_counted(write, bbox):
    coco, warnings = load_coco(write(with_box(bbox=bbox)))
    assert len(coco["annotations"]) == 1
    assert "1 annotation (first: annotation id 12) outside the image" in warnings[0]


def test_boxes_partly_outside_stay(write):
    coco, warnings = load_coco(write(with_box(bbox=[-5, -5, 6, 6])))
    assert coco["annotations"][1]["bbox"] == [-5, -5, 6, 6]
    assert warnings == []


def test_a_set_left_without_a_box_is_an_error(write):
    with pytest.raises(UserError, match="none of the 2 images has a box"):
        load_coco(write(small(annotations=[small()["annotations"][0] | {"bbox": [10, 10, -5, 0]}])))


def test_categories_come_in_order_of_their_ids(write):
    categories = [{"id": 9, "name": "z", "supercategory": "x"}, {"id": 0, "name": "a"}, {"id": 5, "name": "thing"}]
    coco, _ = load_coco(write(small(categories=categories)))
    assert coco["categories"] == [{"id": 0, "name": "a"}, {"id": 5, "name": "thing"}, {"id": 9, "name": "z"}]


def test_categories_of_one_name_are_warned_of(write):
    _, warnings = load_coco(write(small(categories=[{"id": 0, "name": "thing"}, {"id": 5, "name": "thing"}])))
    assert len(warnings) == 1
    assert "'thing'" in warnings[0]


def test_float_ids_of_whole_numbers_are_taken(write):
    coco, _ = load_coco(write(with_image(id=2.0)))
    assert [type(image["id"]) for image in coco["images"]] == [int, int]


def test_numbers_written_as_text_are_taken(write):
    coco = small()
    for image in coco["images"]:
        image.update(id=str(image["id"]), width="64", height="48.0")
    for box in coco["annotations"]:
        box.update(image_id=f" {box['image_id']}", category_id="5", bbox=["8", "8", "16", "12.5"], area="100", iscrowd="0")
    coco["categories"] = [{"id": "5", "name": 7}]
    loaded, warnings = load_coco(write(coco))
    assert not warnings
    assert [(image["id"], image["width"], image["height"]) for image in loaded["images"]] == [(1, 64, 48), (2, 64, 48)]
    expected = {"image_id": 1, "category_id": 5, "bbox": [8, 8, 16, 12.5], "area": 100, "iscrowd": 0}
    assert loaded["annotations"][0] == expected | {"id": 1}
    assert loaded["categories"] == [{"id": 5, "name": "7"}]


@pytest.mark.parametrize("text", ["x", "", "1_0", "0x5", "1e999", "nan", "5.5", "١"])
def test_text_that_is_no_whole_number_is_no_id(write, text):
    with pytest.raises(UserError, match="id of image number 2 is"):
        load_coco(write(with_image(id=text)))


def test_names_that_are_spelled_in_another_way_are_corrected_and_told(coco_folder):
    root = coco_folder()

    def change(coco):
        for image in coco["images"]:
            image["file_name"] = f"val2017\\{image['file_name'].upper()}"

    rewrite(root, change)
    val = dataset(root)
    assert [image["file_name"] for image in val.coco["images"]] == ["val_000.jpg", "val_001.jpg"]
    (warning,) = val.warnings
    assert "2 file names spelled in another way" in warning
    assert warning.endswith(r"(the first: 'val2017\\VAL_000.JPG' is val_000.jpg)")
    val[0]


def test_the_nearest_name_is_told_where_an_image_is_missing(coco_folder):
    root = coco_folder()
    rewrite(root, lambda coco: coco["images"][1].update(file_name="val_01.jpg"))
    with pytest.raises(UserError, match=r"the first is 'val_01.jpg' \(image id 11\); the nearest name there is val_001.jpg") as error:
        dataset(root)
    assert one_line(error)


def test_what_is_missing_can_be_left_to_the_reader(coco_folder):
    root = coco_folder()
    rewrite(root, lambda coco: coco["images"][0].update(file_name="VAL_000.jpg"))
    file = rewrite(root, lambda coco: coco["images"][1].update(file_name="gone.jpg"))
    coco, _ = load_coco(file, root / "val2017", must_exist=False)
    assert [image["file_name"] for image in coco["images"]] == ["val_000.jpg", "gone.jpg"]


def test_missing_pictures_are_counted_and_the_first_named(coco_folder):
    root = coco_folder(val=4)
    (root / "val2017" / "val_001.jpg").unlink()
    (root / "val2017" / "val_003.jpg").unlink()
    with pytest.raises(UserError, match=r"2 of 4 images are not in .*val2017, the first is 'val_001.jpg' \(image id 11\)") as error:
        dataset(root)
    assert one_line(error)


def test_a_picture_that_was_never_there(coco_folder):
    root = coco_folder()
    rewrite(root, lambda coco: coco["images"][0].update(file_name="sub/folder/a.jpg"))
    with pytest.raises(UserError, match=r"the first is 'sub/folder/a.jpg' \(image id 10\)"):
        dataset(root)


def test_pictures_in_subfolders_and_links(coco_folder, tmp_path):
    root = coco_folder()
    (root / "val2017" / "sub").mkdir()
    (root / "val2017" / "val_000.jpg").rename(root / "val2017" / "sub" / "a.jpg")
    (root / "val2017" / "val_001.jpg").rename(tmp_path / "elsewhere.jpg")
    (root / "val2017" / "val_001.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    rewrite(root, lambda coco: coco["images"][0].update(file_name="sub/a.jpg"))
    assert [target["image_id"].item() for _, target in dataset(root)] == [10, 11]


@pytest.mark.parametrize("sides", [{}, {"width": 0, "height": 0}, {"width": 96, "height": None}, {"width": "96", "height": math.nan}])
def test_sizes_that_are_missing_are_read_from_the_files(coco_folder, sides):
    root = coco_folder(val=3, size=(96, 64))

    def change(coco):
        for image in coco["images"][1:]:
            del image["width"], image["height"]
            image.update(sides)

    rewrite(root, change)
    val = dataset(root)
    assert [(image["width"], image["height"]) for image in val.coco["images"]] == [(96, 64)] * 3
    assert len(val.warnings) == 1
    assert "2 images (first: image id 11) without width and height" in val.warnings[0]
    assert val[1][1]["orig_size"].tolist() == [64, 96]


def test_a_picture_of_another_size_than_annotated_is_named(coco_folder):
    root = coco_folder()
    rewrite(root, lambda coco: coco["images"][1].update(width=640, height=480))
    val = dataset(root)
    val[0]
    with pytest.raises(UserError, match=r"val_001.jpg: the image is 96 x 64 pixels, its annotation says 640 x 480") as error:
        val[1]
    assert one_line(error)


def test_boxes_of_a_turned_picture(coco_folder):
    root = coco_folder(val=1, size=(96, 64))
    path = root / "val2017" / "val_000.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).copy().save(path, exif=exif)
    assert dataset(root)[0][1]["orig_size"].tolist() == [64, 96]
    rewrite(root, lambda coco: coco["images"][0].update(width=64, height=96))
    image, target = dataset(root)[0]
    assert target["orig_size"].tolist() == [96, 64]
    assert image.shape[1] > image.shape[2]


@pytest.mark.parametrize("annotated", [True, False])
@pytest.mark.parametrize(("size", "orientation"), [((96, 64), 3), ((64, 64), 6)])
def test_a_rotation_that_no_size_tells_is_undone_unless_the_setting_says_stored(coco_folder, size, orientation, annotated):
    root = coco_folder(val=1, size=size)
    path = root / "val2017" / "val_000.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(path).copy().save(path, exif=exif, quality=95)
    stored = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    turned = stored.rot90(2, (1, 2)) if orientation == 3 else stored.rot90(-1, (1, 2))
    if not annotated:
        rewrite(root, lambda coco: coco["images"][0].update(width=None, height=None))
    for exif_setting, expected in (("upright", turned), ("stored", stored)):
        val = CocoImages(find_split(settings(root, exif=exif_setting), "val"), lambda *pair: pair)
        assert torch.equal(val.images(*val.files[0]), expected)


@pytest.mark.parametrize(("exif", "size"), [("upright", [96, 64]), ("stored", [64, 96])])
def test_an_image_without_an_annotated_size_has_that_of_the_setting(coco_folder, exif, size):
    root = coco_folder(val=1, size=(96, 64))
    path = root / "val2017" / "val_000.jpg"
    tag = Image.Exif()
    tag[0x0112] = 6
    Image.open(path).copy().save(path, exif=tag)
    rewrite(root, lambda coco: coco["images"][0].update(width=None, height=None))
    val = CocoImages(find_split(settings(root, exif=exif), "val"), val_transforms(settings(root)))
    assert val[0][1]["orig_size"].tolist() == size


def test_a_test_set_is_found_where_the_others_are_and_need_not_be_there(coco_folder, tmp_path):
    root = coco_folder()
    assert not has_split(settings(root), "test")
    assert not has_split(settings(), "test")
    assert has_split(settings(root, test_annotations=tmp_path / "mine.json"), "test")
    (root / "annotations" / "custom_val.json").rename(root / "annotations" / "custom_test.json")
    assert has_split(settings(root), "test")  # not complete yet
    with pytest.raises(UserError, match=r"no test images: looked for the folder .*test2017; set data\.test_images"):
        find_split(settings(root), "test")
    (root / "val2017").rename(root / "test2017")
    assert find_split(settings(root), "test") == Split(root / "test2017", root / "annotations" / "custom_test.json")
