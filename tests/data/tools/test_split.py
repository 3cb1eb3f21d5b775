import json

import pytest
from PIL import Image

from raydetr.cli import main
from raydetr.config import Data
from raydetr.data.check.check import check
from raydetr.data.coco import find_split, load_coco
from raydetr.data.tools.split import split
from raydetr.errors import UserError


def content(root, part):
    return json.loads((root / "annotations" / f"custom_{part}.json").read_text())


@pytest.fixture
def tree(tmp_path):
    """The files below the temporary folder, with their bytes."""
    return lambda root: {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_all_images_are_divided_anew_and_the_source_stays(coco_folder, tmp_path, tree, capsys):
    root = coco_folder(train=14, val=6)
    before = tree(root)
    assert main(["data", "split", str(root), "--val", "0.2", "--test", "0.1"]) == 0
    out = tmp_path / "data-split"
    assert tree(root) == before
    parts = {part: content(out, part) for part in ("train", "val", "test")}
    assert {part: len(each["images"]) for part, each in parts.items()} == {"train": 14, "val": 4, "test": 2}
    names = [image["file_name"] for each in parts.values() for image in each["images"]]
    assert sorted(names) == sorted(path.name for split in ("train", "val") for path in (root / f"{split}2017").iterdir())
    text = capsys.readouterr().out
    assert f"Next: raydetr data check {out}" in text
    assert [line.split() for line in text.splitlines() if "images  " in line] == [["images", "14", "4", "2"]]
    report = check(out, test=True)
    assert report.ok, report.text()


def test_boxes_outlines_and_other_fields_go_with_their_image(coco_folder, tmp_path):
    root = coco_folder(train=8, val=2)
    file = root / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    coco["annotations"][0] |= {"segmentation": [[1, 1, 5, 1, 5, 5]], "attributes": {"occluded": True}, "iscrowd": 1}
    coco["licenses"] = [{"id": 7, "name": "CC BY"}]
    coco["images"][0]["license"] = 7
    file.write_text(json.dumps(coco))
    split(root, tmp_path / "out", 0.3, 0)
    owners = {}
    for part in ("train", "val"):
        each = content(tmp_path / "out", part)
        files = {image["id"]: image for image in each["images"]}
        for box in each["annotations"]:
            owners.setdefault(files[box["image_id"]]["file_name"], []).append(box)
            if box["iscrowd"]:
                assert box["segmentation"] == [[1, 1, 5, 1, 5, 5]]
                assert box["attributes"] == {"occluded": True}
                assert each["licenses"] == [{"id": files[box["image_id"]]["license"], "name": "CC BY"}]
    assert not (tmp_path / "out" / "test2017").exists()
    for part in ("train", "val"):
        original, _ = load_coco(find_split(Data(path=str(root)), part).annotations)
        for image in original["images"]:
            there = [box["bbox"] for box in original["annotations"] if box["image_id"] == image["id"]]
            assert [box["bbox"] for box in owners[image["file_name"]]] == there


def test_look_alikes_stay_on_one_side(coco_folder, tmp_path):
    root = coco_folder(train=12, val=4, size=(128, 96))
    file = root / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    for number, quality in enumerate((30, 60, 75), 20):  # the same photograph, compressed in three ways
        name = f"again_{quality}.jpg"
        Image.open(root / "train2017" / "train_000.jpg").save(root / "train2017" / name, quality=quality)
        coco["images"].append({"id": 100 + number, "file_name": name, "width": 128, "height": 96})
        coco["annotations"].append({"id": 100 + number, "image_id": 100 + number, "category_id": 3, "bbox": [1, 1, 9, 9]})
    file.write_text(json.dumps(coco))
    for seed in range(4):
        summary = split(root, tmp_path / f"out{seed}", 0.3, 0.2, seed=seed)
        sides = {
            part
            for part in ("train", "val", "test")
            for image in content(summary.folder, part)["images"]
            if image["file_name"].startswith(("again", "train_000"))
        }
        assert len(sides) == 1
        assert summary.notes == ["1 group of look-alike images, each kept in one part: train_000.jpg ~ again_30.jpg"]


def test_names_and_ids_that_both_splits_have_are_told_apart(coco_folder, tmp_path):
    root = coco_folder(train=6, val=4)
    for part in ("train", "val"):
        for path in sorted((root / f"{part}2017").iterdir()):
            path.rename(path.with_name(path.name.removeprefix(f"{part}_")))
        file = root / "annotations" / f"custom_{part}.json"
        file.write_text(file.read_text().replace(f'"{part}_', '"'))
    split(root, tmp_path / "out", 0.3, 0, seed=1)
    images = [image for part in ("train", "val") for image in content(tmp_path / "out", part)["images"]]
    assert len({image["id"] for image in images}) == 10
    assert sum((tmp_path / "out" / f"{part}2017" / image["file_name"]).exists() for part in ("train", "val") for image in images) >= 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--val", "0"], "--val 0 is out of bounds; it takes more than 0, less than 1"),
        (["--val", "1.5"], "--val 1.5 is out of bounds"),
        (["--test", "-0.1"], "--test -0.1 is out of bounds; it takes at least 0, less than 1"),
        (["--val", "nan"], "--val nan is out of bounds"),
        (["--val", "0.7", "--test", "0.3"], "leave no image for training"),
        (["{here}"], "exists and is not an empty folder"),
        (["--val", "0.4", "--test", "0.3"], "2 images cannot be divided into 3 parts"),
    ],
)
def test_bad_requests_are_one_line(coco_folder, tmp_path, capsys, words, message):
    root = coco_folder(train=1, val=1)
    assert main(["data", "split", str(root), *(word.format(here=root) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "data-split").exists()


def test_a_folder_that_is_none_and_a_broken_image_are_named(coco_folder, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        split(tmp_path / "nothing", tmp_path / "out")
    root = coco_folder(train=6, val=3)
    broken = root / "train2017" / "train_001.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(UserError, match=r"train_001\.jpg"):
        split(root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
