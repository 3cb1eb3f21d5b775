import pytest
import yaml
from PIL import Image

from raydetr.data.formats.labels import Notes, Options
from raydetr.data.formats.yolo import read_yolo
from raydetr.errors import UserError

NAMES = "names: [cat, dog]\n"


@pytest.fixture
def folder(tmp_path):
    """A way to write a tree of files: pictures of 80 x 60 and texts."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".jpg", ".png"):
                Image.new("RGB", (80, 60), "grey").save(path)
            else:
                path.write_text(text)
        return tmp_path

    return write


def read(folder, category=None):
    notes = Notes()
    return read_yolo(folder, Options(category), notes), notes


def boxes(pictures):
    return [(picture.name, each.category, each.box) for picture in pictures for each in picture.objects]


def one(line):
    return {"images/a.jpg": None, "labels/a.txt": line, "data.yaml": NAMES}


@pytest.mark.parametrize(
    "layout",
    [
        ("images/train/a.jpg", "labels/train/a.txt", "images/val/b.jpg", "labels/val/b.txt", NAMES),
        ("train/images/a.jpg", "train/labels/a.txt", "valid/images/b.jpg", "valid/labels/b.txt", NAMES),
        ("one/images/a.jpg", "one/labels/a.txt", "two/b.jpg", "two/b.txt", "train: one/images\nval: ./two\n" + NAMES),
        ("t/images/a.jpg", "t/labels/a.txt", "v/images/b.jpg", "v/labels/b.txt", "train: ../t/images\nval: ../v/images\n" + NAMES),
        ("x/images/a.jpg", "x/labels/a.txt", "x/images2/b.jpg", "x/images2/b.txt", "path: x\ntrain: images\nval: images2\n" + NAMES),
        ("i/a.jpg", "i/a.txt", "j/b.jpg", "j/b.txt", "path: /elsewhere\ntrain: i\nval: j\nnames: {0: cat, 1: dog}\n"),
    ],
)
def test_layouts(folder, layout):
    train, train_labels, val, val_labels, settings = layout
    files = {train: None, train_labels: "0 0.5 0.5 0.25 0.5\n", val: None, val_labels: "1 0.25 0.5 0.5 1\n", "data.yaml": settings}
    splits, notes = read(folder(files))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [30, 15, 20, 30])]
    assert boxes(splits["val"]) == [("b.jpg", "dog", [0, 0, 40, 60])]
    assert not notes


def test_classes_of_one_name_become_one_category_and_this_is_said(folder):
    files = {**one("0 0.5 0.5 0.25 0.5\n2 0.5 0.5 0.25 0.5\n"), "data.yaml": "names: [cat, dog, cat]\n"}
    splits, notes = read(folder(files))
    assert {each.category for each in splits["train"][0].objects} == {"cat"}
    assert notes == {"name of several classes, which become one category": ["cat"]}


def test_a_blank_line_among_the_class_names_counts(folder):
    files = {"images/a.jpg": None, "labels/a.txt": "2 0.5 0.5 0.25 0.5\n", "classes.txt": "cat\n\ndog\n\n"}
    assert [each.category for each in read(folder(files))[0]["train"][0].objects] == ["dog"]
    (folder({"labels/a.txt": "1 0.5 0.5 0.25 0.5\n"}))
    with pytest.raises(UserError, match=r"a\.txt, line 1: class 1 has no name"):
        read(folder({}))


def test_a_flat_folder_with_folders_below_it_and_classes_txt(folder):
    files = {"images/a.jpg": None, "images/more/b.png": None, "labels/more/b.txt": "1 0.5 0.5 1 1", "labels/classes.txt": "cat\ndog\n\n"}
    splits, notes = read(folder(files))
    assert list(splits) == ["train"]
    assert [(picture.name, len(picture.objects)) for picture in splits["train"]] == [("a.jpg", 0), ("more/b.png", 1)]
    assert notes["image without a label file, taken as one without objects"] == ["a.jpg"]


def test_an_outline_gives_its_polygon_box_and_area(folder):
    splits, _ = read(folder(one("\n0 0.1 0.1 0.5 0.1 0.5 0.5\n\n")))
    (seen,) = splits["train"][0].objects
    assert seen.segmentation == [[8, 6, 40, 6, 40, 30]]
    assert seen.box == [8, 6, 32, 24]
    assert seen.area == 32 * 24 / 2


def test_rounding_beyond_the_edge_is_cut_in_silence_more_is_noted(folder):
    splits, notes = read(folder(one("0 0.5 0.5 1.001 1\n")))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [0, 0, 80, 60])]
    assert not notes
    splits, notes = read(folder(one("0 0.5 0.5 1.2 1\n")))
    assert boxes(splits["train"]) == [("a.jpg", "cat", [0, 0, 80, 60])]
    assert notes["shape beyond the image, clipped at its edge"] == ["a.txt line 1"]


def test_a_category_goes_for_all_and_needs_no_names(folder):
    splits, _ = read(folder(one("5 0.5 0.5 1 1") | {"data.yaml": "nc: 6"}), category="thing")
    assert [category for _, category, _ in boxes(splits["train"])] == ["thing"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cat 0.5 0.5 1 1", "a.txt, line 1: not a line of numbers"),
        ("0 0.5 0.5 1 1\n0 0.5 0.5 1", "a.txt, line 2: 4 numbers"),
        ("0 0.5 0.5 1 1 0.9", "a.txt, line 1: 6 numbers"),
        ("0 40 30 20 10", "a.txt, line 1: positions and sizes must be fractions"),
        ("0 0.5 0.5 -0.1 0.2", "a.txt, line 1: positions and sizes must be fractions"),
        ("0 nan 0.5 0.1 0.2", "a.txt, line 1: positions and sizes must be fractions"),
        ("2 0.5 0.5 1 1", "a.txt, line 1: class 2 has no name; the classes go from 0 to 1"),
        ("-1 0.5 0.5 1 1", "a.txt, line 1: class -1 has no name"),
        ("0.5 0.5 0.5 1 1", "a.txt, line 1: class 0.5 has no name"),
        ("nan 0.5 0.5 1 1", "a.txt, line 1: class nan has no name"),
    ],
)
def test_a_broken_line_is_named(folder, line, complaint):
    with pytest.raises(UserError, match=complaint):
        read(folder(one(line)))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("names: [", "data.yaml: not a YAML file"),
        ("- cat", "data.yaml: expected names"),
        ("nc: 2", "no class names"),
        ("names: cat", "no class names"),
        ("names: []", "no class names"),
        ("names: {a: cat}", "no class names"),
        ("train: ../../outside\nval: images\n" + NAMES, "names '../../outside', which is no folder in"),
        ("train: images\nval: /etc\n" + NAMES, "names '/etc', which is no folder in"),
        ("train: [images, 3/4]\n" + NAMES, "names '3/4', which is no folder in"),
        ("train: {a: images}\n" + NAMES, "must name folders of images or lists of them"),
        ("train: a.json\n" + NAMES, "names 'a.json', which is no folder"),
    ],
)
def test_broken_settings_are_told(folder, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        read(folder(one("0 0.5 0.5 1 1") | {"data.yaml": settings}))


def test_a_folder_outside_is_refused_also_where_it_exists(folder, tmp_path):
    files = {f"set/{name}": text for name, text in one("0 0.5 0.5 1 1").items()} | {"outside/b.jpg": None, "outside/b.txt": "0 0.5 0.5 1 1"}
    folder(files | {"set/data.yaml": "train: images\nval: ../outside\n" + NAMES})
    with pytest.raises(UserError, match="is no folder in"):
        read(tmp_path / "set")


def test_pictures_without_any_label_are_no_set(folder):
    with pytest.raises(UserError, match="no image of train has a label file"):
        read(folder({"images/a.jpg": None, "data.yaml": NAMES}))
    with pytest.raises(UserError, match="validation images but no training images"):
        read(folder({"images/val/a.jpg": None, "data.yaml": NAMES}))


def test_labels_in_another_encoding_are_told(folder):
    root = folder(one("0 0.5 0.5 1 1"))
    (root / "labels" / "a.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        read(root)


def pose(values, box="0.5 0.5 0.25 0.5"):
    return f"1 {box} " + " ".join(["0.5"] * values)


@pytest.mark.parametrize("shape", ["[2, 2]", "[2, 3]", "[17, 3]", "[1, 2]", "[4, 2]"])
def test_keypoints_are_left_out_and_the_box_is_kept(folder, shape):
    keypoints, size = yaml.safe_load(shape)
    files = {"images/a.jpg": None, "labels/a.txt": pose(keypoints * size), "data.yaml": f"kpt_shape: {shape}\n{NAMES}"}
    splits, notes = read(folder(files))
    assert boxes(splits["train"]) == [("a.jpg", "dog", [30, 15, 20, 30])]
    assert splits["train"][0].objects[0].segmentation == []
    (text,) = notes
    assert "keypoints (kpt_shape)" in text


@pytest.mark.parametrize("values", [0, 3, 5, 7, 8])
def test_a_line_of_another_length_than_kpt_shape_says_is_an_error(folder, values):
    files = {"images/a.jpg": None, "labels/a.txt": f"{pose(6)}\n{pose(values)}", "data.yaml": "kpt_shape: [2, 3]\n" + NAMES}
    with pytest.raises(UserError, match=rf"a\.txt, line 2: {5 + values} numbers; with this kpt_shape a line has 11"):
        read(folder(files))


@pytest.mark.parametrize("shape", ["17", "[17]", "[17, 3, 1]", "[a, 3]", "[0, 3]", "[17, 4]", "{a: 1}"])
def test_a_broken_kpt_shape_is_told(folder, shape):
    with pytest.raises(UserError, match=r"data\.yaml: kpt_shape"):
        read(folder(one(pose(6)) | {"data.yaml": f"kpt_shape: {shape}\n{NAMES}"}))


@pytest.mark.parametrize("name", ["no", "yes", "on", "off", "null", "~", "true", "1", "1.0", "0x10", "1_000", "2020-01-01", "1e3", "y"])
@pytest.mark.parametrize(
    "form", ["names: [{}, other]", "names: {{0: {}, 1: other}}", "names:\n  - {}\n  - other", "names: {{'0': {}, '1': other}}"]
)
def test_class_names_are_text(folder, name, form):
    splits, _ = read(folder(one("0 0.5 0.5 1 1") | {"data.yaml": form.format(name)}))
    assert [category for _, category, _ in boxes(splits["train"])] == [name]


LINE = "0 0.5 0.5 0.25 0.5\n"
PAIRS = {f"images/{stem}.jpg": None for stem in "abc"} | {f"labels/{stem}.txt": LINE for stem in "abc"}


@pytest.mark.parametrize(
    ("lists", "settings"),
    [
        ({"train.txt": "./images/a.jpg\n./images/b.jpg\n", "val.txt": "./images/c.jpg\n"}, "train: train.txt\nval: val.txt\n"),
        ({"train.txt": "images/a.jpg\n\nimages/b.jpg\r\n", "val.txt": "images/c.jpg"}, ""),
        ({"x/t.txt": "../images/a.jpg\n/data/set/images/b.jpg\n", "x/v.txt": "C:\\set\\images\\c.jpg"}, "train: x/t.txt\nval: x/v.txt\n"),
        (
            {"train.txt": "images/a.jpg", "more.txt": "images/b.jpg", "val.txt": "images/c.jpg"},
            "train: [train.txt, more.txt]\nval: [val.txt]\n",
        ),
        (
            {"train.txt": "images/a.jpg\nimages/b.jpg", "val.txt": "images/c.jpg"},
            "path: ../datasets/coco\ntrain: train.txt\nval: val.txt\ntest: no.txt\n",
        ),
    ],
)
def test_lists_of_images_make_the_splits(folder, lists, settings):
    splits, notes = read(folder({**PAIRS, **lists, "data.yaml": settings + NAMES}))
    assert {split: [image.name for image in images] for split, images in splits.items()} == {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg"]}
    assert not notes


def test_lists_leave_out_what_is_missing_and_never_leave_the_folder(folder, tmp_path):
    files = {f"set/{name}": text for name, text in {**PAIRS, "data.yaml": NAMES}.items()}
    lists = {"set/train.txt": "images/a.jpg\nimages/gone.jpg\n../outside/d.jpg\n", "set/val.txt": "images/b.jpg"}
    folder({**files, **lists, "outside/d.jpg": None, "outside/d.txt": LINE})
    splits, notes = read(tmp_path / "set")
    assert [image.name for image in splits["train"]] == ["a.jpg"]
    assert notes["image of train.txt is not in the folder, left out"] == ["images/gone.jpg", "../outside/d.jpg"]
    assert notes["image is neither in train nor in val, left out"] == ["images/c.jpg"]
    (tmp_path / "set" / "train.txt").write_text("gone.jpg")
    with pytest.raises(UserError, match=r"train\.txt: none of the images that it lists"):
        read(tmp_path / "set")


def test_several_folders_are_one_split_and_keep_their_names_apart(folder):
    files = {f"images/{part}/a.jpg": None for part in ("one", "two", "val")} | {
        f"labels/{part}/a.txt": LINE for part in ("one", "two", "val")
    }
    splits, _ = read(folder({**files, "data.yaml": "train: [images/one, images/two]\nval: images/val\n" + NAMES}))
    assert [image.name for image in splits["train"]] == ["one/a.jpg", "two/a.jpg"]
    assert [image.name for image in splits["val"]] == ["a.jpg"]


def test_the_yaml_file_with_names_is_taken_two_are_ambiguous(folder, tmp_path):
    root = folder({**PAIRS, "dataset.yaml": NAMES, "hyp.yaml": "lr0: 0.01\n", "args.yml": "- 1\n"})
    assert len(read(root)[0]["train"]) == 3
    (root / "other.yaml").write_text(NAMES)
    with pytest.raises(UserError, match=r"which YAML file describes the set, dataset\.yaml, other\.yaml"):
        read(root)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [("images/{}", ""), ("{}/images", ""), ("{}/images", "train: ../train/images\nval: ../val/images\ntest: ../test/images\n")],
)
def test_what_is_passed_over_is_said(folder, layout, settings):
    files = {"data.yaml": settings + NAMES, "extra/x.jpg": None}
    for split in ("train", "val", "test"):
        images = layout.format(split)
        files |= {f"{images}/{split}.jpg": None, f"{images.replace('images', 'labels')}/{split}.txt": LINE}
    files[f"{layout.replace('images', 'labels').format('train')}/lonely.txt"] = LINE
    files[f"{layout.replace('images', 'labels').format('train')}/classes.txt"] = "cat\n"
    _, notes = read(folder(files))
    assert notes["image of the test part, left out"] == [f"{layout.format('test')}/test.jpg"]
    assert notes["image is neither in train nor in val, left out"] == ["extra/x.jpg"]
    assert notes["label file without its image, left out"] == [f"{layout.replace('images', 'labels').format('train')}/lonely.txt"]
    assert len(notes) == 3


def test_one_folder_for_both_splits_is_noted(folder):
    splits, notes = read(folder({**PAIRS, "data.yaml": "train: images\nval: images\n" + NAMES}))
    assert len(splits["train"]) == len(splits["val"]) == 3
    assert notes == {"image is in both train and val": ["images/a.jpg", "images/b.jpg", "images/c.jpg"]}


def test_the_export_of_cvat(folder):
    files = {f"obj_{split}_data/{split}.{suffix}": LINE for split in ("train", "valid") for suffix in ("jpg", "txt")}
    files |= {"obj.names": "cat\n", "obj.data": "classes = 1\n", "train.txt": "data/obj_train_data/train.jpg\n"}
    splits, _ = read(folder(files))
    assert {split: boxes(images) for split, images in splits.items()} == {
        "train": [("train.jpg", "cat", [30, 15, 20, 30])],
        "val": [("valid.jpg", "cat", [30, 15, 20, 30])],
    }


def test_pixels_instead_of_fractions_are_named_as_such(folder):
    with pytest.raises(UserError, match="must be fractions of the image, from 0 to 1; these look like pixels"):
        read(folder(one("0 40 30 20 10")))
