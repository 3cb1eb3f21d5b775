import pytest
from PIL import Image

from raydetr.data.formats.convert import convert
from raydetr.data.formats.csv_table import read_csv
from raydetr.data.formats.labels import Notes, Options
from raydetr.errors import UserError

HEADER = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
ROW = "a.jpg,80,60,cat,4,5,24,15\n"
ONE = ("a.jpg", "cat", [4, 5, 20, 10])


def read(folder, category=None):
    notes = Notes()
    return read_csv(folder, Options(category), notes), notes


def objects(images):
    return [(image.name, each.category, each.box) for image in images for each in image.objects]


@pytest.mark.parametrize(
    "text",
    [
        HEADER + ROW,
        (HEADER + ROW).replace(",", ";"),
        (HEADER + ROW).replace(",", "\t"),
        "\ufeff" + (HEADER + ROW).replace("\n", "\r\n") + "\r\n",
        'Image,Label,X1,Y1,X2,Y2\n"a.jpg","cat",4.0,5.0,24.0,15.0\n',
        "label,left,top,right,bottom,path\ncat,4,5,24,15,C:\\x\\A.JPG\n",
    ],
)
def test_headers_and_delimiters(write, text):
    splits, _ = read(write({"a.jpg": None, "labels.csv": text}))
    assert objects(splits["train"]) == [ONE]


def test_rows_of_one_image_and_images_without_objects(write):
    text = HEADER + ROW + "b.jpg,80,60,,,,,\n" + "a.jpg,80,60,dog,0,0,80,60\n"
    splits, notes = read(write({"a.jpg": None, "b.jpg": None, "c.jpg": None, "labels.csv": text}))
    assert objects(splits["train"]) == [ONE, ("a.jpg", "dog", [0, 0, 80, 60])]
    assert [(image.name, len(image.objects)) for image in splits["train"]] == [("a.jpg", 2), ("b.jpg", 0)]
    assert notes == {"image is not in the CSV table, left out": ["c.jpg"]}


@pytest.mark.parametrize("layout", ["{}/_annotations.csv", "{}_labels.csv", "data/{}_labels.csv"])
def test_splits(write, layout):
    files = {layout.format(split): HEADER + ROW.replace("a.jpg", f"{split}.jpg") for split in ("train", "val", "test")}
    folder = "{}" if layout.startswith("{}/") else "images"
    splits, notes = read(write({**files, **{f"{folder.format(split)}/{split}.jpg": None for split in ("train", "val")}}))
    assert {split: [image.path.name for image in images] for split, images in splits.items()} == {
        split: [f"{split}.jpg"] for split in ("train", "val")
    }
    assert notes["file of the test part, left out"] == [layout.format("test")]
    assert not any("not in the CSV table" in text for text in notes)


def test_one_category_for_all_needs_no_column(write):
    splits, _ = read(write({"a.jpg": None, "labels.csv": "file,x1,y1,x2,y2\na.jpg,4,5,24,15\n"}), category="thing")
    assert objects(splits["train"]) == [("a.jpg", "thing", [4, 5, 20, 10])]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (ROW, r"labels\.csv: its first line is no header with the columns filename, class, xmin, ymin, xmax, ymax"),
        ("", r"its first line is no header"),
        (HEADER.replace("class,", "") + ROW, r"its first line is no header with the columns class;"),
        (HEADER + "a.jpg,80,60\n", r"labels\.csv, line 2: 3 values in 8 columns"),
        (HEADER + ROW.replace("cat", ""), r"line 2: no category"),
        (HEADER + ROW.replace("24", "wide"), r"line 2: .* are not four numbers"),
        (HEADER + ROW.replace("24", "nan"), r"line 2: .* are not four numbers"),
        (HEADER + ROW.replace("24", "3"), r"line 2: box from \(4, 5\) to \(3, 15\) is turned inside out"),
        (HEADER + ROW.replace("a.jpg", "gone.jpg"), r"line 2: No such file: image 'gone\.jpg'"),
        (HEADER + ROW.replace("a.jpg", "../x/b.jpg"), r"line 2: file name .* leads out"),
        (HEADER + ROW.replace("80", "100"), r"its annotation says 100 x 60"),
    ],
)
def test_broken_tables_are_told(write, text, complaint):
    root = write({"a.jpg": None, "labels.csv": text})
    with pytest.raises(UserError, match=complaint):
        read(root / "labels.csv")


def test_a_folder_without_a_table_is_told(write):
    with pytest.raises(UserError, match="no CSV table of boxes"):
        read(write({"a.jpg": None, "other.csv": "a,b\n1,2\n"}))


@pytest.mark.parametrize("source", [None, "csv"])
def test_a_folder_with_a_table_without_a_header_says_so(tmp_path, source):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text("a.jpg,1,1,20,20,cat\n")
    with pytest.raises(UserError, match=r"labels\.csv: its first line is no header with the columns filename, class, xmin, ymin"):
        convert(tmp_path, tmp_path / "out", source)
