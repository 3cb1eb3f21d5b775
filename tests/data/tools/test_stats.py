import json
import re
from html.parser import HTMLParser

import pytest

from raydetr.cli import main
from raydetr.data.tools.stats import write_stats

VOID = {"meta", "img", "br", "rect", "path", "circle"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert not self.open or tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_everything_and_needs_no_network(coco_folder, tmp_path, capsys):
    root = coco_folder(train=6, val=3)
    file = root / "annotations" / "custom_train.json"
    coco = json.loads(file.read_text())
    coco["categories"][0]["name"] = "<b>square</b>"
    coco["annotations"] = [each for each in coco["annotations"] if each["image_id"] != 10]
    file.write_text(json.dumps(coco))
    val = root / "annotations" / "custom_val.json"
    val.write_text(val.read_text().replace('"square"', '"<b>square</b>"'))
    assert main(["data", "stats", str(root)]) == 0
    out = tmp_path / "data-stats.html"
    assert capsys.readouterr().out == f"statistics written to {out}\n"
    text = out.read_text()
    page = Page(text)
    words = " ".join(" ".join(page.text).split())
    for what in (
        "Boxes on an image",
        "Sizes of boxes",
        "Shapes of boxes",
        "Sizes of images",
        "Where boxes are",
        "Categories that occur together",
    ):
        assert what in words
    assert "<b>square" not in text
    assert "<b>square</b>" in words  # as text
    assert "0 boxes: train 1, val 0" in words
    assert "3 boxes: train 5, val 3" in words
    assert "Most frequent: 96 x 64 (9)" in words
    assert {image["title"][:5] for image in page.images} <= {"train", "val_0"}
    assert len(page.images) == 8
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.images)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|url\(|<script|<link", text)


def test_positions_and_sizes_are_those_of_the_boxes(coco_folder, tmp_path):
    root = coco_folder(train=1, val=1, boxes=1)
    for part in ("train", "val"):
        file = root / "annotations" / f"custom_{part}.json"
        coco = json.loads(file.read_text())
        coco["annotations"][0] |= {"bbox": [48, 0, 96, 32], "category_id": 7, "area": 900}  # the right upper quarter, once clipped
        file.write_text(json.dumps(coco))
    text = write_stats(root, tmp_path / "page.html").read_text()
    covered = re.findall(r'<path d="M(\d+) (\d+)h1v1h-1z" opacity="1.00"/>', text)
    assert {(int(x), int(y)) for x, y in covered} == {(x, y) for x in range(12, 24) for y in range(12)}
    assert "50 to 55 %: train 1, val 1" in text
    assert "<td>train</td><td>1</td><td>0</td><td>0</td>" in text  # small by the annotated area, as evaluation counts it
    assert "1.2 to 1.7 times as wide as high: train 1, val 1" in text


@pytest.mark.parametrize(("annotations", "message"), [("[]", "custom_train.json"), (None, "no train annotations")])
def test_a_data_set_that_cannot_be_read_is_one_line(coco_folder, tmp_path, capsys, annotations, message):
    root = coco_folder()
    file = root / "annotations" / "custom_train.json"
    if annotations is None:
        file.unlink()
    else:
        file.write_text(annotations)
    assert main(["data", "stats", str(root), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert main(["data", "stats", str(coco_folder(folder="sound")), "--out", str(tmp_path / "none" / "page.html")]) == 2
    assert "cannot write the page" in capsys.readouterr().err
