import pytest
from PIL import Image

from raydetr.data.formats.labels import Notes, Options
from raydetr.data.formats.voc import read_voc
from raydetr.errors import UserError


def xml(name="a.jpg", size=(80, 60), *objects):
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>{name}</filename>{sides}{''.join(objects)}</annotation>"


def an_object(name="cat", box=(5, 6, 24, 15), difficult=0):
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object>{part}<name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


@pytest.fixture
def folder(tmp_path):
    """A way to write pictures of 80 x 60 with their XML, in VOC's own layout."""

    def write(annotations="Annotations", images="JPEGImages", lists=None, **labels):
        for place in (annotations, images):
            (tmp_path / place).mkdir(exist_ok=True, parents=True)
        for stem, text in labels.items():
            (tmp_path / annotations / f"{stem}.xml").write_text(text, encoding="utf-8")
            Image.new("RGB", (80, 60), "grey").save(tmp_path / images / f"{stem}.jpg")
        for split, stems in (lists or {}).items():
            file = tmp_path / "ImageSets" / "Main" / f"{split}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(stems) + "\n")
        return tmp_path

    return write


def read(folder, category=None):
    notes = Notes()
    return read_voc(folder, Options(category), notes), notes


def boxes(pictures):
    return [(picture.name, each.category, each.box) for picture in pictures for each in picture.objects]


def test_pixels_are_counted_from_one_and_the_last_belongs_to_the_box(folder):
    whole, one = an_object(box=(1, 1, 80, 60)), an_object(box=(7, 8, 7, 8))
    splits, notes = read(folder(a=xml("a.jpg", (80, 60), whole, one)))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [0, 0, 80, 60]), ("a.jpg", "cat", [6, 7, 1, 1])]
    assert [each.area for each in splits["train"][0].objects] == [4800, 1]
    assert [each.segmentation for each in splits["train"][0].objects] == [[], []]
    assert not notes


def test_a_box_counted_from_zero_is_cut_at_the_edge(folder):
    splits, notes = read(folder(a=xml("a.jpg", (80, 60), an_object(box=(0, 0, 9, 9)))))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [0, 0, 9, 9])]
    assert notes["shape beyond the image, clipped at its edge"] == ["a.jpg object 1"]


def test_the_lists_make_the_splits_and_what_they_leave_out_is_noted(folder):
    labels = {stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "abcd"}
    splits, notes = read(folder(lists={"train": ["c", "", "a"], "val": ["b"], "test": ["d"]}, **labels))
    assert [picture.name for picture in splits["train"]] == ["c.jpg", "a.jpg"]
    assert [picture.name for picture in splits["val"]] == ["b.jpg"]
    assert notes["image is in test.txt, left out"] == ["d"]


def test_one_list_alone_is_no_split(folder):
    with pytest.raises(UserError, match=r"both train\.txt and val\.txt are needed"):
        read(folder(lists={"train": ["a"]}, a=xml("a.jpg", (80, 60), an_object())))


def test_a_list_cannot_lead_out_of_the_folder(folder):
    with pytest.raises(UserError, match="there is no XML for"):
        read(folder(lists={"train": ["a"], "val": ["../../a"]}, a=xml("a.jpg", (80, 60), an_object())))


def test_other_layouts(folder, tmp_path):
    splits, notes = read(folder("annotations", "images", a=xml("a.jpg", (80, 60), an_object())))
    assert list(splits) == ["train"]
    assert boxes(splits["train"]) == [("a.jpg", "cat", [4, 5, 20, 10])]
    folder("side/train", "side/train", a=xml("a.jpg", (80, 60), an_object()))
    folder("side/valid", "side/valid", b=xml("b.jpg", (80, 60), an_object("dog")))
    Image.new("RGB", (8, 6)).save(tmp_path / "side" / "valid" / "new.png")
    splits, notes = read(tmp_path / "side")
    assert (boxes(splits["train"])[0][:2], boxes(splits["val"])[0][:2]) == (("a.jpg", "cat"), ("b.jpg", "dog"))
    assert notes["image without an XML file, left out"] == ["new.png"]


def test_difficult_objects_are_kept_and_noted_and_a_category_goes_for_all(folder):
    splits, notes = read(folder(a=xml("a.jpg", None, an_object(difficult=1), an_object("dog"))), category="animal")
    assert [category for _, category, _ in boxes(splits["train"])] == ["animal", "animal"]
    assert notes["object marked difficult, kept"] == ["a.jpg object 1"]


@pytest.mark.parametrize(("size", "factor"), [((160, 120), 0.5), ((40, 30), 2), ((80, 60), 1), ((0, 0), 1)])
def test_an_xml_of_another_size_by_a_whole_factor_scales_the_boxes(folder, size, factor):
    splits, notes = read(folder(a=xml("a.jpg", size, an_object(box=(5, 6, 24, 15)))))
    (image,) = splits["train"]
    assert (image.width, image.height) == (80, 60)
    assert image.objects[0].box == [4 * factor, 5 * factor, 20 * factor, 10 * factor]
    assert image.objects[0].area == 200 * factor**2
    text = "image has another size than its annotation says, boxes scaled"
    assert notes == ({} if factor == 1 else {text: [f"a.jpg ({size[0]} x {size[1]}, is 80 x 60)"]})


@pytest.mark.parametrize("size", [(100, 75), (160, 60), (60, 80), (81, 60), (1, 1)])
def test_an_xml_of_any_other_size_is_an_error(folder, size):
    with pytest.raises(UserError, match=rf"a\.xml: a\.jpg: the image is 80 x 60 pixels, its annotation says {size[0]} x {size[1]}"):
        read(folder(a=xml("a.jpg", size, an_object())))


def test_a_picture_without_objects_stays(folder):
    splits, _ = read(folder(a=xml("a.jpg", (80, 60)), b=xml("b.jpg", (80, 60), an_object())))
    assert [len(picture.objects) for picture in splits["train"]] == [0, 1]


def test_the_filename_in_the_xml_counts_where_no_picture_has_the_name_of_the_xml(folder):
    root = folder(a=xml("other.png", (80, 60), an_object()))
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "other.png")
    assert read(root)[0]["train"][0].name == "other.png"
    (root / "Annotations" / "a.xml").write_text(xml("../../secret.png", (80, 60), an_object()))
    with pytest.raises(UserError, match="leads out"):
        read(root)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<annotation>", "not an XML file"),
        ("", "not an XML file"),
        (xml("a.jpg", None, an_object(name="  ")), "object 1 has no name"),
        (xml("a.jpg", None, "<object><name>cat</name></object>"), "object 1: bndbox needs a number"),
        (xml("a.jpg", None, an_object(), an_object(box=(1, 2, "x", 4))), "object 2: bndbox needs a number"),
        (xml("a.jpg", None, an_object(box=(10, 2, 5, 4))), "object 1: box from .10.0, 2.0. to .5.0, 4.0. is turned inside out"),
        (xml("a.jpg", None, an_object(box=(1, 2, "nan", 4))), "not finite"),
        (xml("a.jpg", None, an_object(box=(1, 2, "inf", 4))), "not finite"),
    ],
)
def test_a_broken_annotation_is_named(folder, text, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        read(folder(a=text))
    assert "a.xml" in str(error.value)


def test_missing_files_are_named(folder):
    root = folder(lists={"train": ["a", "b"], "val": ["a"]}, a=xml("a.jpg", None, an_object()))
    with pytest.raises(UserError, match=r"train\.txt, line 2: No such file: there is no XML for 'b'"):
        read(root)
    (root / "Annotations" / "b.xml").write_text(xml("b.jpg"))
    with pytest.raises(UserError, match=r"b\.xml: No such file: image 'b\.jpg' is not in"):
        read(root)


def test_a_folder_without_annotations_is_told(tmp_path):
    with pytest.raises(UserError, match="no VOC annotation"):
        read(tmp_path)
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(UserError, match="no images; they belong in the folder JPEGImages or images"):
        read(tmp_path)


def test_blood_cells(shared_data):
    splits, notes = read(shared_data("bccd"))
    assert {split: len(pictures) for split, pictures in splits.items()} == {"train": 205, "val": 87}
    assert {split: len(boxes(pictures)) for split, pictures in splits.items()} == {"train": 2805, "val": 1138}
    assert {category for _, category, _ in boxes(splits["train"])} == {"RBC", "WBC", "Platelets"}
    assert [(what, len(places)) for what, places in notes.items()] == [("image is in test.txt, left out", 72)]
