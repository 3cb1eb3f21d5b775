import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from raydetr.config import Data, load_config
from raydetr.data import coco
from raydetr.data.check.check import check
from raydetr.data.coco import find_split, load_coco
from raydetr.data.formats.convert import convert
from raydetr.errors import UserError


def found(findings):
    return {(finding.split, finding.what): finding.occurrences for finding in findings}


def whats(findings):
    return [finding.what for finding in findings]


def test_a_sound_folder_has_nothing_to_complain_of(coco_folder):
    report = check(coco_folder(train=5, val=3, boxes=4))
    assert report.ok
    assert not report.errors
    assert whats(report.warnings) == ["category ids have gaps: 2 ids from 3 to 7", "category ids have gaps: 2 ids from 3 to 7"]
    assert report.text().splitlines()[-1] == "Ready to train, 2 warnings"


def test_settings_and_folders_are_the_same_to_it(coco_folder):
    root = coco_folder()
    assert check(root).stats == check(str(root)).stats == check(Data(path=str(root))).stats


# Each: what is changed in the train file, the error's words, and what its place must name.
ERRORS = {
    "image missing": (lambda c, d: (d / "train_001.jpg").unlink(), "image is missing", ["train_001.jpg", "image id 11"]),
    "image of no kind": (lambda c, d: (d / "train_001.jpg").write_text("x"), "image cannot be read", ["train_001.jpg"]),
    "image empty": (lambda c, d: (d / "train_001.jpg").write_bytes(b""), "image cannot be read", ["train_001.jpg"]),
    "image a folder": (lambda c, d: ((d / "train_001.jpg").unlink(), (d / "train_001.jpg").mkdir()), "image is missing", ["train_001.jpg"]),
    "other size": (
        lambda c, d: c["images"][1].update(width=640),
        "image has another size than its annotation says",
        ["train_001.jpg", "640 x 64 annotated, 96 x 64 in the file"],
    ),
    "name leads out": (
        lambda c, d: c["images"][1].update(file_name="../../etc/passwd"),
        "file name leads out of the image folder or is none",
        ["../../etc/passwd", "image id 11"],
    ),
    "name absolute": (
        lambda c, d: c["images"][1].update(file_name="/etc/passwd"),
        "file name leads out of the image folder or is none",
        ["/etc/passwd"],
    ),
    "name missing": (lambda c, d: c["images"][1].pop("file_name"), "file name leads out of the image folder or is none", ["image id 11"]),
    "name a list": (lambda c, d: c["images"][1].update(file_name=["a"]), "file name leads out of the image folder or is none", ["['a']"]),
    "name too long": (lambda c, d: c["images"][1].update(file_name="a" * 5000), "image is missing", ["image id 11"]),
    "image id twice": (
        lambda c, d: c["images"][1].update(id=10),
        "image id is used twice",
        ["train_001.jpg (image id 10) and train_000.jpg (image id 10)"],
    ),
    "image id text": (lambda c, d: c["images"][1].update(id="x"), "image id is no whole number", ["'x'", "image number 2"]),
    "image id missing": (lambda c, d: c["images"][1].pop("id"), "image id is no whole number", ["train_001.jpg"]),
    "image id huge": (lambda c, d: c["images"][1].update(id=2**63), "image id is no whole number", ["train_001.jpg"]),
    "no images": (lambda c, d: c.update(images=[]), "there are no images", []),
    "category id twice": (lambda c, d: c["categories"][1].update(id=3), "category id is used twice", ["3"]),
    "category id missing": (lambda c, d: c["categories"][1].pop("id"), "category id is no whole number", ["category number 2"]),
    "category without name": (lambda c, d: c["categories"][1].pop("name"), "category has no name", ["category id 7"]),
    "category with an empty name": (lambda c, d: c["categories"][1].update(name=" "), "category has no name", ["category id 7"]),
    "no categories": (lambda c, d: c.update(categories=[]), "there are no categories", []),
    "unknown category": (
        lambda c, d: c["annotations"][2].update(category_id=5),
        "annotation has an unknown category",
        ["annotation id 3", "train_000.jpg", "category id 5"],
    ),
    "category a list": (lambda c, d: c["annotations"][2].update(category_id=[3]), "annotation has an unknown category", ["[3]"]),
    "unknown image": (
        lambda c, d: c["annotations"][2].update(image_id=99),
        "annotation belongs to an image that is not in the file",
        ["annotation id 3", "image id 99"],
    ),
    "image id of an annotation missing": (
        lambda c, d: c["annotations"][2].pop("image_id"),
        "annotation belongs to an image that is not in the file",
        ["annotation id 3", "None"],
    ),
    "annotation id twice": (lambda c, d: c["annotations"][2].update(id=1), "annotation id is used twice", ["annotation id 1"]),
    "negative box": (
        lambda c, d: c["annotations"][2].update(bbox=[10, 10, -5, 0]),
        "box has a negative width or height",
        ["annotation id 3", "train_000.jpg", "[10, 10, -5, 0]"],
    ),
    "NaN box": (
        lambda c, d: c["annotations"][2].update(bbox=[10, float("nan"), 5, 5]),
        "box has a value that is no finite number",
        ["annotation id 3", "nan"],
    ),
    "infinite box": (
        lambda c, d: c["annotations"][2].update(bbox=[10, 10, float("inf"), 5]),
        "box has a value that is no finite number",
        ["annotation id 3"],
    ),
    "endless box": (lambda c, d: c["annotations"][2].update(bbox=[10**400, 1, 5, 5]), "box has a value that is no finite number", ["id 3"]),
    "outside to the right": (
        lambda c, d: c["annotations"][2].update(bbox=[96, 10, 5, 5]),
        "box is outside its image",
        ["annotation id 3", "[96, 10, 5, 5] of 96 x 64"],
    ),
    "outside above": (lambda c, d: c["annotations"][2].update(bbox=[9, -10, 5, 10]), "box is outside its image", ["annotation id 3"]),
    "box of three": (lambda c, d: c["annotations"][2].update(bbox=[1, 2, 3]), "box is not four numbers", ["annotation id 3", "[1, 2, 3]"]),
    "box of text": (lambda c, d: c["annotations"][2].update(bbox=["one", 2, 3, 4]), "box is not four numbers", ["annotation id 3"]),
    "box missing": (lambda c, d: c["annotations"][2].pop("bbox"), "box is not four numbers", ["annotation id 3", "None"]),
    "box a dict": (lambda c, d: c["annotations"][2].update(bbox={"x": 1}), "box is not four numbers", ["annotation id 3"]),
    "crowd of text": (lambda c, d: c["annotations"][2].update(iscrowd="no"), "iscrowd is neither 0 nor 1", ["annotation id 3", "'no'"]),
    "no boxes": (lambda c, d: c.update(annotations=[]), "no image has a box that can be used", []),
    "only crowds": (
        lambda c, d: [each.update(iscrowd=1) for each in c["annotations"]],
        "no image has a box that can be used",
        [],
    ),
}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ERRORS)
def test_errors(broken, name, quick):
    change, what, names = ERRORS[name]
    report = check(broken(change), quick=quick)
    assert not report.ok
    places = found(report.errors)[("train", what)]
    assert len(places) <= 1 or name == "no categories"
    for each in names:
        assert each in places[0]
    text = report.text()
    assert what in " ".join(text.split())
    assert text.splitlines()[-1].startswith("NOT ready to train")


WARNINGS = {
    "annotation id 0": (lambda c, d: c["annotations"][2].update(id=0), "annotation id is 0", ["annotation id 0 in train_000.jpg"]),
    "annotation id missing": (
        lambda c, d: c["annotations"][2].pop("id"),
        "annotation has no whole number as id",
        ["annotation number 3 in train_000.jpg"],
    ),
    "empty box": (
        lambda c, d: c["annotations"][2].update(bbox=[10, 10, 0, 5]),
        "box is empty (no width or no height)",
        ["annotation id 3", "[10, 10, 0, 5]"],
    ),
    "beyond": (
        lambda c, d: c["annotations"][2].update(bbox=[90, 10, 20, 20], area=400),
        "box reaches beyond its image",
        ["annotation id 3", "[90, 10, 20, 20] of 96 x 64"],
    ),
    "speck": (
        lambda c, d: c["annotations"][2].update(bbox=[9, 9, 0.5, 9], area=4.5),
        "box is one pixel wide or high, or less",
        ["annotation id 3"],
    ),
    "area missing": (lambda c, d: c["annotations"][2].pop("area"), "annotation has no area", ["annotation id 3"]),
    "area NaN": (lambda c, d: c["annotations"][2].update(area=float("nan")), "annotation has no area", ["annotation id 3"]),
    "area too large": (lambda c, d: c["annotations"][2].update(area=5000), "area is larger than the box", ["annotation id 3", "5000"]),
    "size missing": (lambda c, d: c["images"][1].pop("width"), "image has no width and height", ["train_001.jpg"]),
    "size none": (lambda c, d: c["images"][1].update(height=0), "image has no width and height", ["train_001.jpg"]),
    "crowd": (lambda c, d: c["annotations"][2].update(iscrowd=1), "crowd region", ["annotation id 3"]),
    "category name twice": (lambda c, d: c["categories"][1].update(name="square"), "category name is used twice", ["'square'"]),
    "file twice": (
        lambda c, d: c["images"].append(c["images"][1] | {"id": 99}),
        "file is listed as several images",
        ["train_001.jpg"],
    ),
    "box twice": (
        lambda c, d: c["annotations"].append(c["annotations"][2] | {"id": 99}),
        "box is there twice",
        ["annotation id 99 in train_000.jpg"],
    ),
}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(broken, name, quick):
    change, what, names = WARNINGS[name]
    report = check(broken(change), quick=quick)
    (place,) = found(report.warnings)[("train", what)]
    for each in names:
        assert each in place
    assert not [finding for finding in report.errors if finding.split == "train"]
    assert what in " ".join(report.text().split())


@pytest.mark.parametrize("name", [*ERRORS, *WARNINGS])
def test_what_the_check_passes_loads_for_training(broken, name):
    change, *_ = (ERRORS | WARNINGS)[name]
    root = broken(change)
    if check(root, quick=True).ok:
        split = find_split(Data(path=str(root)), "train")
        coco, _ = load_coco(split.annotations, split.images)
        assert coco["annotations"]
    else:
        assert name in ERRORS or name == "category name twice"  # whose square is then unknown to val


def test_numbers_are_forgiven_their_point(broken):
    def change(coco, _):
        coco["images"][0]["id"] = 10.0
        coco["annotations"][0].update(id=1.0, image_id=10.0, category_id=float(coco["annotations"][0]["category_id"]))

    assert check(broken(change)).ok


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        '"text"',
        "[" * 100000,
        '{"images": [], "annotations": []}',
        '{"images": {}, "annotations": [], "categories": []}',
        '{"images": [1], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [null], "categories": []}',
        '{"images": null, "annotations": 3, "categories": "x"}',
        '{"a.jpg12": {"filename": "a.jpg", "size": 12, "regions": []}}',
        '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]',
    ],
)
def test_a_file_of_another_kind_is_one_error_and_the_other_split_is_checked(coco_folder, content):
    root = coco_folder()
    (root / "annotations" / "custom_train.json").write_text(content)
    report = check(root)
    (error,) = report.errors
    assert "custom_train.json" in str(error)
    assert "\n" not in str(error)
    assert list(report.stats) == ["val"]


def test_a_file_in_another_encoding_is_an_error(coco_folder):
    root = coco_folder()
    (root / "annotations" / "custom_val.json").write_bytes('{"é": 1}'.encode("latin-1"))
    assert "custom_val.json" in str(check(root).errors[0])


@pytest.mark.parametrize("part", ["annotations/custom_val.json", "val2017"])
def test_a_missing_part_is_an_error(coco_folder, part):
    root = coco_folder()
    os.rename(root / part, root / "elsewhere")
    report = check(root)
    (error,) = report.errors
    assert error.split == "val"
    assert str(root / part) in str(error)
    assert report.stats["train"]["images"] == 4


def test_where_there_is_nothing_to_check_one_line_says_so(tmp_path):
    for data in (tmp_path / "gone", tmp_path, Data()):
        with pytest.raises(UserError) as error:
            check(data)
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ pictures


def noise(seed, size=(96, 64)):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def test_a_truncated_picture_is_found_by_the_full_check_alone(broken):
    def change(_, folder):
        noise(0).save(folder / "train_001.jpg", quality=95)
        content = (folder / "train_001.jpg").read_bytes()
        (folder / "train_001.jpg").write_bytes(content[: len(content) * 2 // 3])

    root = broken(change)
    assert check(root, quick=True).ok
    report = check(root)
    (place,) = found(report.errors)[("train", "image is broken or truncated")]
    assert "train_001.jpg (image id 11): broken or truncated image" in place
    assert "no image was decoded" in check(root, quick=True).text()
    assert "no image was decoded" not in report.text()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "I;16", "RGBA", "LA", "1"])
def test_pictures_of_every_kind_pass(broken, mode):
    def change(coco, folder):
        picture = Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96)) if mode == "I;16" else noise(0).convert(mode)
        name = "other.tif" if mode == "CMYK" else "other.png"
        picture.save(folder / name)
        coco["images"][1]["file_name"] = name

    assert check(broken(change)).ok


@pytest.mark.parametrize(
    ("annotated", "seen"), [((96, 64), "as stored"), ((64, 96), "turned upright"), ((None, None), "turned upright"), ((80, 80), None)]
)
def test_a_picture_with_an_exif_rotation(broken, annotated, seen):
    def change(coco, folder):
        exif = Image.Exif()
        exif[0x0112] = 6
        noise(0).save(folder / "train_001.jpg", exif=exif)
        coco["images"][1].update(zip(("width", "height"), annotated, strict=True))
        coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != 11]

    report = check(broken(change))
    if seen is None:
        assert whats(report.errors) == ["image has another size than its annotation says"]
        return
    assert report.ok
    (finding,) = (each for each in report.warnings if "EXIF" in each.what)
    assert finding.what.endswith(seen)
    assert finding.occurrences == ["train_001.jpg (image id 11), orientation 6"]


@pytest.mark.parametrize(("exif", "seen", "other"), [("upright", "turned upright", "stored"), ("stored", "as stored", "upright")])
@pytest.mark.parametrize(("size", "orientation"), [((96, 64), 3), ((96, 64), 2), ((64, 64), 6)])
def test_where_the_size_cannot_tell_a_rotation_the_check_says_so_and_names_the_setting(broken, size, orientation, exif, seen, other):
    def change(coco, folder):
        tag = Image.Exif()
        tag[0x0112] = orientation
        noise(0, size).save(folder / "train_001.jpg", exif=tag)
        coco["images"][1].update(width=size[0], height=size[1])
        coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != 11]

    report = check(Data(path=str(broken(change)), exif=exif))
    (finding,) = (each for each in report.warnings if "EXIF" in each.what)
    assert "its size is the same either way" in finding.what
    assert finding.what.endswith(seen)
    assert finding.advice.endswith(f"set data.exif: {other}")


@pytest.mark.parametrize(
    ("name", "what", "occurrence"),
    [
        (
            "sub\\train_001.jpg",
            "file name is spelled in another way in the image folder",
            "sub\\train_001.jpg (image id 11) is train_001.jpg",
        ),
        ("train_01.jpg", "image is missing", "train_01.jpg (image id 11): the nearest name there is train_001.jpg"),
        ("unlike.png", "image is missing", "unlike.png (image id 11)"),
    ],
)
def test_a_name_that_is_not_there_is_found_or_its_nearest_is_named(broken, name, what, occurrence):
    report = check(broken(lambda coco, _: coco["images"][1].update(file_name=name)))
    assert found([*report.errors, *report.warnings])[("train", what)] == [occurrence]


def test_an_image_that_is_too_large_is_an_error_that_names_the_setting(broken):
    def change(coco, folder):
        Image.new("1", (1200, 1000)).save(folder / "large.png")
        coco["images"][1].update(file_name="large.png", width=1200, height=1000)

    root = broken(change)
    assert check(root).ok
    (place,) = found(check(Data(path=str(root), max_megapixels=1)).errors)[("train", "image cannot be read")]
    assert "data.max_megapixels (1)" in place


# ---------------------------------------------------------------------------------------------------------- box formats


def as_corners(x, y, w, h, *_):
    return [x, y, x + w, y + h]


def as_fractions(x, y, w, h, *_):
    return [x / 96, y / 64, w / 96, h / 64]


def as_fractions_of_corners(x, y, w, h, *_):
    return as_fractions(*as_corners(x, y, w, h))


def as_centers(x, y, w, h, *_):
    return [x + w / 2, y + h / 2, w, h]


CORNERS, FRACTIONS, CENTERS = "[x1, y1, x2, y2]", "fractions of the image", "[center x, center y"


@pytest.mark.parametrize("areas", [True, False])
@pytest.mark.parametrize(
    ("written", "told"),
    [(as_corners, CORNERS), (as_fractions, FRACTIONS), (as_fractions_of_corners, FRACTIONS), (as_centers, CENTERS)],
)
def test_boxes_in_another_format_are_recognized_and_the_first_warning(broken, written, told, areas):
    def change(coco, _):
        for number, each in enumerate(coco["annotations"]):
            box = [60 - number, 30, 30 + number, 30] if number % 2 else [8, 6, 20, 30]
            each.update(bbox=written(*box), area=box[2] * box[3])
            if not areas:
                each.pop("area")

    report = check(broken(change, train=5, boxes=3), quick=True)
    assert told in report.warnings[0].what
    assert report.warnings[0].split == "train"
    assert [each for each in report.warnings if "look like" in each.what] == report.warnings[:1]  # of val: nothing
    assert "look like" in report.summary()[1]


def test_percentages_are_recognized(coco_folder):
    root = coco_folder(train=4, val=1, boxes=3, size=(400, 300))
    file = root / "annotations" / "custom_train.json"
    content = json.loads(file.read_text())
    for number, each in enumerate(content["annotations"]):
        each["bbox"] = [10 + 5 * number, 5 + 5 * number, 20.5, 30]
    file.write_text(json.dumps(content))
    assert "percentages of the image" in check(root, quick=True).warnings[0].what


@pytest.mark.parametrize(
    "boxes",
    [
        [[10, 10, 60, 40], [20, 5, 70, 50], [0, 0, 96, 64]],  # could be corners, but nothing is impossible as they stand
        [[0, 0, 1, 1], [0, 0, 1, 1]],  # specks of a pixel are no fractions
        [[10, 10, 20, 20], [80, 50, 30, 30], [20, 20, 10, 10], [30, 30, 5, 9]],  # one slip is no format
        [[8, 6, 20, 30]],
    ],
)
def test_sound_boxes_are_not_taken_for_another_format(broken, boxes):
    def change(coco, _):
        coco["annotations"] = [
            {"id": number, "image_id": 10, "category_id": 3, "bbox": box, "area": box[2] * box[3]} for number, box in enumerate(boxes, 1)
        ]

    assert not [each for each in check(broken(change)).warnings if "look like" in each.what]


# ----------------------------------------------------------------------------------------------------- twins and exports


@pytest.mark.parametrize(
    ("names", "what", "occurrence"),
    [
        (("Box", "box"), "category names differ by case or spaces only", "'Box' and 'box'"),
        (("STRASSE", "Straße"), "category names differ by case or spaces only", "'STRASSE' and 'Straße'"),
        (("box", "box "), "category names differ by case or spaces only", "'box' and 'box '"),
        (("box", "box"), "category name is used twice", "'box'"),
    ],
)
def test_twins_are_warned_of_and_counted_apart(coco_folder, names, what, occurrence):
    root = coco_folder(train=2, val=2)
    for split in ("train", "val"):
        relabel(root, split, list(enumerate(names, 1)), [1, 2])
    report = check(root)
    assert report.ok
    assert found(report.warnings) == {("train", what): [occurrence], ("val", what): [occurrence]}
    assert [each["boxes"] for each in report.stats["train"]["categories"].values()] == [3, 3]


def test_a_category_that_two_of_train_resemble_is_not_merged_with_either(coco_folder):
    root = coco_folder(train=2, val=2)
    relabel(root, "train", [(1, "Box"), (2, "box")], [1, 2])
    relabel(root, "val", [(7, "BOX")], [7])
    assert found(check(root).errors) == {("val", "category is not in the training file"): ["'BOX' (it cannot be told from 'Box', 'box')"]}


@pytest.mark.parametrize(
    "file",
    [
        "train/_annotations.coco.json",  # Roboflow
        "_annotations.coco.json",
        "annotations/instances_default.json",  # CVAT
        "result.json",  # Label Studio
    ],
)
def test_a_coco_export_is_recognized_and_the_command_that_converts_it_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match=rf"{file} is in the format coco: raydetr data convert {tmp_path} NEW_FOLDER --from coco") as error:
        check(tmp_path)
    assert "\n" not in str(error.value)


def test_a_data_set_that_lacks_a_split_is_not_to_be_converted(coco_folder):
    root = coco_folder(train=2, val=2)
    (root / "annotations" / "custom_val.json").unlink()
    (finding,) = check(root).errors
    assert "set data.val_annotations" in finding.what
    assert "NEW_FOLDER" not in finding.what


# -------------------------------------------------------------------------------------------------------------- summary


def test_numbers_written_as_text_are_a_minor_warning(broken):
    def change(coco, _):
        for each in coco["images"]:
            each.update(id=str(each["id"]), width=str(each["width"]))
        for each in coco["annotations"]:
            each.update(
                image_id=str(each["image_id"]), category_id=str(each["category_id"]), bbox=list(map(str, each["bbox"])), iscrowd="0"
            )

    report = check(broken(change))
    assert report.ok
    assert {finding.what for finding in report.warnings if finding.split == "train"} >= {
        "image id is text",
        "image id or category id of an annotation is text",
    }
    assert report.summary() == [f"data: {len(report.warnings)} warnings; `raydetr data check` tells all"]


def test_the_summary_counts_the_warnings_and_shows_the_worst_first(broken):
    def change(coco, _):
        coco["annotations"][0].update(bbox=[5, 5, 0.5, 9], area=4.5)
        coco["images"][1].pop("width")

    first, *others = check(broken(change), quick=True).summary()
    assert first == "data: 4 warnings; `raydetr data check` tells all"
    (line,) = others  # what has no effect on a training is counted only
    assert line.startswith("warning: train: box is one pixel wide or high, or less")
    assert "\n" not in line


def test_a_training_shows_the_number_of_warnings_and_the_worst(broken, capsys):
    from raydetr.launch.train import check_data

    def change(coco, _):
        for each in coco["annotations"]:
            x, y, w, h = each["bbox"]
            each["bbox"] = [x / 96, y / 64, w / 96, h / 64]

    check_data(load_config({"data.path": str(broken(change))}))
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("data: ")
    assert second.startswith("warning: train: these boxes look like fractions of the image")


def test_nothing_to_warn_of_has_no_summary(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "dst", category="balloon")
    assert check(tmp_path / "dst", quick=True).summary() == []


def test_one_file_in_both_sets_is_an_error_of_the_full_check(coco_folder):
    root = coco_folder()
    (root / "val2017" / "val_001.jpg").write_bytes((root / "train2017" / "train_002.jpg").read_bytes())
    assert check(root, quick=True).ok
    assert found(check(root).errors) == {
        ("both", "same file in train and val"): ["train_002.jpg (image id 12) = val_001.jpg (image id 11)"]
    }


@pytest.mark.parametrize(
    "how", [{"format": "JPEG", "quality": 40}, {"format": "PNG"}, {"format": "JPEG", "quality": 90, "size": (240, 160)}]
)
def test_one_picture_saved_anew_in_both_sets_is_a_warning(coco_folder, how):
    root = coco_folder(size=(480, 320))
    noise(7, (480, 320)).save(root / "train2017" / "train_002.jpg", quality=90)
    again = noise(7, (480, 320)).resize(how.get("size", (480, 320)), Image.Resampling.LANCZOS)
    again.save(root / "val2017" / "val_001.jpg", **{key: value for key, value in how.items() if key != "size"})
    file = root / "annotations" / "custom_val.json"
    coco = json.loads(file.read_text())
    coco["images"][1].update(width=again.width, height=again.height)
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != 11]
    file.write_text(json.dumps(coco))
    report = check(root)
    assert report.ok
    places = found(report.warnings)[("both", "image looks the same in train and val")]
    assert places == ["train_002.jpg (image id 12) ~ val_001.jpg (image id 11)"]


def test_blank_pictures_are_not_taken_for_one_another(coco_folder):
    root = coco_folder()
    Image.new("RGB", (96, 64), (250, 250, 250)).save(root / "train2017" / "train_002.jpg")
    Image.new("RGB", (96, 64), (249, 249, 249)).save(root / "val2017" / "val_001.jpg")
    assert not [finding for finding in check(root).warnings if "same" in finding.what]


def test_progress_is_told(coco_folder):
    told = []
    check(coco_folder(train=4, val=2), progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 6) for done in range(1, 7)]


def test_an_interrupt_does_not_wait_for_the_rest(coco_folder, monkeypatch):
    decoded = []
    read_image = coco.read_image

    def slow(path, *options):
        decoded.append(path)
        time.sleep(0.01)
        return read_image(path, *options)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(coco, "read_image", slow)
    root = coco_folder(train=10 * os.cpu_count(), val=1)
    with pytest.raises(KeyboardInterrupt):
        check(root, progress=interrupt)
    assert len(decoded) < 5 * os.cpu_count()


# ------------------------------------------------------------------------------------------------------------ numbers and categories


def test_the_statistics_count_what_is_there(coco_folder):
    root = coco_folder(train=3, val=2, boxes=0, size=(300, 200))
    boxes = {
        "train": [(10, 3, 31, 33), (10, 3, 32, 32), (10, 7, 95, 97), (11, 3, 96, 96), (11, 7, 20, 20)],
        "val": [(10, 3, 10, 10), (11, 3, 10, 10), (11, 7, 100, 100)],
    }
    for split, rows in boxes.items():
        file = root / "annotations" / f"custom_{split}.json"
        coco = json.loads(file.read_text())
        for number, (image, category, width, height) in enumerate(rows, 1):
            box = {"bbox": [number, number, width, height], "area": width * height, "iscrowd": int(width == 20)}
            coco["annotations"].append({"id": number, "image_id": image, "category_id": category} | box)
        file.write_text(json.dumps(coco))
    report = check(root)
    assert report.stats["train"] == {
        **{"images": 3, "boxes": 4, "crowds": 1, "without_boxes": 1, "most_boxes": 3},
        "categories": {"square": {"images": 2, "boxes": 3}, "oblong": {"images": 1, "boxes": 1}},
        "sizes": {"small": 1, "medium": 2, "large": 1},
    }
    assert report.stats["val"]["sizes"] == {"small": 2, "medium": 0, "large": 1}
    text = report.text()
    assert re.search(r"train +3 +1 +4 +1 +3\n", text)
    assert re.search(r"train +1 \(25%\) +2 \(50%\) +1 \(25%\)\n", text)
    assert re.search(r"square +2 +3 \(75\.0%\) +2 +2 \(66\.7%\)", text)


def test_more_boxes_than_queries_are_told_where_the_queries_are_known(coco_folder):
    root = coco_folder(train=2, val=1, boxes=5)
    assert "queries" not in check(root).text()
    assert "queries" not in check(root, num_queries=5).text()
    places = found(check(root, num_queries=4).warnings)[("train", "image has more boxes than the model has object queries (4)")]
    assert places == ["train_000.jpg (image id 10): 5", "train_001.jpg (image id 11): 5"]


def relabel(root, split, categories, ids):
    file = root / "annotations" / f"custom_{split}.json"
    coco = json.loads(file.read_text())
    coco["categories"] = [{"id": number, "name": name} for number, name in categories]
    for number, each in enumerate(coco["annotations"]):
        each["category_id"] = ids[number % len(ids)]
    file.write_text(json.dumps(coco))


SAME = [(1, "cat"), (2, "dog")]


@pytest.mark.parametrize(
    ("train", "val", "errors", "warnings"),
    [
        ((SAME, [1, 2]), (SAME, [2, 1]), {}, {}),
        ((SAME, [1, 2]), (SAME, [1]), {}, {("train", "category has no box in val"): ["'dog'"]}),
        ((SAME, [1]), (SAME, [1, 2]), {}, {("val", "category has no box in train to learn from"): ["'dog'"]}),
        ((SAME, [1]), (SAME, [1]), {}, {("both", "category is never used"): ["'dog'"]}),
        (([(1, "cat")], [1]), (SAME, [1, 2]), {("val", "category is not in the training file"): ["'dog'"]}, {}),
        (
            ([(1, "cat")], [1]),
            (SAME, [1]),
            {},
            {("both", "category is listed in one of the two files only"): ["'dog'"], ("both", "category is never used"): ["'dog'"]},
        ),
        (
            (SAME, [1, 2]),
            ([(1, "Dog"), (2, "Cat ")], [1, 2]),
            {},
            {("both", "category has different ids in train and val"): ["'dog' (2 and 1)", "'cat' (1 and 2)"]},
        ),
    ],
)
def test_the_categories_of_train_and_val_are_compared(coco_folder, train, val, errors, warnings):
    root = coco_folder(train=3, val=3)
    relabel(root, "train", *train)
    relabel(root, "val", *val)
    report = check(root)
    assert found(report.errors) == errors
    assert found(report.warnings) == warnings


# ------------------------------------------------------------------------------------------------------------ the text


def test_the_text_names_a_few_counts_all_and_fits_the_terminal(broken, monkeypatch):
    def change(coco, folder):
        for image in coco["images"]:
            (folder / image["file_name"]).unlink()

    root = broken(change, train=30)
    monkeypatch.chdir(root.parent)  # the path of a temporary folder may be wider than a terminal
    report = check(root.name)
    text = report.text(width=80)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert (
        "30 × image is missing: train_000.jpg (image id 10), train_001.jpg (image id 11), train_002.jpg (image id 12) and 27 more" in words
    )
    assert "-> put it into" in words
    assert text.index("Errors") < text.index("Warnings") < text.index("NOT ready to train: 1 error, 2 warnings")
    (error,) = report.errors
    assert len(error.occurrences) == 30
    assert "\n" not in str(error)


def test_names_cannot_break_the_lines(broken):
    def change(coco, _):
        coco["images"][1].update(file_name="a\nREADY\x1b[31m.jpg")
        coco["categories"][0].update(name="square\nREADY\x1b[31m")

    text = check(broken(change)).text()
    assert "\x1b" not in text
    assert "\nREADY" not in text


def test_balloons(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "dst", category="balloon")
    report = check(tmp_path / "dst")
    assert not report.errors
    assert not report.warnings
    assert (report.stats["train"]["images"], report.stats["train"]["boxes"]) == (61, 255)
    assert (report.stats["val"]["images"], report.stats["val"]["boxes"]) == (13, 50)
    assert report.text().splitlines()[-1] == "Ready to train, nothing to complain of"


def test_blood_cells(shared_data, tmp_path):
    convert(shared_data("bccd"), tmp_path / "dst", "voc")
    report = check(tmp_path / "dst")
    assert not report.errors
    speck = "box is one pixel wide or high, or less"
    assert {key: len(places) for key, places in found(report.warnings).items()} == {
        **{("train", speck): 1, ("val", speck): 1},
        ("both", "image looks the same in train and val"): 1,  # one field under the microscope, in two focuses
    }


def with_test_set(root, source="val", change=lambda coco: None):
    """Give a folder a test set, a copy of another set."""
    content = json.loads((root / "annotations" / f"custom_{source}.json").read_text())
    change(content)
    (root / "annotations" / "custom_test.json").write_text(json.dumps(content))
    shutil.copytree(root / f"{source}2017", root / "test2017")
    return root


def test_a_test_set_is_checked_on_request_alone(coco_folder):
    def add_category(coco):
        coco["categories"].append({"id": 99, "name": "ship"})
        coco["annotations"][0]["category_id"] = 99

    root = with_test_set(coco_folder(), "train", add_category)
    assert check(root).ok
    errors = found(check(root, test=True).errors)
    assert errors["test", "category is not in the training file"] == ["'ship'"]
    assert len(errors["test", "same file in train and test"]) == 4
    (root / "test2017").rename(root / "elsewhere")
    assert check(root).ok
    assert "no test images" in check(root, test=True).errors[0].what
    (root / "annotations" / "custom_test.json").write_text("broken")
    assert check(root, quick=True).ok
