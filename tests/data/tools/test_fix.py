import json
import shutil

import pytest
from PIL import Image

from raydetr.cli import main
from raydetr.config import Data
from raydetr.data.check.check import check
from raydetr.data.coco import find_split, load_coco
from raydetr.data.tools.fix import fix
from raydetr.errors import UserError


def content(root, part="train"):
    return json.loads((root / "annotations" / f"custom_{part}.json").read_text())


def files_of(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


NO_FILE = "1 × image without an id or without a readable file, left out with its annotations: train: train_003.jpg (image id 13)"
# Each: what is changed in the train file, and the line that tells of its mending. Images are 96 x 64; image 10 has annotations 1 to 3.
MENDED = {
    "beyond": (
        lambda c, d: c["annotations"][0].update(bbox=[90, -4, 20, 10]),
        "1 × box clipped at the edge of its image: train: annotation",
    ),
    "empty": (
        lambda c, d: c["annotations"][0].update(bbox=[1, 1, 0, 5]),
        "1 × box without area, left out: train: annotation id 1 in train",
    ),
    "negative": (lambda c, d: c["annotations"][0].update(bbox=[9, 9, -5, 5]), "1 × box without area, left out"),
    "not a number": (lambda c, d: c["annotations"][0].update(bbox=[9, float("nan"), 5, 5]), "1 × box without area, left out"),
    "outside": (lambda c, d: c["annotations"][0].update(bbox=[200, 5, 5, 5]), "1 × box outside its image, left out"),
    "twice": (
        lambda c, d: c["annotations"].append(c["annotations"][1] | {"id": 99}),
        "1 × box there twice, one left out: train: annotation id 99 in train_000.jpg",
    ),
    "same annotation ids": (
        lambda c, d: [each.update(id=0) for each in c["annotations"]],
        "1 × train: annotation ids that are missing, text, 0 or given twice, numbered anew: 12 of 12",
    ),
    "text as image ids": (
        lambda c, d: (
            [each.update(id=f"img-{each['id']}") for each in c["images"]],
            [each.update(image_id=f"img-{each['image_id']}") for each in c["annotations"]],
        ),
        "1 × train: image ids that are text or given twice, numbered anew: 4 of 4",
    ),
    "text as category ids": (
        lambda c, d: (
            [each.update(id=str(each["id"])) for each in c["categories"]],
            [each.update(category_id=float(each["category_id"])) for each in c["annotations"]],
        ),
        "1 × train: category ids that are text, numbered anew",
    ),
    "an image listed twice": (
        lambda c, d: (c["images"].append(c["images"][0] | {"id": 50}), c["annotations"][0].update(image_id=50)),
        "1 × file listed as several images, joined to one: train: train_000.jpg (image id 50)",
    ),
    "no file": (
        lambda c, d: (d / "train_003.jpg").unlink(),
        NO_FILE,
    ),
    "a file that is none": (
        lambda c, d: (d / "train_003.jpg").write_text("x"),
        NO_FILE,
    ),
    "no image": (lambda c, d: c["annotations"][0].update(image_id=999), "1 × annotation of no image, left out: train: annotation id 1"),
    "no size": (lambda c, d: c["images"][0].pop("width"), "1 × image without width and height, read from its file"),
    "no area": (lambda c, d: c["annotations"][0].pop("area"), "1 × area computed from the outline or the box"),
    "another spelling": (
        lambda c, d: c["images"][0].update(file_name="photos\\TRAIN_000.JPG"),
        "1 × file name spelled as on disk",
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_is_counted_and_the_copy_is_sound(broken, tmp_path, name):
    change, line = MENDED[name]
    root = broken(change)
    before = files_of(root)
    summary = fix(root, tmp_path / "out")
    assert files_of(root) == before
    assert any(each.startswith(line) for each in summary.changes), summary.changes
    report = check(tmp_path / "out")
    assert report.ok, report.text()
    assert {finding.what for finding in report.warnings} == {"category ids have gaps: 2 ids from 3 to 7"} or "category ids" in line
    assert (
        fix(tmp_path / "out", tmp_path / "again").text()
        == f"Wrote {tmp_path / 'again'}: a copy without any change, there was nothing to mend."
    )


def test_boxes_outlines_and_areas_are_clipped_together(broken, tmp_path):
    outline = {"bbox": [80, 10, 30, 10], "segmentation": [[80, 10, 110, 10, 110, 20, 80, 20]], "area": 300}
    root = broken(lambda c, d: c["annotations"][0].update(outline))
    fix(root, tmp_path / "out")
    mended = content(tmp_path / "out")["annotations"][0]
    assert mended["bbox"] == [80, 10, 16, 10]
    assert sorted(zip(mended["segmentation"][0][::2], mended["segmentation"][0][1::2], strict=True)) == [
        (80, 10),
        (80, 20),
        (96, 10),
        (96, 20),
    ]
    assert mended["area"] == 160


def test_a_sound_data_set_is_copied_as_it_is(coco_folder, tmp_path):
    root = coco_folder()
    summary = fix(root, tmp_path / "out")
    assert summary.number == 0
    for part in ("train", "val"):
        assert content(tmp_path / "out", part) == content(root, part)


def test_training_reads_the_same_from_the_copy(broken, tmp_path):
    def spoil(coco, folder):
        coco["annotations"][0].update(bbox=[1, 1, 0, 5])
        coco["annotations"][4].update(bbox=[90, 4, 20, 10], area=60)
        coco["annotations"][7].pop("iscrowd")

    root = broken(spoil)
    fix(root, tmp_path / "out")
    there, here = (load_coco(find_split(Data(path=str(each)), "train").annotations)[0] for each in (root, tmp_path / "out"))
    assert here["images"] == there["images"]
    assert [each["bbox"] for each in here["annotations"] if each["id"] != 4] == [
        each["bbox"] for each in there["annotations"] if each["id"] != 4
    ]
    assert here["annotations"][3]["bbox"] == [90, 4, 6, 10]


def test_what_a_person_must_decide_is_left_and_reported(broken, tmp_path, capsys):
    root = broken(lambda c, d: (c["annotations"][0].update(category_id=5), c["annotations"][1].update(bbox=[1, 1, 0, 5])))
    assert main(["data", "check", str(root), "--fix", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'out'} with 1 change:\n  1 × box without area, left out" in shown
    assert "annotation has an unknown category" in shown
    assert "NOT ready to train: 1 error" in shown
    assert main(["data", "check", str(broken(lambda c, d: None, folder="sound")), "--quick", "--fix", str(tmp_path / "out2")]) == 0


def test_the_test_set_is_mended_as_well(coco_folder, tmp_path):
    root = coco_folder()
    shutil.copytree(root / "val2017", root / "test2017", copy_function=lambda a, b: Image.open(a).rotate(180).save(b))
    shutil.copy(root / "annotations" / "custom_val.json", root / "annotations" / "custom_test.json")
    fix(root, tmp_path / "out")
    assert content(tmp_path / "out", "test") == content(root, "test")


def test_training_images_alone_are_mended_and_the_missing_set_is_reported(coco_folder, tmp_path, capsys):
    root = coco_folder()
    shutil.rmtree(root / "val2017")
    (root / "annotations" / "custom_val.json").unlink()
    assert main(["data", "check", str(root), "--quick", "--fix", str(tmp_path / "out")]) == 1
    assert "no val annotations" in " ".join(capsys.readouterr().out.split())
    assert content(tmp_path / "out") == content(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c, d: [each.update(bbox=[each["bbox"][0], each["bbox"][1], 95, 63], area=None) for each in c["annotations"]],
            "nothing is mended: train: these boxes look like [x1, y1, x2, y2]",
        ),
        (lambda c, d: c["images"][1].update(id=10), "image id 10 means both train_000.jpg and train_001.jpg; nothing is mended"),
        (lambda c, d: c["categories"][1].update(id=3), "category id 3 is used twice, under different names; nothing is mended"),
        (lambda c, d: c["categories"][1].pop("id"), "category number 2 has no id; nothing is mended"),
        (lambda c, d: [path.unlink() for path in d.iterdir()], "no image of it can be read"),
    ],
)
def test_what_is_not_safe_is_one_line_and_writes_nothing(broken, tmp_path, capsys, change, message):
    root = broken(change)
    assert main(["data", "check", str(root), "--fix", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_never_mends_in_place(coco_folder):
    root = coco_folder()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        fix(root, root)
