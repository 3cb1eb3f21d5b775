import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image

from raydetr import draw
from raydetr.draw import Box, category_colours, draw_boxes

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


def edge_of(xyxy, size):
    """The bounding box (x0, y0, x1, y1) of what an unlabelled true box changes in an image of that size."""
    before = _picture(size)
    rows, columns = np.nonzero(_changed(before, draw_boxes(before, [], [Box(xyxy, "a")], {}, letters=1 / 70, name_true=False)))
    return columns.min(), rows.min(), columns.max(), rows.max()


@pytest.mark.parametrize(
    ("xyxy", "edge"),
    [
        ((-50, -50, 900, 900), (0, 0, 299, 199)),
        ((299.9, 199.9, 300, 200), (299, 199, 299, 199)),
        ((0, 0, 0, 0), (0, 0, 0, 0)),
        ((10, 10, 10, 150), (10, 10, 10, 150)),
        ((400, 300, 500, 400), (299, 199, 299, 199)),
        ((120.5, 3.27, 276.56, 98.18), (120, 3, 277, 98)),
        ((50, 80, 20, 30), (20, 30, 50, 80)),  # a negative width and height
        ((-math.inf, 20, math.inf, 40), (0, 20, 299, 40)),
    ],
)
def test_a_box_is_drawn_at_its_corners_rounded_and_moved_into_the_image(xyxy, edge):
    assert edge_of(xyxy, (300, 200)) == edge


def test_a_box_whose_corners_are_not_numbers_is_left_out():
    boxes = [Box((math.nan, 10, 50, 60), "a", 0.9), Box((10, 10, 50, math.nan), "a", 0.8), Box((100, 100, 150, 160), "a", 0.5)]
    after, alone = (draw_boxes(_picture(), some, some, {"a": (0, 255, 0)}, letters=1 / 20, name_true=True) for some in (boxes, boxes[2:]))
    assert not _changed(after, alone).any()
    assert _changed(after, _picture()).any()


def test_any_box_can_be_drawn_on_an_image_of_any_size():
    """Predicted, true, and named: Pillow refuses rectangles whose second corner lies before the first by the fraction of a pixel."""
    draws = random.Random(0)
    odd = [0.0, -0.0, 0.5, 1e-9, -1e-9, 1e9, -1e9, math.inf, -math.inf, math.nan]
    sizes = [(1, 1), (1, 40), (40, 1), (2, 3), (17, 5), (640, 480), (641, 3)]
    for _, size in itertools.product(range(150), sizes):
        # Most corners are fractions inside of the image or just outside, and many boxes are smaller than a line is wide.
        x0, y0 = (draws.uniform(-4, side + 4) for side in size)
        x1, y1 = (start + draws.choice((0.3, 3, 300)) * draws.uniform(-0.2, 1) for start in (x0, y0))
        corners = [draws.choice(odd) if draws.random() < 0.05 else corner for corner in (x0, y0, x1, y1)]
        box = Box(tuple(corners), draws.choice(("a", "balloon")), draws.choice((0.123, 1.0, math.nan)))
        image = _picture(size)
        after = draw_boxes(image, [box], [box], {"a": (0, 255, 0), "balloon": (255, 0, 0)}, draws.choice((1 / 70, 1 / 10)), name_true=True)
        assert after.size == size, corners
        assert _changed(image, after).any() != any(map(math.isnan, corners)), corners


@pytest.mark.parametrize(
    ("name", "written"),
    [("two\nlines", "two lines"), ("\ud800", ""), ("nul\0", "nul"), (" ", ""), ("x" * 500, "x" * 28 + "...")],
)
def test_a_name_is_written_on_one_line_without_what_cannot_be_written(monkeypatch, name, written):
    monkeypatch.setattr(draw, "FONTS", ())
    label = lambda name: draw_boxes(_picture(), [Box((10, 60, 60, 90), name, 0.5)], [], {name: (0, 255, 0)}, 1 / 23, name_true=False)  # noqa: E731
    assert not _changed(label(name), label(written)).any()
    assert written in ("", name) or _changed(label(name), label("")).any()


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
