import math

import numpy as np
import pytest
from pycocotools import mask

from raydetr.data.formats import shapes


def raster_area(polygon, width, height):
    """The area inside the picture by another way: pixels filled, on a grid 8 times as fine."""
    flat = [float(value) * 8 for corner in polygon for value in corner]
    return mask.area(mask.frPyObjects([flat], height * 8, width * 8))[0] / 64


def test_the_area_of_a_polygon_is_its_shoelace_sum_open_closed_and_in_either_direction():
    corners = [(0, 0), (10, 0), (10, 4), (4, 4), (4, 10), (0, 10)]  # an L
    for polygon in (corners, [*corners, corners[0]], corners[::-1], corners[3:] + corners[:3]):
        shape = shapes.from_polygon(polygon)
        assert shape.area == 10 * 4 + 4 * 6
        assert shape.box == (0, 0, 10, 10)


def test_area_keeps_its_digits_far_from_the_origin():
    shape = shapes.from_polygon([(1e8 + x, 1e8 + y) for x, y in ((0.25, 0.5), (1.5, 0.5), (1.5, 2.5), (0.25, 2.5))])
    assert shape.area == 1.25 * 2


@pytest.mark.parametrize("polygon", [[], [(3, 4)], [(3, 4), (8, 9)], [(1, 1), (2, 2), (3, 3)]])
def test_points_and_lines_enclose_nothing(polygon):
    assert shapes.from_polygon(polygon).area == 0


def test_a_rect_keeps_its_numbers():
    shape = shapes.from_via({"name": "rect", "x": 3, "y": 4, "width": 10, "height": 20})
    assert (shape.box, shape.area) == ((3, 4, 10, 20), 200)
    assert shape.polygon == [(3, 4), (13, 4), (13, 24), (3, 24)]


def test_a_polyline_is_closed_to_a_polygon():
    points = {"all_points_x": [1, 11, 11], "all_points_y": [2, 2, 22]}
    line, polygon = (shapes.from_via({"name": name, **points}) for name in ("polyline", "polygon"))
    assert line == polygon
    assert (line.box, line.area) == ((1, 2, 10, 20), 100)


def test_box_and_area_of_a_circle_are_exact_and_its_polygon_is_close():
    shape = shapes.from_via({"name": "circle", "cx": 50, "cy": 60, "r": 20})
    assert shape.box == (30, 40, 40, 40)
    assert shape.area == pytest.approx(math.pi * 400, rel=1e-12)
    outline = shapes.from_polygon(shape.polygon)
    assert outline.box == pytest.approx(shape.box, abs=0.01)
    assert outline.area == pytest.approx(shape.area, rel=0.003)


@pytest.mark.parametrize("theta", [None, 0.0, 0.5, math.pi / 2, 2.0, -0.7, 7.0])
def test_the_box_of_a_turned_ellipse_touches_it_on_all_sides(theta):
    turned = {} if theta is None else {"theta": theta}
    shape = shapes.from_via({"name": "ellipse", "cx": 100, "cy": 90, "rx": 40, "ry": 10, **turned})
    angle, theta = np.linspace(0, 2 * math.pi, 100001), theta or 0.0
    along, across = 40 * np.cos(angle), 10 * np.sin(angle)
    xs = 100 + along * math.cos(theta) - across * math.sin(theta)  # x to the right, y down: theta turns clockwise on the screen
    ys = 90 + along * math.sin(theta) + across * math.cos(theta)
    assert shape.box == pytest.approx((xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)), abs=1e-4)
    assert shape.area == pytest.approx(math.pi * 400)
    assert raster_area(shape.polygon, 200, 200) == pytest.approx(math.pi * 400, rel=0.01)


def test_an_upright_ellipse_is_wide_along_rx():
    assert shapes.from_via({"name": "ellipse", "cx": 50, "cy": 50, "rx": 30, "ry": 5}).box == (20, 45, 60, 10)


def test_a_point_is_a_shape_without_area():
    assert shapes.from_via({"name": "point", "cx": 5, "cy": 6}).area == 0


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({}, "unknown shape None"),
        ({"name": "spline"}, "unknown shape 'spline'"),
        ({"name": "rect", "x": 1, "y": 1, "width": 5}, "height is missing"),
        ({"name": "rect", "x": 1, "y": 1, "width": -5, "height": 2}, "width is -5, less than 0"),
        ({"name": "rect", "x": float("nan"), "y": 1, "width": 5, "height": 2}, "x has nan"),
        ({"name": "rect", "x": 10**400, "y": 1, "width": 5, "height": 2}, "x has 1"),
        ({"name": "circle", "cx": 1, "cy": True, "r": 5}, "cy has True"),
        ({"name": "circle", "cx": 1, "cy": 1, "r": "wide"}, "r has 'wide'"),
        ({"name": "circle", "cx": 1, "cy": "nan", "r": 5}, "cy has 'nan'"),
        ({"name": "ellipse", "cx": 1, "cy": 1, "rx": 5, "ry": 2, "theta": None}, "theta has None"),
        ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, "2 x but 1 y coordinates"),
        ({"name": "polygon", "all_points_x": [1, 2, None], "all_points_y": [1, 2, 3]}, "all_points_x has None"),
        ({"name": "polygon", "all_points_x": "123", "all_points_y": [1, 2, 3]}, "all_points_x is not a list"),
        ({"name": "polygon", "all_points_y": [1, 2, 3]}, "all_points_x is not a list"),
    ],
)
def test_what_is_no_shape_is_told(attributes, complaint):
    with pytest.raises(ValueError, match=complaint):
        shapes.from_via(attributes)


def test_a_shape_inside_the_picture_is_left_alone():
    shape = shapes.from_ellipse(50, 50, 50, 50)  # touches all four edges
    assert shapes.clip(shape, 100, 100) is shape


def test_a_shape_is_cut_at_the_edges():
    cut = shapes.clip(shapes.from_box(-10, 80, 30, 50), 100, 100)
    assert (cut.box, cut.area) == ((0, 80, 20, 20), 400)
    everything = shapes.clip(shapes.from_box(-10, -10, 500, 500), 100, 60)
    assert (everything.box, everything.area) == ((0, 0, 100, 60), 6000)
    tip = shapes.clip(shapes.from_polygon([(90, 50), (120, 40), (120, 60)]), 100, 100)  # only its tip is in the picture
    assert tip.box == pytest.approx((90, 50 - 10 / 3, 10, 20 / 3))


@pytest.mark.parametrize("box", [(-20, 10, 20, 10), (100, 10, 5, 5), (10, -9, 5, 9), (300, 300, 5, 5)])
def test_nothing_is_left_of_a_shape_outside(box):
    assert shapes.clip(shapes.from_box(*box), 100, 100).area == 0


@pytest.mark.parametrize("seed", range(8))
def test_what_is_cut_has_the_area_that_is_seen(seed):
    random = np.random.default_rng(seed)  # a star: a simple polygon, mostly concave, reaching over several edges
    angles = np.sort(random.uniform(0, 2 * math.pi, 15))
    radii = random.uniform(20, 90, 15)
    star = [(float(50 + r * math.cos(a)), float(40 + r * math.sin(a))) for r, a in zip(radii, angles, strict=True)]
    cut = shapes.clip(shapes.from_polygon(star), 100, 80)
    assert cut.area == pytest.approx(raster_area(star, 100, 80), rel=0.01)
    x, y, width, height = cut.box
    assert min(x, y) >= 0
    assert x + width <= 100
    assert y + height <= 80


def test_numbers_may_be_text():
    assert shapes.from_via({"name": "rect", "x": "3", "y": "4.5", "width": "10", "height": "20"}).box == (3, 4.5, 10, 20)


def test_scaling_scales_lengths_once_and_areas_twice():
    shape = shapes.scale(shapes.from_polygon([(2, 2), (6, 2), (6, 10)]), 0.5)
    assert (shape.polygon, shape.box, shape.area) == ([(1, 1), (3, 1), (3, 5)], (1, 1, 2, 4), 4)


def test_a_rotated_box_turns_clockwise_about_its_corner():
    shape = shapes.from_rotated_box(10, 20, 4, 2, math.pi / 2)  # y points down: the upper edge becomes the right one
    assert shape.box == pytest.approx((8, 20, 2, 4))
    assert shape.area == pytest.approx(8)
