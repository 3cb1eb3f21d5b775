import json
import shutil

import pytest
from PIL import Image

from raydetr.cli import main
from raydetr.data.check.check import check
from raydetr.data.tools.merge import merge
from raydetr.errors import UserError

OTHER = ({"id": 3, "name": "Oblong"}, {"id": 4, "name": "circle"})  # "oblong" is 7 in the first data set, and 3 is "square"


def content(root, part):
    return json.loads((root / "annotations" / f"custom_{part}.json").read_text())


def names_of_boxes(coco):
    names = {each["id"]: each["name"] for each in coco["categories"]}
    return [names[each["category_id"]] for each in coco["annotations"]]


@pytest.fixture
def two(coco_folder):
    return coco_folder(folder="a"), coco_folder(folder="b", seed=1, categories=OTHER)


def test_categories_are_joined_by_name_and_images_of_one_name_are_kept_apart(two, tmp_path, capsys):
    out = tmp_path / "both"
    assert main(["data", "merge", *map(str, two), str(out)]) == 0
    merged = content(out, "train")
    assert [(each["id"], each["name"]) for each in merged["categories"]] == [(3, "square"), (7, "oblong"), (4, "circle")]
    first, second = (content(root, "train") for root in two)
    assert names_of_boxes(merged) == names_of_boxes(first) + [name.lower() for name in names_of_boxes(second)]
    assert [image["file_name"] for image in merged["images"]][3:6] == ["train_003.jpg", "train_000_2.jpg", "train_001_2.jpg"]
    for root, name, taken in ((two[0], "train_000.jpg", "train_000.jpg"), (two[1], "train_000.jpg", "train_000_2.jpg")):
        assert (out / "train2017" / taken).read_bytes() == (root / "train2017" / name).read_bytes()
    assert len({image["id"] for part in ("train", "val") for image in content(out, part)["images"]}) == 12
    assert [each["id"] for each in merged["annotations"]] == list(range(1, 25))
    assert "6 × image renamed, because another has its name: train_000.jpg -> train_000_2.jpg" in capsys.readouterr().out
    assert check(out).ok


def test_an_image_that_both_have_is_taken_once_with_the_boxes_of_both(two, tmp_path):
    shutil.copy(two[0] / "train2017" / "train_000.jpg", two[1] / "train2017" / "train_001.jpg")
    shutil.copy(two[0] / "train2017" / "train_002.jpg", two[1] / "val2017" / "val_000.jpg")
    file = two[1] / "annotations" / "custom_train.json"
    coco, own = json.loads(file.read_text()), content(two[0], "train")["annotations"]
    same = own[0]  # one of the boxes is the same: category 7 is "oblong" here, 3 there
    coco["annotations"][3] |= {"category_id": 3 if same["category_id"] == 7 else 4, "bbox": same["bbox"]}
    if same["category_id"] == 3:
        coco["categories"][1]["name"] = "square"
    file.write_text(json.dumps(coco))
    summary = merge(two, tmp_path / "out")
    merged = content(tmp_path / "out", "train")
    assert [image["file_name"] for image in merged["images"]].count("train_000.jpg") == 1
    assert summary.images == {"train": 7, "val": 3}
    first = next(image["id"] for image in merged["images"] if image["file_name"] == "train_000.jpg")
    assert sum(each["image_id"] == first for each in merged["annotations"]) == 5
    note = next(note for note in summary.notes if "same file" in note)
    assert note.startswith("2 × image is the same file as another, taken once with the boxes of both: train_001.jpg = train_000.jpg")
    assert "(val and train: kept in train)" in note


def test_a_test_set_of_one_of_them_is_kept(two, tmp_path):
    (two[0] / "val2017").rename(two[0] / "test2017")
    (two[0] / "annotations" / "custom_val.json").rename(two[0] / "annotations" / "custom_test.json")
    assert merge(two, tmp_path / "out").images == {"train": 8, "val": 2, "test": 2}


def test_bad_requests_are_one_line(two, tmp_path, capsys):
    assert main(["data", "merge", str(two[0]), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "raydetr: data merge: give at least two data sets and the folder to write\n"
    with pytest.raises(UserError, match="is given twice"):
        merge([two[0], tmp_path / "b" / ".." / "a"], tmp_path / "out")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        merge(two, two[0])
    with pytest.raises(UserError, match="there is no folder"):
        merge([two[0], tmp_path / "none"], tmp_path / "out")
    (two[1] / "annotations" / "custom_train.json").write_text("[]")
    with pytest.raises(UserError, match=r"custom_train\.json"):
        merge(two, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_differ_by_case_only_are_kept_apart_and_a_taken_name_is_passed_over(two, tmp_path):
    for root, names in ((two[0], ["a.jpg", "a_2.jpg"]), (two[1], ["A.JPG", "b.jpg"])):
        file = root / "annotations" / "custom_val.json"
        coco = json.loads(file.read_text())
        for image, name in zip(coco["images"], names, strict=True):
            (root / "val2017" / image["file_name"]).rename(root / "val2017" / name)
            image["file_name"] = name
        file.write_text(json.dumps(coco))
    merge(two, tmp_path / "out")
    assert [image["file_name"] for image in content(tmp_path / "out", "val")["images"]] == ["a.jpg", "a_2.jpg", "A_3.JPG", "b.jpg"]
    assert Image.open(tmp_path / "out" / "val2017" / "A_3.JPG").size == (96, 64)
