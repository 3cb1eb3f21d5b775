import itertools
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from torchvision import tv_tensors

from raydetr.config import load_config
from raydetr.data.coco import CocoImages, Split, build_loader, collate, draw_weights, find_split, has_split, load_coco, read_coco
from raydetr.data.formats.convert import convert
from raydetr.data.images import read_image
from raydetr.data.transforms import train_transforms, val_transforms
from raydetr.errors import UserError
from raydetr.evaluate.coco import coco_metrics


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def settings(folder=None, **leaves):
    layer = {f"data.{name}": str(value) for name, value in leaves.items()}
    return load_config({"model.preset": "detr_tiny", **({"data.path": str(folder)} if folder else {}), **layer}).data


def dataset(folder, split="val", transforms=None, images=read_image, **options) -> CocoImages:
    data = settings(folder)
    transforms = transforms or (train_transforms(data) if split == "train" else val_transforms(data))
    made = CocoImages(find_split(data, split), transforms, **options)
    made.images = images
    return made


def rewrite(folder, change, split="val") -> Path:
    """Lets ``change`` work on the split's COCO dict (or return another one), writes it back, and returns the file."""
    path = folder / "annotations" / f"custom_{split}.json"
    coco = json.loads(path.read_text())
    changed = change(coco)
    path.write_text(json.dumps(coco if changed is None else changed))
    return path


def small(**changes):
    """A COCO dict: two images (64 x 48), one box each."""
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48} for number in (1, 2)]
    boxes = [
        {"id": 10 + number, "image_id": number, "category_id": 5, "bbox": [8, 8, 16, 12], "area": 100, "iscrowd": 0} for number in (1, 2)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "thing"}]} | changes


@pytest.fixture
def write(tmp_path):
    def write_coco(coco) -> Path:
        path = tmp_path / "a.json"
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return path

    return write_coco


# --------------------------------------------------------------------------------------------------------- where it lies


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


# ---------------------------------------------------------------------------------------------------- the annotation file


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


# ------------------------------------------------------------------------------------------------- the file and the folder


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


# ------------------------------------------------------------------------------------------------------------ the data set


@pytest.fixture
def known(coco_folder):
    """One picture, 100 x 50, with boxes of two categories, a crowd, and one that reaches out of it; and one without any."""
    root = coco_folder(val=2, size=(100, 50), boxes=0)

    def change(coco):
        boxes = [([10, 5, 20, 10], 7, 0, 33), ([0, 0, 100, 50], 7, 1, 5000), ([90, 40, 20, 20], 3, 0, None), ([50, 25, 50, 25], 3, 0, None)]
        coco["annotations"] = [
            {"id": 0, "image_id": 11, "category_id": category, "bbox": bbox, "iscrowd": crowd, **({"area": area} if area else {})}
            for bbox, category, crowd, area in boxes
        ]

    rewrite(root, change)
    return root


def test_targets(known):
    val = dataset(known)
    assert val.categories == [{"id": 3, "name": "square"}, {"id": 7, "name": "oblong"}]
    assert val.image_ids == [10, 11]
    assert len(val) == 2
    image, target = dataset(known, transforms=val_transforms(settings(val_size=144, max_size=256)))[1]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    assert image.dtype == torch.float32
    assert image.shape == (3, 128, 256)  # 144 would make the long side exceed 256
    torch.testing.assert_close(
        target["boxes"], torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.95, 0.9, 0.1, 0.2], [0.75, 0.75, 0.5, 0.5]]), rtol=0, atol=1e-6
    )
    expected = {
        "labels": [1, 0, 0],
        "area": [33, 400, 1250],
        "iscrowd": [0, 0, 0],
        "image_id": [11],
        "orig_size": [50, 100],
        "size": [128, 256],
    }
    assert {name: target[name].tolist() for name in expected} == expected
    kinds = {"boxes": torch.float32, "area": torch.float32} | dict.fromkeys(
        ("labels", "iscrowd", "image_id", "orig_size", "size"), torch.int64
    )
    assert {name: target[name].dtype for name in target} == kinds


def test_crowds_are_for_evaluation_only(known):
    val = dataset(known)
    assert [box["iscrowd"] for box in val.coco["annotations"]] == [0, 1, 0, 0]
    assert [box["id"] for box in val.coco["annotations"]] == [1, 2, 3, 4]
    assert len(val[1][1]["labels"]) == 3


def test_a_picture_without_boxes(known):
    _, target = dataset(known)[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)
    train = dataset(known, transforms=train_transforms(settings(known)))
    for epoch in range(10):
        assert train[epoch, 0][1]["boxes"].shape == (0, 4)


def test_boxes_belong_to_their_picture_in_whatever_order_they_stand(coco_folder):
    root = coco_folder(val=5, boxes=2)
    expected = [target["boxes"] for _, target in dataset(root)]

    def change(coco):
        coco["images"].reverse()
        coco["annotations"] = coco["annotations"][::2] + coco["annotations"][1::2]

    rewrite(root, change)
    val = dataset(root)
    assert val.image_ids == [10, 11, 12, 13, 14]
    for (_, target), boxes in zip(val, expected, strict=True):
        assert torch.equal(target["boxes"], boxes)


def test_boxes_that_a_crop_empties_go_with_all_that_is_theirs(coco_folder):
    root = coco_folder(train=1, boxes=6, size=(300, 200))
    data = load_config({"model.preset": "detr_tiny", "data.crop": 1.0, "data.crop_min": 60, "data.crop_max": 90}).data
    train = dataset(root, "train", train_transforms(data))
    numbers = set()
    for epoch in range(30):
        _, target = train[epoch, 0]
        numbers.add(len(target["boxes"]))
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"]) == len(target["iscrowd"])
        assert (target["boxes"][:, 2:] > 0).all()
        corners = target["boxes"][:, :2] - target["boxes"][:, 2:] / 2, target["boxes"][:, :2] + target["boxes"][:, 2:] / 2
        assert corners[0].numel() == 0 or (corners[0].min() > -1e-6 and corners[1].max() < 1 + 1e-6)
    assert len(numbers) > 2


def test_labels_stay_with_their_boxes_through_crops(coco_folder):
    """Things of category 3 are red and those of 7 blue: the colour at a box's middle must be its label's."""
    root = coco_folder(train=1, boxes=0, size=(200, 100))
    pixels = np.full((100, 200, 3), 90, np.uint8)
    things = [(10, 40, 3), (150, 10, 7), (60, 50, 3), (110, 60, 7)]
    for x, y, category in things:
        pixels[y : y + 30, x : x + 30] = (255, 0, 0) if category == 3 else (0, 0, 255)
    Image.fromarray(pixels).save(root / "train2017" / "train_000.jpg", quality=100, subsampling=0)
    boxes = [{"image_id": 10, "category_id": category, "bbox": [x, y, 30, 30]} for x, y, category in things]
    rewrite(root, lambda coco: coco.update(annotations=boxes), "train")
    data = load_config({"model.preset": "detr_tiny", "data.crop": 1.0, "data.crop_resize": [100], "data.crop_min": 60}).data
    train, seen = dataset(root, "train", train_transforms(data)), set()
    for epoch in range(40):
        image, target = train[epoch, 0]
        for (cx, cy, width, height), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            if min(width * image.shape[2], height * image.shape[1]) < 4:
                continue
            red, _, blue = image[:, int(cy * image.shape[1]), int(cx * image.shape[2])].tolist()
            assert (red > blue) == (label == 0)
        seen.add(tuple(target["labels"].tolist()))
    assert {(1, 1), (0, 0, 1)} <= seen  # some boxes went, from the front and from the back


def test_perfect_predictions_score_one(known):
    """Also where the file counts annotations from 0 and holds boxes that nothing could find."""
    rewrite(known, lambda coco: coco["annotations"].append(coco["annotations"][0] | {"bbox": [10, 10, -5, 0]}))
    rewrite(known, lambda coco: coco["annotations"].append(coco["annotations"][0] | {"bbox": [200, 10, 5, 5], "area": 25}))
    coco = dataset(known).coco
    found = [box for box in coco["annotations"] if not box["iscrowd"]]
    results = [{"image_id": box["image_id"], "category_id": box["category_id"], "bbox": box["bbox"], "score": 0.9} for box in found]
    assert coco_metrics(coco, results)["AP"] == 1.0


def test_a_readers_pictures_are_used(coco_folder):
    asked = []

    def reader(path, size):
        asked.append((path.name, size))
        return read_image(path, size) // 2

    root = coco_folder()
    dark, _ = dataset(root, images=reader)[1]
    bright, _ = dataset(root)[1]
    assert asked == [("val_001.jpg", (96, 64))]
    assert dark.mean() < bright.mean()


# ------------------------------------------------------------------------------------------------ categories of a training


TRAINED = [{"id": 3, "name": "square"}, {"id": 4, "name": "round"}, {"id": 7, "name": "oblong"}]


def test_labels_follow_the_trained_order(known):
    val = dataset(known, categories=TRAINED)
    assert val.categories == val.coco["categories"] == TRAINED
    assert val[1][1]["labels"].tolist() == [2, 0, 0]
    assert val.warnings == []


def test_categories_with_other_ids_are_found_by_name(known):
    trained = [{"id": 1, "name": "Oblong "}, {"id": 2, "name": "square"}]
    val = dataset(known, categories=trained)
    assert val[1][1]["labels"].tolist() == [0, 1, 1]
    assert [box["category_id"] for box in val.coco["annotations"]] == [1, 1, 2, 2]
    assert len(val.warnings) == 1
    assert "2 categories have other ids than in training" in val.warnings[0]


def test_swapped_ids_are_not_mistaken(known):
    """The file's id 3 is the training's id 7 and the other way round: names decide."""
    val = dataset(known, categories=[{"id": 3, "name": "oblong"}, {"id": 7, "name": "square"}])
    assert val[1][1]["labels"].tolist() == [0, 1, 1]


def test_twins_keep_their_labels_whatever_their_ids_and_order(coco_folder):
    root = coco_folder(categories=({"id": 1, "name": "Box"}, {"id": 2, "name": "box"}))
    before = dataset(root)._labels.tolist()
    assert len(set(before)) == 2

    def swap(coco):
        coco["categories"] = [{"id": 1, "name": "box"}, {"id": 2, "name": "Box"}]
        for each in coco["annotations"]:
            each["category_id"] = 3 - each["category_id"]

    rewrite(root, swap)
    assert dataset(root, categories=[{"id": 1, "name": "Box"}, {"id": 2, "name": "box"}])._labels.tolist() == before


def test_a_category_that_resembles_two_trained_ones_is_refused(coco_folder):
    root = coco_folder(categories=({"id": 7, "name": "BOX"}, {"id": 8, "name": "other"}))
    trained = [{"id": 1, "name": "Box"}, {"id": 2, "name": "box"}, {"id": 3, "name": "other"}]
    with pytest.raises(UserError, match=r"category 'BOX' \(id 7, image id \d+\) cannot be told from 'Box', 'box'") as error:
        dataset(root, categories=trained)
    assert one_line(error)


def test_a_category_that_was_not_trained(known):
    with pytest.raises(UserError, match=r"category 'oblong' \(id 7, image id 11\) is not among .*\['square', 'round'\]") as error:
        dataset(known, categories=TRAINED[:2])
    assert one_line(error)
    rewrite(known, lambda coco: coco["categories"].append({"id": 99, "name": "never seen"}))
    assert len(dataset(known, categories=TRAINED).categories) == 3  # nothing is annotated with it


def test_names_that_repeat_are_told_apart_by_id(coco_folder):
    twins = ({"id": 0, "name": "thing"}, {"id": 1, "name": "thing"})
    root = coco_folder(val=8, categories=twins)
    expected = [target["labels"].tolist() for _, target in dataset(root)]
    assert {label for labels in expected for label in labels} == {0, 1}
    assert [target["labels"].tolist() for _, target in dataset(root, categories=list(twins))] == expected


# ----------------------------------------------------------------------------------------------------------------- draws


def same(first, second):
    return torch.equal(first[0], second[0]) and all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def test_a_draw_follows_from_seed_epoch_and_index(coco_folder):
    root = coco_folder(train=3)
    train, again, other = dataset(root, "train"), dataset(root, "train"), dataset(root, "train", seed=1)
    first = [train[index] for index in range(3)]
    assert all(same(first[index], again[index]) for index in (2, 0, 1))
    assert not all(same(first[index], other[index]) for index in range(3))
    again.set_epoch(1)
    second = [again[index] for index in range(3)]
    assert not all(same(a, b) for a, b in zip(first, second, strict=True))
    assert all(same(train[1, index], second[index]) for index in range(3))
    again.set_epoch(0)
    assert all(same(first[index], again[index]) for index in range(3))


def test_the_process_s_own_draws_are_left_alone(coco_folder):
    train = dataset(coco_folder(train=4), "train")
    loader = build_loader(train, 2, shuffle=True)
    state = torch.get_rng_state()
    list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_data_set_can_be_sent_to_another_process(coco_folder):
    train = dataset(coco_folder(), "train")
    assert same(pickle.loads(pickle.dumps(train))[2], train[2])


# --------------------------------------------------------------------------------------------------------------- batches


def test_collate_pads_to_the_largest():
    small_one, wide = torch.rand(3, 4, 5), torch.rand(3, 2, 7)
    targets = [{"labels": torch.tensor([1])}, {"labels": torch.tensor([2])}]
    images, mask, collated = collate([(small_one, targets[0]), (wide, targets[1])])
    assert images.shape == (2, 3, 4, 7)
    assert mask.shape == (2, 4, 7)
    assert mask.dtype == torch.bool
    assert collated == targets
    assert torch.equal(images[0, :, :, :5], small_one)
    assert torch.equal(images[1, :, :2], wide)
    assert not images[mask[:, None].expand_as(images)].any()
    assert mask.sum() == 4 * 2 + 2 * 7
    assert mask[0, :, 5:].all()
    assert mask[1, 2:].all()


def test_collate_has_no_mask_where_nothing_is_padded():
    images, mask, _ = collate([(torch.rand(3, 4, 5), {}), (torch.rand(3, 4, 5), {})])
    assert mask is None
    assert images.shape == (2, 3, 4, 5)
    assert collate([(torch.rand(3, 9, 5), {})])[1] is None


@pytest.mark.parametrize("pad_to", [1, 4, 64])
def test_the_sides_of_a_batch_are_rounded_up(pad_to):
    """Nothing but the size of the batch changes: pixels, targets, and what the mask says of them."""
    images = [torch.rand(3, 4, 5), torch.rand(3, 2, 7)]
    expected, expected_mask, _ = collate([(image, {}) for image in images])
    padded, mask, _ = collate([(image, {}) for image in images], pad_to)
    assert padded.shape[2:] == {1: (4, 7), 4: (4, 8), 64: (64, 64)}[pad_to]
    assert torch.equal(padded[:, :, :4, :7], expected)
    assert torch.equal(mask[:, :4, :7], expected_mask)
    assert mask[:, 4:].all()
    assert mask[:, :, 7:].all()
    assert not padded[mask[:, None].expand_as(padded)].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_loading_process_makes_its_batches_where_it_hands_them_over(dtype):
    batch = [((200 * torch.rand(3, height, 5)).to(dtype), {"labels": torch.tensor([1])}) for height in (4, 6)]
    plain, shared = collate(batch, 4), collate(batch, 4, share=True)
    for name, one, other in zip(("images", "mask"), plain, shared, strict=False):
        assert (one.is_shared(), other.is_shared()) == (False, True), name
        assert other.dtype == one.dtype
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("num_workers", "fits", "share"), [(0, True, False), (1, True, True), (1, False, None)])
def test_batches_are_shared_by_loading_processes_where_there_is_room(coco_folder, monkeypatch, num_workers, fits, share):
    monkeypatch.setattr("raydetr.data.coco.fits_shared_memory", lambda needed: fits)
    loader = build_loader(dataset(coco_folder(train=2), "train"), 2, num_workers=num_workers)
    assert loader.collate_fn.keywords.get("share") is share


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_rounds_sides_up(coco_folder, num_workers):
    train = dataset(coco_folder(train=2, size=(96, 64)), "train")
    ((images, mask, _),) = build_loader(train, 2, shuffle=True, num_workers=num_workers, pad_to=128)
    assert (images.shape[2] % 128, images.shape[3] % 128) == (0, 0)
    assert mask is not None


def ids_of(loader) -> list[list[int]]:
    return [[target["image_id"].item() for target in targets] for _, _, targets in loader]


def test_training_batches_are_shuffled_anew_every_epoch(coco_folder):
    train = dataset(coco_folder(train=10), "train")
    loader = build_loader(train, 2, shuffle=True, seed=3)
    first = ids_of(loader)
    assert [len(batch) for batch in first] == [2] * 5 == [2] * len(loader)
    assert sorted(itertools.chain(*first)) == list(range(10, 20))
    assert ids_of(loader) == first
    train.set_epoch(1)
    assert ids_of(loader) != first
    train.set_epoch(0)
    assert ids_of(loader) == first == ids_of(build_loader(train, 2, shuffle=True, seed=3))
    assert ids_of(build_loader(train, 2, shuffle=True, seed=4)) != first


def test_what_does_not_fill_a_training_batch_is_left_out(coco_folder):
    train = dataset(coco_folder(train=5), "train")
    assert [len(batch) for batch in ids_of(build_loader(train, 2, shuffle=True))] == [2, 2]


def test_fewer_images_than_a_batch_are_one_batch(coco_folder):
    train = dataset(coco_folder(train=3), "train")
    loader = build_loader(train, 8, shuffle=True)
    assert len(loader) == 1
    assert sorted(ids_of(loader)[0]) == [10, 11, 12]


@pytest.mark.parametrize(("images", "workers", "batch"), [(7, 2, 2), (8, 3, 2), (2, 3, 1), (3, 2, 4), (1, 4, 2)])
def test_every_training_worker_has_as_many_batches(coco_folder, images, workers, batch):
    train = dataset(coco_folder(train=images), "train")
    per_worker = [ids_of(build_loader(train, batch, rank, workers, shuffle=True)) for rank in range(workers)]
    shapes = {tuple(map(len, batches)) for batches in per_worker}
    assert len(shapes) == 1
    assert next(iter(shapes))  # at least one batch
    if images == 8:
        assert {image_id for batches in per_worker for each in batches for image_id in each} <= set(range(10, 18))


@pytest.fixture
def of_many_sizes(coco_folder):
    root = coco_folder(train=21)
    several = settings(root, train_sizes="32 48 64 80 96", crop=0.5, crop_resize="60 90", crop_min=30, crop_max=60)
    return dataset(root, "train", train_transforms(several))


def test_the_size_is_known_before_the_picture_is_read(of_many_sizes):
    sizes = {(epoch, index): of_many_sizes.size_of(epoch, index) for epoch in (0, 3) for index in range(21)}
    assert len(set(sizes.values())) > 10
    state = torch.get_rng_state()
    assert {each: tuple(of_many_sizes[each][0].shape[1:]) for each in sizes} == sizes
    assert torch.equal(torch.get_rng_state(), state)


def drawn(train, epoch, **options):
    """The epoch's batches of (epoch, index)."""
    train.set_epoch(epoch)
    return list(build_loader(train, 2, shuffle=True, **options).batch_sampler)


@pytest.mark.parametrize("window", [3, 64])
def test_batches_of_like_sizes_have_the_images_that_were_drawn(of_many_sizes, monkeypatch, window):
    monkeypatch.setattr("raydetr.data.coco.LikeSizes.window", window)
    for rank, epoch in itertools.product((0, 1), (0, 1)):
        share = {"rank": rank, "world_size": 2, "seed": 3}
        batches = drawn(of_many_sizes, epoch, group_sizes=True, **share)
        assert [len(batch) for batch in batches] == [2] * 5
        assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*drawn(of_many_sizes, epoch, **share)))
        assert batches == drawn(of_many_sizes, epoch, group_sizes=True, **share)
        assert batches != drawn(of_many_sizes, epoch, group_sizes=True, **share | {"seed": 4})


def test_batches_of_like_sizes_are_filled_up_less(of_many_sizes):
    def filled_up(group_sizes):
        sizes = [
            [of_many_sizes.size_of(*image) for image in batch]
            for epoch in range(4)
            for batch in drawn(of_many_sizes, epoch, group_sizes=group_sizes)
        ]
        return (
            sum(len(each) * max(height for height, _ in each) * max(width for _, width in each) for each in sizes)
            / sum(height * width for each in sizes for height, width in each)
            - 1
        )

    assert filled_up(True) < 0.6 * filled_up(False)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_evaluation_counts_every_image_once(coco_folder, workers):
    val = dataset(coco_folder(val=5))
    per_worker = [ids_of(build_loader(val, 2, rank, workers)) for rank in range(workers)]
    assert sorted(itertools.chain(*itertools.chain(*per_worker))) == [10, 11, 12, 13, 14]
    assert max(map(len, per_worker)) - min(map(len, per_worker)) <= 1
    assert per_worker == [ids_of(build_loader(val, 2, rank, workers)) for rank in range(workers)]


def test_evaluation_pads_nothing(coco_folder):
    """Photographs of different sizes never come together, so that what is predicted does not depend on the batch."""
    root = coco_folder(val=4)
    path = root / "val2017" / "val_001.jpg"
    Image.open(path).resize((60, 80)).save(path)
    rewrite(root, lambda coco: coco["images"][1].update(width=60, height=80))
    loader = build_loader(dataset(root), 3)
    assert ids_of(loader) == [[10, 12, 13], [11]]
    assert [mask for _, mask, _ in loader] == [None, None]


def test_loading_processes_change_nothing_and_hear_of_the_epoch(coco_folder):
    root = coco_folder(train=6)
    alone, helped = dataset(root, "train"), dataset(root, "train")
    loaders = build_loader(alone, 2, shuffle=True), build_loader(helped, 2, shuffle=True, num_workers=2)
    epochs = []
    state = torch.get_rng_state()
    for epoch in (0, 1, 5):
        alone.set_epoch(epoch)
        helped.set_epoch(epoch)
        batches = [list(loader) for loader in loaders]
        for (images, mask, targets), (images2, mask2, targets2) in zip(*batches, strict=True):
            assert torch.equal(images, images2)
            assert (mask is None and mask2 is None) or torch.equal(mask, mask2)
            assert all(same((images, a), (images2, b)) for a, b in zip(targets, targets2, strict=True))
        epochs.append(torch.cat([images.flatten() for images, _, _ in batches[1]]))
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(each[:5000].tolist()) for each in epochs}) == 3


def test_an_epoch_that_was_broken_off_does_not_reach_into_the_next(coco_folder):
    train = dataset(coco_folder(train=8), "train")
    loader = build_loader(train, 2, shuffle=True, num_workers=1)
    next(iter(loader))
    train.set_epoch(1)
    got = list(loader)
    expected = list(build_loader(train, 2, shuffle=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, expected, strict=True))


class InWorker:
    """A reader that tells whether it runs in a loading process."""

    def __call__(self, path, size):
        return torch.full((3, size[1], size[0]), 255 if get_worker_info() else 0, dtype=torch.uint8)


def test_pictures_are_read_in_loading_processes(coco_folder):
    val = dataset(coco_folder(), images=InWorker())
    assert next(iter(build_loader(val, 1, num_workers=1)))[0].min() > 0
    assert next(iter(build_loader(val, 1)))[0].max() < 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_picture_is_named_in_one_line(coco_folder, num_workers):
    root = coco_folder(val=3)
    path = root / "val2017" / "val_001.jpg"
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError) as error:
        list(build_loader(dataset(root), 1, num_workers=num_workers))
    assert one_line(error).startswith(f"{path}: broken or truncated image")


# -------------------------------------------------------------------------------------------------------- real photographs


def test_the_balloons(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "coco", category="balloon")
    val, train = dataset(tmp_path / "coco"), dataset(tmp_path / "coco", "train")
    assert (len(train), len(val)) == (61, 13)
    assert val.warnings == []
    assert val.categories == train.categories
    assert [category["name"] for category in val.categories] == ["balloon"]
    image, target = val[0]
    assert torch.isfinite(image).all()
    assert len(target["boxes"]) > 0
    for index in range(0, 61, 12):
        image, target = train[index]
        assert target["size"].tolist() == list(image.shape[1:])
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= 1).all()


def test_boxes_of_real_photographs_survive_the_way_there_and_back(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "coco", category="balloon")
    val = dataset(tmp_path / "coco")
    by_image = {image_id: [] for image_id in val.image_ids}
    for box in val.coco["annotations"]:
        by_image[box["image_id"]].append(box["bbox"])
    for _, target in val:
        height, width = target["orig_size"].tolist()
        cx, cy, w, h = (target["boxes"].double() * torch.tensor([width, height, width, height])).unbind(1)
        xywh = torch.stack([cx - w / 2, cy - h / 2, w, h], 1).numpy()
        stated = np.array(by_image[target["image_id"].item()])
        x1y1 = np.maximum(stated[:, :2], 0)
        x2y2 = np.minimum(stated[:, :2] + stated[:, 2:], [width, height])
        assert np.abs(xywh - np.hstack([x1y1, x2y2 - x1y1])).max() < 1e-3


def test_transforms_get_what_torchvision_knows(known):
    """Any v2 transform can take the place of ours."""
    got = []
    val = dataset(known, transforms=lambda image, boxes: (got.append((image, boxes)), (image.float(), boxes))[1])
    val[1]
    image, boxes = got[0]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8
    assert boxes.canvas_size == (50, 100)
    assert boxes[1].tolist() == [90, 40, 100, 50]  # clipped to the picture


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


KILLED = """
import multiprocessing, threading, time, torch
from raydetr.data.coco import Loader

class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return index

def load():  # as in a trial of a search, which does not run in its process's main thread
    try:
        for _ in Loader(Stuck(), batch_size=1, num_workers=1, timeout=600):
            for process in multiprocessing.active_children():
                process.kill()
    except RuntimeError as error:
        print(error)

thread = threading.Thread(target=load)
thread.start()
thread.join()
"""


def test_a_killed_loading_process_is_noticed_in_any_thread():
    # In a process of its own: where the main thread has loaded before, torch tells that one instead.
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120, check=True)
    assert "exited unexpectedly" in done.stdout


def test_images_of_rare_categories_are_drawn_more_often(coco_folder):
    counts = np.array([[2, 0]] * 9 + [[1, 1]])
    weights = draw_weights(counts, 0.4)
    assert weights.tolist() == [1.0] * 9 + [2.0]
    assert draw_weights(counts, 0.05).tolist() == [1.0] * 10
    assert draw_weights(np.zeros((3, 2), int), 0.5).tolist() == [1.0] * 3
    train = dataset(coco_folder(train=10), "train")
    drawn_per_epoch = []
    for epoch in range(20):
        train.set_epoch(epoch)
        batches = [list(build_loader(train, 2, rank, 2, shuffle=True, weights=weights).batch_sampler) for rank in (0, 1)]
        ids = [index for worker in batches for batch in worker for _, index in batch]
        assert len(ids) == 8, "as many as without, two workers with two whole batches each"
        draws = [image for worker in batches for batch in worker for image in batch]
        assert len(set(draws)) == len(draws), "an image that is drawn twice in an epoch is transformed in two ways"
        drawn_per_epoch.append(ids)
    assert 1.4 < np.mean([ids.count(9) for ids in drawn_per_epoch]) < 2.2, "2 of 11 shares of ten images, of which eight are used"
    assert len({tuple(ids) for ids in drawn_per_epoch}) == 20
    assert any(len(set(ids)) < len(ids) for ids in drawn_per_epoch)
    one = build_loader(train, 2, shuffle=True, weights=np.ones(10)).batch_sampler
    assert sorted(index for batch in one for _, index in batch) == list(range(10))
