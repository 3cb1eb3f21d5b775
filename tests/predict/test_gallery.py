from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from raydetr import draw
from raydetr.draw import Box, category_colours, draw_boxes
from raydetr.predict.gallery import Card, Column, gallery_page

GREY = (90, 90, 90)


def _picture(size=(300, 200)):
    return Image.new("RGB", size, GREY)


def _changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return (np.asarray(before) != np.asarray(after)).any(-1)


def _has(image: Image.Image, colour, x: slice, y: slice) -> bool:
    return bool((np.asarray(image)[y, x] == colour).all(-1).any())


def test_colours_of_many_categories_differ_and_do_not_depend_on_later_ones():
    names = [f"category {number}" for number in range(20)]
    colours = category_colours(names)
    parts = np.array(list(colours.values()), dtype=float)
    apart = np.linalg.norm(parts[:, None] - parts, axis=-1) + 1000 * np.eye(20)
    assert apart.min() > 40
    assert category_colours([*names[:5], names[0]]) == {name: colours[name] for name in names[:5]}


def test_a_predicted_box_is_drawn_where_it_is_in_its_colour_with_a_label_above():
    before = _picture()
    colours = category_colours(["balloon"])
    after = draw_boxes(before, [Box((100, 80, 200, 160), "balloon", 0.9)], [], colours, letters=1 / 20, name_true=False)
    assert all(after.getpixel(corner) == colours["balloon"] for corner in ((100, 80), (200, 80), (100, 160), (200, 160), (150, 160)))
    changed = _changed(before, after)
    assert not changed[84:156, 104:196].any(), "the inside stays free"
    assert not changed[164:].any()
    assert _has(after, (0, 0, 0), slice(100, 200), slice(60, 80)), "black letters on the bright label"
    assert before.getpixel((100, 80)) == GREY, "the picture given is left as it was"


def test_true_boxes_are_dashed_white_and_named_only_where_asked():
    before, box = _picture(), Box((100, 80, 200, 160), "balloon")
    plain = draw_boxes(before, [], [box], {"balloon": (0, 255, 0)}, letters=1 / 20, name_true=False)
    edge = {plain.getpixel((x, 80)) for x in range(100, 201)}
    assert edge == {(0, 0, 0), (255, 255, 255)}
    assert not _changed(before, plain)[164:].any()
    named = draw_boxes(before, [], [box], {"balloon": (0, 255, 0)}, letters=1 / 20, name_true=True)
    assert _changed(before, named)[164:180].any()


@pytest.mark.parametrize("xyxy", [(-50, -50, 900, 900), (299.9, 199.9, 300, 200), (0, 0, 0, 0), (10, 10, 10, 150), (400, 300, 500, 400)])
def test_boxes_at_and_beyond_the_border_are_drawn(xyxy):
    boxes = [Box(xyxy, "a very long name of a category, longer than the picture is wide", 0.9)]
    after = draw_boxes(_picture(), boxes, boxes, category_colours([boxes[0].name]), letters=1 / 10, name_true=True)
    assert _changed(_picture(), after).any()


@pytest.mark.parametrize("name", ["two\nlines", "Öl & Maß", "气球", "\ud800", "nul\0", "", "x" * 500])
def test_any_name_can_be_drawn(name):
    box = Box((10, 50, 60, 90), name, 0.5)
    after = draw_boxes(_picture((64, 96)), [box], [box], category_colours([name]), letters=1 / 70, name_true=True)
    assert after.size == (64, 96)


def test_letters_that_no_font_has_are_left_out_of_a_label_instead_of_becoming_boxes(monkeypatch):
    def label(name):
        box = Box((10, 50, 60, 90), name, 0.5)
        after = draw_boxes(_picture(), [box], [], {name: (0, 255, 0)}, letters=1 / 21, name_true=False)  # a height of no other test
        return np.asarray(after)[:48].tolist()

    monkeypatch.setattr(draw, "FONTS", ())
    assert label("\ue000\ue001") == label(""), "the score alone"
    assert label("a") != label("")


def test_letters_grow_with_the_picture():
    def label_height(size):
        box = Box((size[0] // 4, size[1] // 2, size[0] // 2, size[1] * 3 // 4), "balloon", 0.9)
        after = draw_boxes(_picture(size), [box], [], category_colours(["balloon"]), letters=1 / 40, name_true=False)
        return _changed(_picture(size), after)[: size[1] // 2].any(1).sum()

    assert label_height((1600, 1200)) == pytest.approx(2 * label_height((800, 600)), rel=0.1)


def test_labels_of_boxes_side_by_side_do_not_cover_each_other():
    colours = {"a": (255, 0, 0), "b": (0, 0, 255)}
    boxes = [Box((100, 80, 160, 120), "a", 0.9), Box((102, 80, 162, 120), "b", 0.8)]
    after = np.asarray(draw_boxes(_picture(), boxes, [], colours, letters=1 / 20, name_true=False))
    alone = [np.asarray(draw_boxes(_picture(), [box], [], colours, letters=1 / 20, name_true=False)) for box in boxes]
    red, blue = ((after == colours[name]).all(-1).sum() for name in "ab")
    red_alone, blue_alone = ((each == colours[name]).all(-1).sum() for each, name in zip(alone, "ab", strict=True))
    assert red > 0.9 * red_alone
    assert blue > 0.6 * blue_alone, "the second label moved to a free corner"


class _Page(HTMLParser):
    """What a browser would make of the page: tags with their attributes, and the text outside style."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def _card(name="a.jpg", boxes=(), true=None, best=0.5, columns=1):
    column = [Column(f"pictures/{place}.jpg", f"thumbnails/{place}.jpg", list(boxes), best) for place in range(columns)]
    return Card(name, (300, 200), true, column)


def test_the_page_counts_what_is_found_and_true():
    boxes = [Box((0, 0, 9, 9), name, 0.8) for name in ("balloon", "balloon", "face")]
    cards = [_card("a.jpg", boxes, true=[Box((0, 0, 9, 9), "balloon")]), _card("b.jpg", boxes[:1], true=[])]
    page = _Page(gallery_page({"found": "run/best.pth"}, cards, 0.7, category_colours(["balloon", "face", "kite"]), ["c.jpg: broken"]))
    text = " ".join(" ".join(page.text).split())
    assert "found by run/best.pth 2 pictures" in text
    assert "2 balloon, 1 face" in text
    assert "true no box" in text
    assert "balloon 3 1 face 1 0 true box" in text, "the legend's rows: category, found, true"
    assert "kite" not in text, "the legend has only what is to be seen"
    assert "1 picture left out" in text
    assert "c.jpg: broken" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(image["loading"] == "lazy" for image in images)


def test_a_picture_without_boxes_says_so_and_how_near_it_came():
    assert "nothing above 0.70 (best 0.69)" in gallery_page({"found": "m"}, [_card(best=0.6999)], 0.7, {})
    assert "nothing above 0.0125 (best 0.01)" in gallery_page({"found": "m"}, [_card(best=0.0121)], 0.0125, {})


def test_names_from_data_cannot_become_html():
    evil = "<script>alert('x')</script>\"&'"
    boxes = [Box((0, 0, 9, 9), evil, 0.8)]
    card = _card(f"{evil}.jpg", boxes, true=boxes, columns=2)
    html = gallery_page({"before": evil, "after": evil}, [card], 0.7, category_colours([evil]), [f"{evil}: broken"])
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert " ".join(page.text).count(evil) >= 6, "every one of them is there to be read"


def test_the_page_needs_nothing_from_elsewhere_and_quotes_its_links():
    card = Card("x", (10, 10), None, [Column("pictures/ä #1?.jpg", "thumbnails/ä #1?.jpg", [], 0.1)])
    html = gallery_page({"found": "m"}, [card], 0.7, {})
    assert "http:" not in html
    assert "https:" not in html
    assert 'href="pictures/%C3%A4%20%231%3F.jpg"' in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
