import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image

from raydetr import draw
from raydetr.draw import Box, category_colours, draw_boxes, with_masks

GREY = (90, 90, 90)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Fonts are looked for anew: some tests take the installed ones away."""
    for remembered in (draw._fonts, draw._writable):
        remembered.cache_clear()
    yield
    for remembered in (draw._fonts, draw._writable):
        remembered.cache_clear()


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


# -------------------------------------------------------------------------------------------------------------------- masks


def disk(size=(300, 200), center=(150, 100), radius=60) -> np.ndarray:
    x, y = np.arange(size[0])[None], np.arange(size[1])[:, None]
    return (x - center[0]) ** 2 + (y - center[1]) ** 2 <= radius**2


def drawn_mask(mask, score=0.9, colour=(0, 255, 0), size=(300, 200), letters=1 / 20):
    """A picture with a mask whose box is not drawn, as its corners are not numbers."""
    nowhere = (math.nan,) * 4
    box = Box(nowhere, "balloon", score, mask)
    return draw_boxes(_picture(size), [box] if score else [], [] if score else [box], {"balloon": colour}, letters, name_true=False)


def test_a_predicted_mask_is_tinted_within_an_outline_of_its_colour():
    mask = disk()
    after = np.asarray(drawn_mask(mask)).astype(int)
    assert not (after[~mask] != GREY).any(), "nothing is drawn outside of the mask"
    assert tuple(after[100, 150]) == (54, 156, 54), "40 % of green over grey"
    radii = np.hypot(np.arange(300)[None] - 150, np.arange(200)[:, None] - 100)
    outlined = (after == (0, 255, 0)).all(-1)
    assert outlined[mask & (radii > 59.5)].all(), "the outline is closed"
    assert not outlined[radii < 55].any(), "and thin"


def test_a_true_mask_is_an_outline_of_black_and_white_dashes_all_around():
    after = np.asarray(drawn_mask(disk(), score=None)).astype(int)
    changed = (after != GREY).any(-1)
    assert {tuple(pixel) for pixel in after[changed]} == {(0, 0, 0), (255, 255, 255)}
    radii = np.hypot(np.arange(300)[None] - 150, np.arange(200)[:, None] - 100)
    assert not changed[radii < 55].any(), "the inside stays free"
    angles = np.degrees(np.arctan2(np.arange(200)[:, None] - 100, np.arange(300)[None] - 150))
    for start in range(-180, 180, 20):  # 20 degrees are 21 pixels, a dash and its gap 10 to 14
        sector = changed & (angles >= start) & (angles < start + 20)
        assert {0, 255} <= set(after[sector].flatten()), start


@pytest.mark.parametrize("score", [0.9, None])
@pytest.mark.parametrize("kind", ["nothing", "pixel", "line", "everything", "ring", "smaller"])
def test_any_mask_can_be_drawn(kind, score):
    masks = {"nothing": disk(radius=-1) & False, "everything": disk(radius=999), "ring": disk() & ~disk(radius=30)}
    masks |= {"pixel": disk(radius=0), "line": disk(radius=999) & (np.arange(200) == 7)[:, None], "smaller": disk((150, 100), (75, 50), 30)}
    before, after = _picture(), drawn_mask(masks[kind], score)
    changed = _changed(before, after)
    expected = {"smaller": np.kron(masks["smaller"], np.ones((2, 2), bool))}.get(kind, masks[kind])
    assert not changed[~expected].any()
    if score:
        assert changed[expected].all()
    elif kind == "everything":
        assert changed[0].all(), "an outline at the edge of the image is seen"
        assert changed[:, -1].all()
    elif kind == "ring":
        assert changed[100, 150 + 31 : 150 + 33].all(), "the hole has an outline"
    else:
        assert changed.any() == expected.any()


def test_the_mask_of_the_highest_score_is_on_top_and_true_ones_are_above_all():
    boxes = [Box((math.nan,) * 4, name, score, disk()) for name, score in (("a", 0.9), ("b", 0.5))]
    true = [Box((math.nan,) * 4, "b", None, disk())]
    colours = {"a": (255, 0, 0), "b": (0, 0, 255)}
    after = draw_boxes(_picture(), boxes, [], colours, 1 / 20, False)
    assert after.getpixel((150, 41)) == (255, 0, 0)
    after = draw_boxes(_picture(), boxes, true, colours, 1 / 20, False)
    assert after.getpixel((150, 41)) in ((0, 0, 0), (255, 255, 255))


def test_masks_join_boxes_in_their_order():
    boxes = [Box((0, 0, 9, 9), "a", 0.9), Box((0, 0, 5, 5), "b", 0.8)]
    joined = with_masks(boxes, [None, disk()])
    assert [box.mask is None for box in joined] == [True, False]
    assert joined == boxes, "a mask is no part of what a box is"
    assert with_masks(boxes, None) == boxes
