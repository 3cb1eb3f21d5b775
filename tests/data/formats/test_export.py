import json

import pytest
import yaml
from PIL import Image

from raydetr.data.formats.convert import convert
from raydetr.data.formats.export import WRITERS, export
from raydetr.errors import UserError


def annotation(number, image_id=1, category_id=1, box=(4, 5.5, 20, 10.25), polygons=(), **others):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box), "segmentation": list(polygons), **others}


def write(root, train, val=None, categories=("cat", "no")):
    """A COCO folder of 80 x 60 images: annotations by image name."""
    for split, images in (("train", train), ("val", val or {"v.jpg": [annotation(1)]})):
        coco = {"images": [], "annotations": [], "categories": [{"id": n, "name": name} for n, name in enumerate(categories, 1)]}
        for image_id, (name, annotations) in enumerate(images.items(), 1):
            file = root / f"{split}2017" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 60), "grey").save(file)
            coco["images"].append({"id": image_id, "file_name": name, "width": 80, "height": 60})
            coco["annotations"] += [each | {"image_id": image_id} for each in annotations]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"custom_{split}.json").write_text(json.dumps(coco))
    return root


def content(root):
    """What a COCO folder says, whatever its ids: by split and image name."""
    said = {}
    for split in ("train", "val"):
        coco = json.loads((root / "annotations" / f"custom_{split}.json").read_text())
        names = {each["id"]: each["name"] for each in coco["categories"]}
        for image in coco["images"]:
            mine = [each for each in coco["annotations"] if each["image_id"] == image["id"]]
            objects = [(names[each["category_id"]], each["bbox"], each["segmentation"], each["area"]) for each in mine]
            said[split, image["file_name"]] = ((image["width"], image["height"]), objects)
    return said


def assert_same(found, expected):
    """Within the rounding of a text file: a hundredth of a pixel."""
    assert found.keys() == expected.keys()
    for key, (size, objects) in expected.items():
        assert found[key][0] == size
        for (name, box, polygons, area), other in zip(objects, found[key][1], strict=True):
            assert name == other[0]
            assert other[1] == pytest.approx(box, abs=0.011)
            assert len(polygons) == len(other[2])
            for polygon, kept in zip(polygons, other[2], strict=True):
                assert kept == pytest.approx(polygon, abs=0.011)
            assert other[3] == pytest.approx(area, rel=1e-3)


TRIANGLE = [10, 10.5, 40, 10.5, 40, 40]


@pytest.mark.parametrize("target", WRITERS)
def test_boxes_and_polygons_come_back(tmp_path, target):
    train = {
        "a.jpg": [annotation(1), annotation(2, category_id=2, box=(10, 10.5, 30, 29.5), polygons=[TRIANGLE])],
        "deep/er/Größe 1.jpg": [annotation(3, category_id=2)],
        "empty.jpg": [],
    }
    write(tmp_path / "src", train, {"a.jpg": [annotation(1, box=(0, 0, 80, 60))], "z.jpg": []})
    convert(tmp_path / "src", tmp_path / "coco", "coco")
    summary = export(tmp_path / "coco", tmp_path / "out", target)
    assert (summary.images, summary.boxes, summary.warnings) == ({"train": 3, "val": 2}, {"train": 3, "val": 1}, [])
    back = convert(tmp_path / "out", tmp_path / "back")
    assert back.source == target
    found = content(tmp_path / "back")
    if target == "voc":  # a.jpg is in both splits, which then have folders of their own
        found = {(split, name.removeprefix(f"{split}/")): each for (split, name), each in found.items()}
    assert_same(found, content(tmp_path / "coco"))


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("name", ["balloon", "bccd"])
def test_real_sets_come_back(shared_data, tmp_path, target, name):
    convert(shared_data(name), tmp_path / "coco")
    export(tmp_path / "coco", tmp_path / "out", target)
    convert(tmp_path / "out", tmp_path / "back", target)
    assert_same(content(tmp_path / "back"), content(tmp_path / "coco"))


def test_several_polygons_of_one_object_come_back_where_the_format_has_them(tmp_path):
    other = [50, 10, 60, 10, 60, 20]
    write(
        tmp_path / "src", {"a.jpg": [annotation(1, box=(10, 10, 50, 30), polygons=[TRIANGLE, other]), annotation(2)]}, categories=("cat",)
    )
    for target, polygons in (("coco", [TRIANGLE, other]), ("labelme", [TRIANGLE, other]), ("yolo", []), ("voc", [])):
        summary = export(tmp_path / "src", tmp_path / target, target)
        assert summary.warnings == ([] if polygons else ["1 × object of several polygons, only its box is written: a.jpg"])
        convert(tmp_path / target, tmp_path / f"{target}-back", target)
        (first, second) = content(tmp_path / f"{target}-back")["train", "a.jpg"][1]
        assert first[1] == pytest.approx([10, 10, 50, 30], abs=0.51)  # labelme has no box of its own
        assert (first[2], second[2]) == (polygons, [])


def test_crowds_and_masks_are_said(tmp_path):
    mask = {"counts": [10, 20, 4770], "size": [60, 80]}
    crowd = annotation(1, iscrowd=1) | {"segmentation": mask}
    write(tmp_path / "src", {"a.jpg": [crowd, annotation(2) | {"segmentation": mask}]}, categories=("cat",))
    for target in ("yolo", "voc", "labelme"):
        summary = export(tmp_path / "src", tmp_path / target, target)
        assert summary.boxes["train"] == 1
        assert summary.warnings == [
            "1 × crowd region, left out: the format has none: a.jpg",
            "1 × run-length encoded mask, only its box is written: a.jpg",
        ]
    assert export(tmp_path / "src", tmp_path / "coco", "coco").boxes["train"] == 2
    coco = json.loads((tmp_path / "coco" / "annotations" / "instances_train2017.json").read_text())
    assert [each["segmentation"] for each in coco["annotations"]] == [mask, mask]
    assert [each["iscrowd"] for each in coco["annotations"]] == [1, 0]


def test_class_names_that_yaml_would_change_are_quoted(tmp_path):
    write(tmp_path / "src", {"a.jpg": [annotation(1), annotation(2, category_id=2)]})
    export(tmp_path / "src", tmp_path / "out", "yolo")
    assert yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"] == {0: "cat", 1: "no"}


@pytest.mark.parametrize("target", ["yolo", "voc", "labelme"])
def test_two_images_of_one_stem_are_told(tmp_path, target):
    write(tmp_path / "src", {"a.jpg": [annotation(1)], "a.png": []})
    with pytest.raises(UserError, match=r"a\.jpg and a\.png would share one annotation file"):
        export(tmp_path / "src", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_wrong_requests_are_told(tmp_path):
    write(tmp_path / "src", {"a.jpg": [annotation(1)]}, categories=("c\x01t", "no"))
    for arguments, complaint in (
        ((tmp_path / "gone", tmp_path / "out", "yolo"), "gone: no such folder"),
        ((tmp_path / "src", tmp_path / "out", "pdf"), "unknown annotation format 'pdf'; known are coco, yolo, voc, labelme"),
        ((tmp_path / "src", tmp_path / "src", "yolo"), "exists and is not an empty folder"),
        ((tmp_path / "src", tmp_path / "out", "voc"), "has characters that XML cannot hold"),
    ):
        with pytest.raises(UserError, match=complaint):
            export(*arguments)
    assert not (tmp_path / "out").exists()
