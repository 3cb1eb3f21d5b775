import pytest
from PIL import Image

from raydetr.data.formats.labels import Notes
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
    return read_yolo(folder, category, notes), notes


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


def test_a_flat_folder_with_folders_below_it_and_classes_txt(folder):
    files = {"images/a.jpg": None, "images/more/b.png": None, "labels/more/b.txt": "1 0.5 0.5 1 1", "labels/classes.txt": "cat\ndog\n\n"}
    splits, notes = read(folder(files))
    assert list(splits) == ["train"]
    assert [(picture.name, len(picture.objects)) for picture in splits["train"]] == [("a.jpg", 0), ("more/b.png", 1)]
    assert notes["picture without a label file, taken as one without objects"] == ["a.jpg"]


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
    assert notes["shape beyond the picture, cut at its edge"] == ["a.txt line 1"]


def test_a_category_goes_for_all_and_needs_no_names(folder):
    splits, _ = read(folder(one("5 0.5 0.5 1 1") | {"data.yaml": "nc: 6"}), category="thing")
    assert [category for _, category, _ in boxes(splits["train"])] == ["thing"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("cat 0.5 0.5 1 1", "a.txt, line 1: not a line of numbers"),
        ("0 0.5 0.5 1 1\n0 0.5 0.5 1", "a.txt, line 2: 4 numbers"),
        ("0 0.5 0.5 1 1 0.9", "a.txt, line 1: 6 numbers"),
        ("0 40 30 20 10", "a.txt, line 1: places and sizes must be fractions"),
        ("0 0.5 0.5 -0.1 0.2", "a.txt, line 1: places and sizes must be fractions"),
        ("0 nan 0.5 0.1 0.2", "a.txt, line 1: places and sizes must be fractions"),
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
        ("train: [images]\n" + NAMES, "must name one folder"),
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
    with pytest.raises(UserError, match="no picture with a label file"):
        read(folder({"images/a.jpg": None, "data.yaml": NAMES}))
    with pytest.raises(UserError, match="validation pictures but no training pictures"):
        read(folder({"images/val/a.jpg": None, "data.yaml": NAMES}))


def test_labels_in_another_encoding_are_told(folder):
    root = folder(one("0 0.5 0.5 1 1"))
    (root / "labels" / "a.txt").write_bytes(b"\xff\xfe0 0.5")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        read(root)
