import csv
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from raydetr.data.formats.labels import Notes, Options
from raydetr.data.formats.via import annotation_file, read_entries, read_via
from raydetr.data.masks import decode_masks, read_segmentation
from raydetr.errors import UserError

RECT = {"name": "rect", "x": 5, "y": 6, "width": 20, "height": 10}


def region(shape=RECT, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def entry(name, regions, size=-1, version=2):
    regions = regions if version == 2 else {str(number): each for number, each in enumerate(regions)}
    return {"filename": name, "size": size, "regions": regions, "file_attributes": {}}


@pytest.fixture
def folder(tmp_path):
    """Two pictures of 80 x 60, and a way to write the VIA file beside them."""

    def write(*entries, name="via_region_data.json", pictures=("a.jpg", "b.jpg")):
        for picture in pictures:
            path = tmp_path / picture
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 60), "grey").save(path)
        content = {f"{each['filename']}{each['size']}": each for each in entries}
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def read(folder, category=None, attribute=None):
    notes = Notes()
    return read_via(folder, Options(category, attribute), notes)["train"], notes


def objects(pictures):
    return [(picture.name, each.category, each.box) for picture in pictures for each in picture.objects]


def test_versions_one_and_two_and_a_project_say_the_same(tmp_path, folder):
    regions = [region(kind="cat"), region({"name": "circle", "cx": 40, "cy": 30, "r": 10}, kind="dog")]
    for version in (1, 2):
        folder(entry("a.jpg", regions, version=version), entry("b.jpg", [], version=version), name=f"{version}.json")
    project = {"_via_settings": {"ui": {}}, "_via_img_metadata": json.loads((tmp_path / "2.json").read_text()), "_via_attributes": {}}
    (tmp_path / "3.json").write_text(json.dumps(project))
    first, second, third = (read(tmp_path / f"{which}.json")[0] for which in (1, 2, 3))
    assert first == second == third
    assert objects(first) == [("a.jpg", "cat", [5, 6, 20, 10]), ("a.jpg", "dog", [30, 20, 20, 20])]
    assert [(picture.name, picture.width, picture.height) for picture in first] == [("a.jpg", 80, 60), ("b.jpg", 80, 60)]


def test_regions_of_version_one_come_in_the_order_of_their_numbers(folder):
    regions = {str(number): region(RECT | {"x": number}, kind="cat") for number in (10, 2, 0, 1)}
    pictures, _ = read(folder({"filename": "a.jpg", "size": 1, "regions": regions}))
    assert [box[0] for _, _, box in objects(pictures)] == [0, 1, 2, 10]


def test_the_only_attribute_with_values_is_the_category(folder):
    pictures, _ = read(folder(entry("a.jpg", [region(kind=" cat ", note=""), region(kind="dog", note=None), region(kind=3)])))
    assert [category for _, category, _ in objects(pictures)] == ["cat", "dog", "3"]


def test_ticked_boxes_are_values(folder):
    pictures, _ = read(folder(entry("a.jpg", [region(kind={"cat": True}), region(kind={"cat": False, "dog": True})])))
    assert [category for _, category, _ in objects(pictures)] == ["cat", "dog"]


def test_several_attributes_need_a_choice(folder):
    root = folder(entry("a.jpg", [region(kind="cat", colour="red"), region(kind="dog", colour="")]))
    with pytest.raises(UserError, match=r"--attribute: kind \(2 of 2 regions\), colour \(1 of 2 regions\)"):
        read(root)
    assert [category for _, category, _ in objects(read(root, attribute="kind")[0])] == ["cat", "dog"]
    with pytest.raises(UserError, match=r"a\.jpg region 1: no value for 'colour'"):
        read(root, attribute="colour")
    assert [category for _, category, _ in objects(read(root, attribute="colour", category="any")[0])] == ["red", "any"]
    assert [category for _, category, _ in objects(read(root, category="any")[0])] == ["any", "any"]
    with pytest.raises(UserError, match=r"no region has a value for the attribute 'size'; there are: kind .*colour"):
        read(root, attribute="size")


def test_without_any_attribute_the_category_is_object_unless_it_is_named(folder):
    root = folder(entry("a.jpg", [region(), region(kind="")]))
    pictures, notes = read(root)
    assert [category for _, category, _ in objects(pictures)] == ["object", "object"]
    assert notes["file without a category for any region, all become 'object' (name it with --category NAME)"] == [str(root)]
    assert [category for _, category, _ in objects(read(root, category="balloon")[0])] == ["balloon", "balloon"]


def test_one_object_cannot_be_two_things(folder):
    with pytest.raises(UserError, match=r"a.jpg region 0: 'kind' has several values \(cat, dog\)"):
        read(folder(entry("a.jpg", [region(kind={"cat": True, "dog": True})])))


def test_shapes_without_area_and_outside_are_left_out_and_counted(folder):
    point = {"name": "point", "cx": 5, "cy": 5}
    pictures, notes = read(
        folder(
            entry("a.jpg", [region(point), region(RECT | {"width": 0}, kind="cat"), region(kind="cat")]),
            entry("b.jpg", [region(RECT | {"x": 70}, kind="cat"), region(RECT | {"x": 90}, kind="cat"), region(point)]),
        )
    )
    assert objects(pictures) == [("a.jpg", "cat", [5, 6, 20, 10]), ("b.jpg", "cat", [70, 6, 10, 10])]
    assert notes["shape without area, left out"] == ["a.jpg region 0", "a.jpg region 1", "b.jpg region 2"]
    assert notes["shape outside the image, left out"] == ["b.jpg region 1"]
    assert notes["shape beyond the image, clipped at its edge"] == ["b.jpg region 0"]
    assert "3 × shape without area, left out: a.jpg region 0, a.jpg region 1, b.jpg region 2" in notes.lines()


def test_the_outline_stays_as_it_was_drawn(folder):
    polygon = {"name": "polygon", "all_points_x": [1, 30, 30, 1], "all_points_y": [2, 2, 40, 2]}
    pictures, _ = read(folder(entry("a.jpg", [region(polygon, kind="cat")])))
    (seen,) = pictures[0].objects
    assert seen.segmentation == [[1, 2, 30, 2, 30, 40, 1, 2]]
    assert seen.area == 29 * 38 / 2


@pytest.mark.parametrize(
    "shape",
    [
        RECT,
        {"name": "polygon", "all_points_x": [5, 40, 30, 12], "all_points_y": [6, 8, 50, 30]},
        {"name": "polyline", "all_points_x": [5, 40, 30, 12], "all_points_y": [6, 8, 50, 30]},
        {"name": "circle", "cx": 40, "cy": 30, "r": 20},
        {"name": "ellipse", "cx": 40, "cy": 30, "rx": 30, "ry": 12},
        {"name": "ellipse", "cx": 40, "cy": 30, "rx": 30, "ry": 12, "theta": 0.6},
        {"name": "circle", "cx": 70, "cy": 50, "r": 20},
    ],
)
def test_every_shape_becomes_a_polygon_that_covers_it(folder, shape):
    """Against the pixels whose centers are inside by the shape's own formula; the last one reaches over two edges of the image."""
    x, y = np.arange(80)[None] + 0.5, np.arange(60)[:, None] + 0.5
    if shape["name"] == "rect":
        inside = (x > shape["x"]) & (x < shape["x"] + shape["width"]) & (y > shape["y"]) & (y < shape["y"] + shape["height"])
    elif shape["name"] in ("circle", "ellipse"):
        cos, sin = math.cos(shape.get("theta", 0)), math.sin(shape.get("theta", 0))
        along = (x - shape["cx"]) * cos + (y - shape["cy"]) * sin
        across = (y - shape["cy"]) * cos - (x - shape["cx"]) * sin
        inside = (along / shape.get("rx", shape.get("r"))) ** 2 + (across / shape.get("ry", shape.get("r"))) ** 2 < 1
    else:
        image = Image.new("1", (80 * 8, 60 * 8))
        corners = zip(shape["all_points_x"], shape["all_points_y"], strict=True)
        ImageDraw.Draw(image).polygon([(8 * u, 8 * v) for u, v in corners], fill=1)
        inside = np.asarray(image)[4::8, 4::8]
    pictures, _ = read(folder(entry("a.jpg", [region(shape, kind="cat")])))
    (seen,) = pictures[0].objects
    assert len(seen.segmentation) == 1
    mask = decode_masks([read_segmentation(seen.segmentation, (60, 80))], (60, 80))[0]
    assert (mask != inside).sum() <= 0.05 * inside.sum() + 2
    rows, columns = np.nonzero(inside)
    left, top, width, height = seen.box
    assert (left, top) == pytest.approx((columns.min(), rows.min()), abs=1)
    assert (left + width, top + height) == pytest.approx((columns.max() + 1, rows.max() + 1), abs=1)


def test_names_with_spaces_other_letters_and_folders_work(folder):
    names = ("Größe 1.jpg", "風船/赤い 2.jpg")
    pictures, _ = read(folder(*(entry(name, [region(kind="cat")]) for name in names), pictures=names))
    assert {picture.name for picture in pictures} == set(names)
    assert all(picture.path.is_file() for picture in pictures)


def test_a_changed_picture_and_one_that_is_not_listed_are_noted(folder):
    _, notes = read(folder(entry("a.jpg", [region(kind="cat")], size=12)))
    assert notes["image has changed since it was annotated (other byte size)"] == ["a.jpg"]
    assert notes["image is not in the VIA file, left out"] == ["b.jpg"]


def test_labelled_pictures_that_are_missing_are_an_error_others_a_note(folder):
    root = folder(entry("a.jpg", [region(kind="cat")]), entry("gone.jpg", []))
    pictures, notes = read(root)
    assert [picture.name for picture in pictures] == ["a.jpg"]
    assert notes["image without regions is not on disk, left out"] == ["gone.jpg"]
    folder(*(entry(f"gone{number}.jpg", [region(kind="cat")]) for number in range(5)))
    with pytest.raises(UserError, match=r"5 annotated images are not in .*: gone0.jpg, gone1.jpg, gone2.jpg, \.\.\."):
        read(root)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../c.jpg", "C:\\c.jpg", ".."])
def test_a_name_that_leaves_the_folder_is_refused(folder, name):
    for regions in ([], [region(kind="cat")]):
        with pytest.raises(UserError, match=r"leads out|is no file name"):
            read(folder(entry("a.jpg", [region(kind="cat")]), entry(name, regions)))


def test_a_picture_on_its_side_is_taken_as_shown_unless_its_labels_only_fit_as_stored(tmp_path, folder):
    low = region(RECT | {"y": 70}, kind="cat")  # fits 60 x 80 only
    wide = region(RECT | {"x": 60}, kind="cat")  # fits 80 x 60 only
    root = folder(entry("a.jpg", [low]), entry("b.jpg", [wide]), entry("c.jpg", [region(kind="cat")]), pictures=("d.jpg",))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in "abc":
        Image.new("RGB", (80, 60), "grey").save(root / f"{name}.jpg", exif=exif)
    (tmp_path / "d.jpg").unlink()
    pictures, notes = read(root)
    assert [(picture.width, picture.height) for picture in pictures] == [(60, 80), (80, 60), (60, 80)]
    (upright,) = [names for text, names in notes.items() if "labels taken as drawn on the upright image" in text]
    assert upright == ["a.jpg", "c.jpg"]
    assert notes["image is turned by its EXIF tag; sizes and labels show that it was annotated on the stored pixels"] == ["b.jpg"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "not a JSON file"),
        ("[" * 100000, "not a JSON file"),
        ("[1, 2]", "not a file of VIA version 1 or 2"),
        ('{"images": [], "annotations": [], "categories": []}', "not a file of VIA version 1 or 2"),
        ('{"a": {"size": 1, "regions": []}}', "entry 'a' has no filename"),
        ('{"a": {"filename": 3, "regions": []}}', "entry 'a' has no filename"),
        ('{"a": {"filename": "a.jpg", "regions": 7}}', "a.jpg region 0 is not a VIA region"),
        ('{"a": {"filename": "a.jpg", "regions": [7]}}', "a.jpg region 0 is not a VIA region"),
        ('{"a": {"filename": "a.jpg", "regions": [{"shape_attributes": [1]}]}}', "a.jpg region 0 is not a VIA region"),
        ('{"a1": {"filename": "a.jpg", "regions": []}, "a2": {"filename": "a.jpg", "regions": []}}', "a.jpg appears twice"),
    ],
)
def test_what_is_no_via_file_is_told_in_one_line(tmp_path, content, complaint):
    file = tmp_path / "via.json"
    file.write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        read_entries(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_in_another_encoding_is_told(tmp_path):
    (tmp_path / "via.json").write_bytes('{"é": 1}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"via\.json: not UTF-8"):
        read_entries(tmp_path / "via.json")


def test_a_broken_shape_is_named(folder):
    with pytest.raises(UserError, match=r"via_region_data.json: a.jpg region 1: width has nan"):
        read(folder(entry("a.jpg", [region(kind="cat"), region(RECT | {"width": float("nan")}, kind="cat")])))


def test_a_file_that_is_no_picture_is_named(folder):
    root = folder(entry("a.jpg", [region(kind="cat")]))
    (root / "a.jpg").write_text("not a picture")
    with pytest.raises(UserError, match=r"a\.jpg: not an image file"):
        read(root)


def test_the_annotation_file_is_found_or_asked_for(tmp_path):
    with pytest.raises(UserError, match="no VIA annotation file"):
        annotation_file(tmp_path)
    names = ["other.json", "via_export.json", "via_region_data.json"]
    for name in names:
        (tmp_path / name).write_text("{}")
        assert annotation_file(tmp_path).name == name
    (tmp_path / "via_region_data.json").unlink()
    (tmp_path / "via_2.json").write_text("{}")
    with pytest.raises(UserError, match=r"which is the VIA file, via_2.json, via_export.json\?"):
        annotation_file(tmp_path)


# ------------------------------------------------------------------------------------------- one attribute per category


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"red": "red"}, {"blue": "blue"}),
        ({"red": "1"}, {"blue": "1"}),
        ({"red": "true"}, {"blue": "Yes"}),
        ({"red": True, "blue": False}, {"red": False, "blue": True}),
        ({"red": "yes", "blue": "no"}, {"red": "0", "blue": "x"}),
        ({"red": 1, "blue": ""}, {"blue": "1", "red": None}),
        ({"red": ""}, {"blue": ""}),
        ({"red": {"red": True}}, {"blue": {"blue": True}}),
    ],
)
def test_attributes_whose_presence_is_the_category(folder, first, second):
    pictures, notes = read(folder(entry("a.jpg", [region(**first), region(**second)])))
    assert [category for _, category, _ in objects(pictures)] == ["red", "blue"]
    text = "attribute taken as a category, as its values only say that it applies (else choose one with --attribute)"
    assert notes[text] == ["blue", "red"]


@pytest.mark.parametrize("value", ["1", "yes", True, "balloon", "Balloon"])
def test_a_single_attribute_that_only_says_yes_is_the_category(folder, value):
    pictures, _ = read(folder(entry("a.jpg", [region(balloon=value), region(balloon=value)])))
    assert {category for _, category, _ in objects(pictures)} == {"balloon"}


@pytest.mark.parametrize("values", [(0, 1), ("1", "2"), ("red", "1"), ("cat", "dog")])
def test_numbers_and_names_of_a_single_attribute_are_the_categories(folder, values):
    pictures, notes = read(folder(entry("a.jpg", [region(kind=value) for value in values])))
    assert [category for _, category, _ in objects(pictures)] == list(map(str, values))
    assert list(notes) == ["image is not in the VIA file, left out"]


@pytest.mark.parametrize(
    ("first", "second"),
    [({"red": "1", "blue": "1"}, {"blue": "1"}), ({"red": "1"}, {"blue": "dark"}), ({"red": "1", "blue": "0"}, {"red": "0", "blue": "0"})],
)
def test_attributes_that_do_not_exclude_each_other_need_a_choice(folder, first, second):
    with pytest.raises(UserError, match="which region attribute is the category"):
        read(folder(entry("a.jpg", [region(**first), region(**second)])))


# ------------------------------------------------------------------------------------------------ files and their names


@pytest.mark.parametrize(
    "form", ["https://example.org/x/{}?size=1", "C:\\photos\\{}", "/home/x/{}", "x\\{}", "../up/{}", "A.JPG", "./{}", "a.png"]
)
def test_an_image_is_found_by_its_name_whatever_its_path(folder, form):
    name = form.format("a.jpg")
    pictures, notes = read(folder(entry(name, [region(kind="cat")])))
    assert [image.name for image in pictures] == ["a.jpg"]
    assert notes.get("image found under another name or folder") == (None if form == "./{}" else [f"{name} -> a.jpg"])


def test_two_images_of_one_name_in_different_folders(tmp_path, folder):
    names = ("x/a.jpg", "y/a.jpg")
    root = folder(*(entry(name, [region(kind="cat")]) for name in names), pictures=names)
    assert [image.name for image in read(root)[0]] == list(names)
    folder(entry("a.jpg", [region(kind="cat")]), pictures=names)
    with pytest.raises(UserError, match=r"image 'a\.jpg' is ambiguous in .*: x/a\.jpg, y/a\.jpg; keep one"):
        read(root)
    folder(entry("D:/set/y/a.jpg", [region(kind="cat")]), pictures=names)
    assert [image.name for image in read(root)[0]] == ["y/a.jpg"]


def test_subfolders_with_files_of_their_own_are_one_set(tmp_path, folder):
    for part in ("one", "two"):
        folder(entry("a.jpg", [region(kind=part)]), name=f"{part}.json", pictures=(f"{part}/a.jpg",))
        (tmp_path / f"{part}.json").rename(tmp_path / part / "labels.json")
    assert objects(read(tmp_path)[0]) == [("one/a.jpg", "one", [5, 6, 20, 10]), ("two/a.jpg", "two", [5, 6, 20, 10])]


def test_the_test_part_is_said(tmp_path, folder):
    for part in ("train", "test"):
        folder(entry("a.jpg", [region(kind="cat")]), name=f"{part}.json", pictures=(f"{part}/a.jpg",))
        (tmp_path / f"{part}.json").rename(tmp_path / part / "via.json")
    assert read(tmp_path)[1] == {"image of the test part, left out": ["test/a.jpg"]}


def test_a_csv_export(tmp_path, folder):
    folder(entry("a.jpg", [region(kind="cat"), region({"name": "circle", "cx": 40, "cy": 30, "r": 10}, kind="dog")]), entry("b.jpg", []))
    as_json = read(tmp_path)[0]
    (tmp_path / "via_region_data.json").unlink()
    rows = [
        ["filename", "file_size", "file_attributes", "region_count", "region_id", "region_shape_attributes", "region_attributes"],
        ["a.jpg", "", "{}", 2, 0, json.dumps(RECT), json.dumps({"kind": "cat"})],
        ["a.jpg", "", "{}", 2, 1, json.dumps({"name": "circle", "cx": 40, "cy": 30, "r": 10}), json.dumps({"kind": "dog"})],
        ["b.jpg", "", "{}", 0, 0, "{}", "{}"],
    ]
    with (tmp_path / "via_export_csv.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert read(tmp_path)[0] == as_json
    (tmp_path / "via_export_csv.csv").write_text("a.jpg,1,2\n")
    with pytest.raises(UserError, match=r"not a CSV export of VIA: a header with"):
        read(tmp_path)
    (tmp_path / "via_export_csv.csv").write_text("filename,region_shape_attributes,region_attributes\na.jpg,{,{}\n")
    with pytest.raises(UserError, match=r"via_export_csv\.csv, line 2: not valid JSON in a region"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"images": [], "annotations": [], "categories": []}', "it is a COCO file; convert it with --from coco"),
        ('{"project": {}, "config": {}, "file": {}, "metadata": {}}', "it is a project of VIA 3"),
    ],
)
def test_what_it_is_instead_is_said(tmp_path, content, complaint):
    (tmp_path / "via.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_entries(tmp_path / "via.json")
