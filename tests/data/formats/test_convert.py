import contextlib
import errno
import io
import json
import os
import shutil

import pytest
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.config import Data
from raydetr.data.check.check import check
from raydetr.data.coco import find_split, load_coco
from raydetr.data.formats.convert import convert
from raydetr.data.images import read_image
from raydetr.errors import UserError

POLYGON = {"name": "polygon", "all_points_x": [10, 50, 50, 10], "all_points_y": [10, 10, 40, 40]}
CIRCLE = {"name": "circle", "cx": 40, "cy": 30, "r": 10}


def write_via(folder, pictures, seed=0):
    """A VIA file and its pictures of 80 x 60: file name to (shape, kind) pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for number, (name, regions) in enumerate(pictures.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 60), (seed * 40 % 255, number * 30 % 255, 120)).save(path)
        regions = [{"shape_attributes": shape, "region_attributes": {"kind": kind}} for shape, kind in regions]
        size = path.stat().st_size
        entries[f"{name}{size}"] = {"filename": name, "size": size, "regions": regions}
    (folder / "via_region_data.json").write_text(json.dumps(entries))


@pytest.fixture
def src(tmp_path):
    write_via(tmp_path / "src" / "train", {"b.jpg": [(POLYGON, "dog"), (CIRCLE, "cat")], "a.jpg": [], "c.jpg": [(POLYGON, "cat")]})
    write_via(tmp_path / "src" / "val", {"sub/d e.jpg": [(CIRCLE, "cat")]}, seed=1)
    return tmp_path / "src"


def read(dst, split):
    return json.loads((dst / "annotations" / f"custom_{split}.json").read_text())


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_the_folder_that_training_takes(src, tmp_path):
    dst = tmp_path / "new" / "dst"
    summary = convert(src, dst)
    assert files(dst) == [
        *("annotations/custom_train.json", "annotations/custom_val.json"),
        *("train2017/a.jpg", "train2017/b.jpg", "train2017/c.jpg", "val2017/sub/d e.jpg"),
    ]
    train, val = read(dst, "train"), read(dst, "val")
    assert [(each["id"], each["file_name"], each["width"], each["height"]) for each in train["images"]] == [
        *((1, "a.jpg", 80, 60), (2, "b.jpg", 80, 60), (3, "c.jpg", 80, 60)),
    ]
    assert [(each["id"], each["name"]) for each in train["categories"]] == [(1, "cat"), (2, "dog")]
    assert train["categories"] == val["categories"]
    polygon, circle, _ = train["annotations"]
    assert polygon == {
        **{"id": 1, "image_id": 2, "category_id": 2, "bbox": [10, 10, 40, 30], "area": 1200, "iscrowd": 0},
        **{"segmentation": [[10, 10, 50, 10, 50, 40, 10, 40]]},
    }
    assert (circle["id"], circle["category_id"], circle["bbox"]) == (2, 1, [30, 20, 20, 20])
    assert [each["id"] for each in val["annotations"]] == [1]
    assert summary.images == {"train": 3, "val": 1}
    assert summary.objects == {"cat": {"train": 2, "val": 1}, "dog": {"train": 1, "val": 0}}
    assert str(dst) in summary.text()


def test_what_is_written_passes_the_check_and_loads(src, tmp_path):
    convert(src, tmp_path / "dst")
    report = check(tmp_path / "dst")
    assert report.ok
    assert [finding.what for finding in report.warnings] == ["category has no box in val"]
    for split in ("train", "val"):
        where = find_split(Data(path=str(tmp_path / "dst")), split)
        coco, warnings = load_coco(where.annotations, where.images)
        assert not warnings
        assert len(coco["annotations"]) == len(read(tmp_path / "dst", split)["annotations"])


def test_images_are_linked_or_copied(src, tmp_path):
    original = src / "train" / "b.jpg"
    assert convert(src, tmp_path / "linked").stored == "hard links"
    assert (tmp_path / "linked" / "train2017" / "b.jpg").samefile(original)
    assert convert(src, tmp_path / "copied", copy=True).stored == "copies"
    copied = tmp_path / "copied" / "train2017" / "b.jpg"
    assert copied.read_bytes() == original.read_bytes()
    assert not copied.samefile(original)


def test_without_hard_links_symbolic_ones_to_absolute_paths_without_both_copies(src, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.chdir(src.parent)
    assert convert("src", "dst").stored == "symbolic links"
    (tmp_path / "dst").rename(tmp_path / "moved")
    linked = tmp_path / "moved" / "train2017" / "b.jpg"
    assert linked.is_symlink()
    assert linked.read_bytes() == (src / "train" / "b.jpg").read_bytes()
    assert check(tmp_path / "moved").ok
    monkeypatch.setattr(os, "symlink", refuse)
    assert convert(src, tmp_path / "third").stored == "copies"


def test_pictures_that_are_links_themselves_are_found(src, tmp_path):
    (tmp_path / "store").mkdir()
    shutil.move(src / "train" / "b.jpg", tmp_path / "store" / "x.jpg")
    (src / "train" / "b.jpg").symlink_to(tmp_path / "store" / "x.jpg")
    convert(src, tmp_path / "dst")
    assert (tmp_path / "dst" / "train2017" / "b.jpg").samefile(tmp_path / "store" / "x.jpg")


def test_the_same_again_is_the_same_to_the_byte(src, tmp_path):
    for dst in ("one", "two"):
        convert(src, tmp_path / dst)
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_empty_folder_is_filled_another_is_left_alone(src, tmp_path):
    dst = tmp_path / "dst"
    dst.mkdir()
    convert(src, dst)
    before = {name: (dst / name).stat().st_mtime_ns for name in files(dst)}
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        convert(src, dst)
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        convert(src, src)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        convert(src, tmp_path / "file")
    assert {name: (dst / name).stat().st_mtime_ns for name in files(dst)} == before


def test_a_folder_without_val_is_split_by_seed(tmp_path):
    write_via(tmp_path / "src", {f"{number:02d}.jpg": [(CIRCLE, "cat")] for number in range(20)})
    drawn = {}
    for seed in (0, 0, 1):
        dst = tmp_path / f"dst{len(list(tmp_path.iterdir()))}"
        summary = convert(tmp_path / "src", dst, seed=seed)
        train, val = ([each["file_name"] for each in read(dst, split)["images"]] for split in ("train", "val"))
        assert sorted(train + val) == [f"{number:02d}.jpg" for number in range(20)]
        assert len(val) == 4
        assert summary.warnings == [line for line in summary.warnings if line.startswith("4 × image drawn for validation")] != []
        assert drawn.setdefault(seed, val) == val
    assert drawn[0] != drawn[1]
    convert(tmp_path / "src", tmp_path / "half", val_fraction=0.5)
    assert len(read(tmp_path / "half", "val")["images"]) == 10
    with pytest.raises(UserError, match="val_fraction: 1 is out of bounds"):
        convert(tmp_path / "src", tmp_path / "none", val_fraction=1)


def test_a_single_json_file_can_be_named(tmp_path):
    write_via(tmp_path / "src", {"a.jpg": [(CIRCLE, "cat")], "b.jpg": [(CIRCLE, "cat")]})
    (tmp_path / "src" / "via_region_data.json").rename(tmp_path / "src" / "mine.json")
    (tmp_path / "src" / "package.json").write_text("{}")
    assert convert(tmp_path / "src", tmp_path / "first").images == {"train": 1, "val": 1}  # the other is none of VIA's
    shutil.copy(tmp_path / "src" / "mine.json", tmp_path / "src" / "other.json")
    with pytest.raises(UserError, match="which is the VIA file"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert convert(tmp_path / "src" / "mine.json", tmp_path / "dst").images == {"train": 1, "val": 1}


def test_a_failure_leaves_nothing_behind(src, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="dst: cannot be written: No space left on device"):
        convert(src, tmp_path / "dst", copy=True)
    assert not (tmp_path / "dst").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No space left on device"):
        convert(src, tmp_path / "empty", copy=True)
    assert list((tmp_path / "empty").iterdir()) == []
    (src / "val" / "sub" / "d e.jpg").unlink()
    with pytest.raises(UserError, match=r"via_region_data.json: 1 annotated image.*: sub/d e.jpg"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_place_that_cannot_be_written_is_told(src, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written|exists and is not"):
        convert(src, tmp_path / "file" / "dst")


@pytest.mark.parametrize(
    ("pictures", "complaint"),
    [
        ({}, "no image has a region"),
        ({"a.jpg": []}, "no image has a region"),
        ({"a.jpg": [(CIRCLE, "cat")]}, "only 1 image in all"),
        ({"a.jpg": [({"name": "point", "cx": 1, "cy": 1}, "cat")], "b.jpg": []}, "no object is annotated"),
    ],
)
def test_a_set_with_nothing_to_learn_from_is_told(tmp_path, pictures, complaint):
    write_via(tmp_path / "src", pictures)
    with pytest.raises(UserError, match=complaint):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_an_empty_split_is_told(tmp_path):
    write_via(tmp_path / "src" / "train", {"a.jpg": [(CIRCLE, "cat")]})
    write_via(tmp_path / "src" / "val", {})
    with pytest.raises(UserError, match="no image in the val part"):
        convert(tmp_path / "src", tmp_path / "dst")


def test_one_name_twice_is_told(tmp_path):
    write_via(tmp_path / "src", {"a.jpg": [(CIRCLE, "cat")], "./a.jpg": [(CIRCLE, "cat")], "b.jpg": []})
    with pytest.raises(UserError, match=r"a\.jpg appears twice"):
        convert(tmp_path / "src", tmp_path / "dst", val_fraction=0.1)


def test_wrong_requests_are_told(src, tmp_path):
    for arguments, complaint in (
        ((tmp_path / "gone", tmp_path / "dst"), "gone: no such folder"),
        (
            (src, tmp_path / "dst", "pdf"),
            "unknown annotation format 'pdf'; known are via, voc, yolo, coco, labelme, createml, labelstudio, csv",
        ),
        ((src / "train" / "via_region_data.json", tmp_path / "dst", "voc"), "is a file; voc annotations are read from a folder"),
    ):
        with pytest.raises(UserError, match=complaint):
            convert(*arguments)
    with pytest.raises(UserError, match="--attribute kind refers to VIA regions"):
        convert(src, tmp_path / "dst", "voc", attribute="kind")


def test_names_in_any_letters_come_through(tmp_path):
    write_via(tmp_path / "src" / "train", {"Größe 1.jpg": [(CIRCLE, "Möwe")]})
    write_via(tmp_path / "src" / "val", {"風船/赤.jpg": [(CIRCLE, "風船 \ud800")]}, seed=1)  # the last is half a character
    convert(tmp_path / "src", tmp_path / "dst")
    assert read(tmp_path / "dst", "train")["images"][0]["file_name"] == "Größe 1.jpg"
    assert (tmp_path / "dst" / "val2017" / "風船" / "赤.jpg").is_file()
    assert [each["name"] for each in read(tmp_path / "dst", "val")["categories"]] == ["Möwe", "風船 \ud800"]


def test_names_cannot_break_the_summary(tmp_path):
    write_via(tmp_path / "src", {"a.jpg": [(CIRCLE, "cat\nDONE\x1b[31m")], "b.jpg": []})
    text = convert(tmp_path / "src", tmp_path / "dst").text()
    assert "\x1b" not in text
    assert "\nDONE" not in text


def test_yolo_and_voc_go_the_same_way(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "yolo" / "images" / split).mkdir(parents=True)
        (tmp_path / "yolo" / "labels" / split).mkdir(parents=True)
        Image.new("RGB", (80, 60)).save(tmp_path / "yolo" / "images" / split / f"{split}.jpg")
        (tmp_path / "yolo" / "labels" / split / f"{split}.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "yolo" / "data.yaml").write_text("names: [cat]")
    convert(tmp_path / "yolo", tmp_path / "dst", "yolo")
    (annotation,) = read(tmp_path / "dst", "val")["annotations"]
    assert (annotation["bbox"], annotation["area"], annotation["segmentation"]) == ([20, 15, 40, 30], 1200, [])


def test_balloons(shared_data, tmp_path):
    summary = convert(shared_data("balloon"), tmp_path / "unnamed")
    assert summary.objects == {"object": {"train": 255, "val": 50}}
    assert any("--category NAME" in line for line in summary.warnings)
    assert summary.text().startswith("Found via annotations (train/via_region_data.json).")
    summary = convert(shared_data("balloon"), tmp_path / "dst", category="balloon")
    assert summary.images == {"train": 61, "val": 13}
    assert summary.objects == {"balloon": {"train": 255, "val": 50}}
    assert not summary.warnings
    for split, boxes in (("train", 255), ("val", 50)):
        coco = read(tmp_path / "dst", split)
        assert [each["id"] for each in coco["annotations"]] == list(range(1, boxes + 1))
        for each in coco["images"]:
            with Image.open(tmp_path / "dst" / f"{split}2017" / each["file_name"]) as image:
                assert image.size == (each["width"], each["height"])


def test_perfect_detections_of_balloons_score_one(shared_data, tmp_path):
    convert(shared_data("balloon"), tmp_path / "dst", category="balloon")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "dst" / "annotations" / "custom_val.json")
        found = [
            {"image_id": each["image_id"], "category_id": each["category_id"], "bbox": each["bbox"], "score": 1.0}
            for each in truth.dataset["annotations"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0, abs=1e-12)


# --------------------------------------------------------------------------------------------------- what format it is


def save(path, size=(80, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (len(path.name) * 20 % 255, 90, 120)).save(path, **options)


def write_voc(root):
    for stem in "ab":
        save(root / "JPEGImages" / f"{stem}.jpg")
        box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>24</xmax><ymax>15</ymax></bndbox>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation><object><name>cat</name>{box}</object></annotation>")


def write_yolo(root):
    for stem in "ab":
        save(root / "images" / f"{stem}.jpg")
        (root / "labels").mkdir(exist_ok=True)
        (root / "labels" / f"{stem}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (root / "classes.txt").write_text("cat\n")


def write_coco(root):
    for stem in "ab":
        save(root / "images" / f"{stem}.jpg")
    coco = {
        "images": [{"id": number, "file_name": f"{stem}.jpg", "width": 80, "height": 60} for number, stem in enumerate("ab", 1)],
        "annotations": [{"id": number, "image_id": number, "category_id": 1, "bbox": [4, 5, 20, 10]} for number in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (root / "result.json").write_text(json.dumps(coco))


WRITERS = {
    "via": lambda root: write_via(root, {"a.jpg": [(CIRCLE, "cat")], "b.jpg": [(CIRCLE, "cat")]}),
    **{"voc": write_voc, "yolo": write_yolo, "coco": write_coco},
}


@pytest.mark.parametrize("source", WRITERS)
def test_the_format_is_found_out_and_said(tmp_path, source):
    WRITERS[source](tmp_path / "src")
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert summary.source == source
    assert summary.text().startswith(f"Found {source} annotations ({summary.found_in}).")
    assert (tmp_path / "src" / summary.found_in).is_file()
    assert summary.objects == {"cat": {"train": 1, "val": 1}}
    assert "Found" not in convert(tmp_path / "src", tmp_path / "named", source).text()


def test_several_formats_need_a_choice(tmp_path):
    write_voc(tmp_path / "src")
    write_yolo(tmp_path / "src")
    with pytest.raises(UserError, match=r"several formats: voc \(Annotations/a.xml\), yolo \(labels/a.txt\); choose one with --from"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert convert(tmp_path / "src", tmp_path / "dst", "voc").objects == {"cat": {"train": 1, "val": 1}}


def test_an_unknown_format_says_what_is_there(tmp_path):
    save(tmp_path / "src" / "a.jpg")
    (tmp_path / "src" / "labels.doc").write_text("")
    with pytest.raises(UserError, match=r"no known annotation format, only files \.doc, \.jpg; choose one with --from"):
        convert(tmp_path / "src", tmp_path / "dst")


@pytest.mark.parametrize(("written", "asked"), [("coco", "via"), ("coco", "voc"), ("via", "coco"), ("voc", "yolo"), ("via", "yolo")])
def test_the_wrong_format_names_the_right_one(tmp_path, written, asked):
    WRITERS[written](tmp_path / "src")
    with pytest.raises(UserError, match=f"--from {written}"):
        convert(tmp_path / "src", tmp_path / "dst", asked)


def test_categories_that_differ_by_case_are_kept_and_noted(tmp_path):
    write_via(tmp_path / "src", {"a.jpg": [(CIRCLE, "Cat")], "b.jpg": [(CIRCLE, "cat")]})
    summary = convert(tmp_path / "src", tmp_path / "dst")
    assert set(summary.objects) == {"Cat", "cat"}
    assert "2 × category whose name differs from another's by upper and lower case only, kept apart: Cat, cat" in summary.warnings


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("size", [(80, 60), (60, 60)])
@pytest.mark.parametrize("source", ["via", "coco"])
def test_boxes_on_the_upright_image_fit_what_training_reads(tmp_path, orientation, size, source):
    """The upright image has a red box at (10, 8)-(50, 38); the file is stored so that its EXIF tag turns it to that."""
    upright = Image.new("RGB", size, "grey")
    upright.paste((230, 20, 20), (10, 8, 50, 38))
    exif = Image.Exif()
    exif[0x0112] = orientation
    probe = Image.new("RGB", size)
    back = next(
        way
        for way in Image.Transpose
        if ImageOps.exif_transpose(with_orientation(upright.transpose(way), orientation)).tobytes() == upright.tobytes()
        and probe.transpose(way).size == (size if orientation < 5 else size[::-1])
    )
    (tmp_path / "src").mkdir()
    for name in ("a.png", "b.png"):
        upright.transpose(back).save(tmp_path / "src" / name, exif=exif)
    if source == "via":
        rect = {"shape_attributes": {"name": "rect", "x": 10, "y": 8, "width": 40, "height": 30}, "region_attributes": {"kind": "cat"}}
        content = {name: {"filename": name, "size": -1, "regions": [rect]} for name in ("a.png", "b.png")}
    else:
        content = {
            "images": [{"id": n, "file_name": name, "width": size[0], "height": size[1]} for n, name in enumerate(("a.png", "b.png"))],
            "annotations": [{"id": n, "image_id": n, "category_id": 1, "bbox": [10, 8, 40, 30]} for n in (0, 1)],
            "categories": [{"id": 1, "name": "cat"}],
        }
    (tmp_path / "src" / "labels.json").write_text(json.dumps(content))
    summary = convert(tmp_path / "src", tmp_path / "dst", source)
    assert sum("EXIF" in line for line in summary.warnings) == 1
    coco = read(tmp_path / "dst", "train")
    (image,) = coco["images"]
    assert (image["width"], image["height"]) == size
    if orientation >= 5 and size[0] != size[1]:  # elsewhere the size cannot tell, and data.exif decides
        pixels = read_image(tmp_path / "dst" / "train2017" / image["file_name"], size)
        assert pixels[:, 9:37, 11:49].float().mean((1, 2)).tolist() == [230, 20, 20]


def with_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = io.BytesIO()
    image.save(stored, "png", exif=exif)
    return Image.open(stored)


def test_boxes_on_the_stored_pixels_can_be_said(tmp_path):
    write_via(tmp_path / "src", {"a.jpg": [(CIRCLE, "cat")], "b.jpg": [(CIRCLE, "cat")]})
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "src" / name, exif=exif)
    sizes = {}
    for way in ("upright", "stored"):
        convert(tmp_path / "src", tmp_path / way, exif=way)
        sizes[way] = [(image["width"], image["height"]) for image in read(tmp_path / way, "train")["images"]]
    assert sizes == {"upright": [(60, 80)], "stored": [(80, 60)]}
