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


def rename(root, **images):
    """Rename the image of each stem."""
    for stem, name in images.items():
        (root / "JPEGImages" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "JPEGImages" / f"{stem}.jpg").rename(root / "JPEGImages" / name)


@pytest.mark.parametrize("suffix", [".JPG", ".Jpg", ".jfif", ".PNG", ".jpe", ".WEBP"])
@pytest.mark.parametrize("filename", ["a", "a.jpg", "old name.jpg", "", "C:\\photos\\a.jpg", "/home/x/a.jpeg"])
def test_an_image_is_found_by_its_stem_whatever_its_suffix_and_filename(folder, suffix, filename):
    root = folder(a=xml(filename, (80, 60), an_object()))
    rename(root, a=f"a{suffix}")
    splits, notes = read(root)
    assert boxes(splits["train"]) == [(f"a{suffix}", "cat", [4, 5, 20, 10])]
    assert not notes


def test_an_ambiguous_image_names_both_unless_the_filename_decides(folder):
    root = folder(a=xml("a", (80, 60), an_object()))
    Image.new("RGB", (80, 60)).save(root / "JPEGImages" / "a.PNG")
    with pytest.raises(UserError, match=r"a\.xml: its image is ambiguous in .*: a\.PNG and a\.jpg; keep one"):
        read(root)
    (root / "Annotations" / "a.xml").write_text(xml("a.PNG", (80, 60), an_object()))
    assert boxes(read(root)[0]["train"]) == [("a.PNG", "cat", [4, 5, 20, 10])]


def test_subfolders_are_read_and_names_stay_apart(folder):
    root = folder(**{stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "abc"})
    for stem, moved in (("a", "x/p"), ("b", "y/p")):
        for part, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            (root / part / moved).parent.mkdir(exist_ok=True)
            (root / part / f"{stem}{suffix}").rename(root / part / f"{moved}{suffix}")
    splits, notes = read(root)
    assert [image.name for image in splits["train"]] == ["c.jpg", "x/p.jpg", "y/p.jpg"]
    assert not notes
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("x/p\nc\n")
    (lists / "val.txt").write_text("y/p.jpg\n")
    assert [image.name for image in read(root)[0]["val"]] == ["y/p.jpg"]
    (lists / "val.txt").write_text("p\n")
    with pytest.raises(UserError, match=r"val\.txt, line 1: 'p' is ambiguous: "):
        read(root)


def test_annotations_in_subfolders_find_images_without_them(folder):
    root = folder(a=xml("a.jpg", (80, 60), an_object()))
    (root / "Annotations" / "deep").mkdir()
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "deep" / "a.xml")
    assert boxes(read(root)[0]["train"]) == [("a.jpg", "cat", [4, 5, 20, 10])]


@pytest.mark.parametrize(
    ("lists", "train", "val"),
    [
        ({"trainval": "ab", "test": "cd"}, "ab", None),
        ({"train": "a", "trainval": "ab", "test": "cd"}, "a", "b"),
        ({"val": "a", "trainval": "ab", "test": "cd"}, "b", "a"),
        ({"train": "a", "val": "b", "trainval": "ab", "test": "cd"}, "a", "b"),
        ({"train": "ab", "test": "cd"}, "ab", None),
    ],
)
def test_images_of_the_test_list_stay_out(folder, lists, train, val):
    splits, notes = read(folder(lists=lists, **{stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "abcd"}))
    assert {split: "".join(image.path.stem for image in images) for split, images in splits.items()} == {
        "train": train,
        **({"val": val} if val else {}),
    }
    assert notes == {"image is in test.txt, left out": ["c", "d"]}


def test_an_image_in_two_lists_is_noted(folder):
    labels = {stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "abc"}
    splits, notes = read(folder(lists={"train": "ab", "val": "bc", "test": "c"}, **labels))
    assert [image.path.stem for image in splits["val"]] == ["b", "c"]
    assert notes["image is in both train.txt and val.txt"] == ["b"]
    assert notes["image is in test.txt, but also in another list: taken"] == ["c"]


@pytest.mark.parametrize("line", ["a", "a  1", "a -1", "a 0", "a.jpg", "a.JPG 1", "JPEGImages/a.jpg", "images\\a.png", "\ufeffa", "a.xml"])
def test_lines_of_a_list_may_have_flags_suffixes_and_folders(folder, line):
    labels = {stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "ab"}
    splits, _ = read(folder(lists={"train": [line], "val": ["b"]}, **labels))
    assert [image.name for image in splits["train"]] == ["a.jpg"]


def test_stems_may_look_like_flags_and_suffixes(folder):
    labels = {stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in ("a 1", "a", "first.name", "b c")}
    splits, _ = read(folder(lists={"train": ["a 1", "first.name", "b c  1"], "val": ["a"]}, **labels))
    assert [image.name for image in splits["train"]] == ["a 1.jpg", "first.name.jpg", "b c.jpg"]


@pytest.mark.parametrize("place", ["ImageSets/Main", "ImageSets", "."])
def test_lists_are_found_where_tools_put_them(folder, place):
    root = folder(**{stem: xml(f"{stem}.jpg", (80, 60), an_object()) for stem in "ab"})
    (root / place).mkdir(parents=True, exist_ok=True)
    (root / place / "train.txt").write_text("a\n")
    (root / place / "val.txt").write_text("b\n")
    assert [image.name for image in read(root)[0]["val"]] == ["b.jpg"]


def test_a_devkit_and_several_of_them(folder, tmp_path):
    for year, stem in (("VOCdevkit/VOC2007", "a"), ("VOCdevkit/VOC2012", "b")):
        folder(f"{year}/Annotations", f"{year}/JPEGImages", **{stem: xml(f"{stem}.jpg", (80, 60), an_object())})
    assert [image.name for image in read(tmp_path / "VOCdevkit")[0]["train"]] == ["VOC2007/a.jpg", "VOC2012/b.jpg"]
    assert len(read(tmp_path)[0]["train"]) == 2
    (tmp_path / "VOCdevkit" / "VOC2012").rename(tmp_path / "elsewhere")
    assert [image.name for image in read(tmp_path / "VOCdevkit")[0]["train"]] == ["a.jpg"]


def test_splits_with_folders_of_their_own_and_a_test_part(folder, tmp_path):
    for split in ("train", "val", "test"):
        folder(f"{split}/annotations", f"{split}/images", **{split: xml(f"{split}.jpg", (80, 60), an_object())})
    splits, notes = read(tmp_path)
    assert {split: [image.name for image in images] for split, images in splits.items()} == {"train": ["train.jpg"], "val": ["val.jpg"]}
    assert notes == {"image of the test part, left out": ["test/images/test.jpg"]}


def test_outlines_are_kept(folder):
    roboflow = "<polygon><x1>5</x1><y1>6</y1><x2>24</x2><y2>6</y2><x3>24</x3><y3>15</y3></polygon>"
    points = "<polygon><pt><x>5</x><y>6</y></pt><pt><x>24</x><y>6</y></pt><pt><x>24</x><y>15</y></pt></polygon>"
    point = "<polygon><x1>5</x1><y1>6</y1></polygon>"
    objects = [an_object().replace("</object>", f"{polygon}</object>") for polygon in (roboflow, points, point)]
    first, second, third = read(folder(a=xml("a.jpg", (80, 60), *objects)))[0]["train"][0].objects
    assert first == second
    assert (first.segmentation, first.box, first.area) == ([[5, 6, 24, 6, 24, 15]], [4, 5, 20, 10], 19 * 9 / 2)
    assert (third.segmentation, third.area) == ([], 200)


def test_a_rotated_box_gives_its_corners(folder):
    rotated = "<robndbox><cx>40</cx><cy>30</cy><w>20</w><h>10</h><angle>1.5707963</angle></robndbox>"
    splits, _ = read(folder(a=xml("a.jpg", (80, 60), f"<object><name>cat</name>{rotated}</object>")))
    (seen,) = splits["train"][0].objects
    assert seen.box == [35, 20, 10, 20]
    assert seen.area == 200
    assert len(seen.segmentation[0]) == 8
    with pytest.raises(UserError, match="object 1: robndbox needs a number"):
        read(folder(a=xml("a.jpg", (80, 60), f"<object><name>cat</name>{rotated.replace('40', 'x')}</object>")))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_and_not_expanded(folder, encoding):
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "cat"><!ENTITY c "&b;&b;">]>'
    root = folder(a="")
    (root / "Annotations" / "a.xml").write_bytes((bomb + xml("a.jpg", (80, 60), an_object(name="&c;"))).encode(encoding))
    with pytest.raises(UserError, match=r"a\.xml: declares the XML entity 'b'"):
        read(root)
    outside = f'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]>{xml("a.jpg", (80, 60), an_object(name="&e;"))}'
    (root / "Annotations" / "a.xml").write_text(outside)
    with pytest.raises(UserError, match="declares the XML entity 'e'"):
        read(root)


def test_the_xml_of_cvat_is_named_as_such(folder):
    with pytest.raises(UserError, match="CVAT's own XML; export from CVAT as COCO or VOC"):
        read(folder(a="<annotations><version>1.1</version></annotations>"))
