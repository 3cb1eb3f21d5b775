"""What a labelled region encloses: outline, box and area of the shapes that people draw, in pixels of the picture."""

import dataclasses
import math

# Corners of the polygon that stands for a circle or an ellipse; a multiple of 4, so that an upright one touches its exact box.
ROUND_CORNERS = 64

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Shape:
    """An outline and what it encloses.

    ``polygon``: corners (x, y), the last joined to the first. ``box``: xywh. ``area``: square pixels, 0 where nothing is enclosed.
    """

    polygon: list[Point]
    box: tuple[float, float, float, float]
    area: float


def from_polygon(polygon: list[Point]) -> Shape:
    """The shape of a closed polygon: area by the shoelace formula, box from its extremes. No corner at all gives an empty shape."""
    if not polygon:
        return Shape([], (0.0, 0.0, 0.0, 0.0), 0.0)
    xs, ys = zip(*polygon, strict=True)
    x, y = min(xs), min(ys)
    # Taken about a corner: far from the origin the products would otherwise lose their last digits.
    steps = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    doubled = sum((x0 - x) * (y1 - y) - (x1 - x) * (y0 - y) for (x0, y0), (x1, y1) in steps)
    return Shape(polygon, (x, y, max(xs) - x, max(ys) - y), abs(doubled) / 2)


def from_box(x: float, y: float, width: float, height: float) -> Shape:
    """The shape of a rectangle given as xywh."""
    polygon = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    return Shape(polygon, (x, y, width, height), width * height)


def from_ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Shape:
    """The shape of an ellipse turned by ``theta`` radians. Box and area are the ellipse's own, not those of its polygon."""
    cos, sin = math.cos(theta), math.sin(theta)
    angles = [2 * math.pi * corner / ROUND_CORNERS for corner in range(ROUND_CORNERS)]
    rim = [(rx * math.cos(angle), ry * math.sin(angle)) for angle in angles]
    polygon = [(round(cx + u * cos - v * sin, 2), round(cy + u * sin + v * cos, 2)) for u, v in rim]
    half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return Shape(polygon, (cx - half_width, cy - half_height, 2 * half_width, 2 * half_height), math.pi * rx * ry)


def from_via(attributes: dict) -> Shape:
    """The shape that a VIA region's ``shape_attributes`` describe, version 1 or 2; a point is a shape without area.

    Raises ValueError saying what is wrong: an unknown shape, a missing value, something that is no number, a negative size.
    """
    name = attributes.get("name")
    if name in ("polygon", "polyline"):  # a polyline outlines its object without the last stroke
        xs, ys = (_numbers(attributes, key) for key in ("all_points_x", "all_points_y"))
        if len(xs) != len(ys):
            raise ValueError(f"{len(xs)} x but {len(ys)} y coordinates")
        return from_polygon(list(zip(xs, ys, strict=True)))
    if name == "rect":
        x, y = (_number(attributes, key) for key in ("x", "y"))
        return from_box(x, y, *(_length(attributes, key) for key in ("width", "height")))
    if name in ("circle", "ellipse"):
        cx, cy = (_number(attributes, key) for key in ("cx", "cy"))
        rx, ry = (_length(attributes, key) for key in (("r", "r") if name == "circle" else ("rx", "ry")))
        theta = _number(attributes, "theta") if name == "ellipse" and "theta" in attributes else 0.0  # new in version 2
        return from_ellipse(cx, cy, rx, ry, theta)
    if name == "point":
        return from_polygon([(_number(attributes, "cx"), _number(attributes, "cy"))])
    raise ValueError(f"unknown shape {name!r}")


def clip(shape: Shape, width: int, height: int) -> Shape:
    """What of ``shape`` lies inside a picture of that size: the shape itself where all of it does, else its outline cut
    at the edges (Sutherland and Hodgman, 1974), with the box and shoelace area of what is left."""
    x, y, w, h = shape.box
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return shape
    polygon = shape.polygon
    for axis, edge, inwards in ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1)):
        polygon = _cut(polygon, axis, edge, inwards)
    return from_polygon(polygon)


def _cut(polygon: list[Point], axis: int, edge: float, inwards: int) -> list[Point]:
    kept = []
    for start, end in zip(polygon[-1:] + polygon[:-1], polygon, strict=True):
        starts_inside, ends_inside = ((point[axis] - edge) * inwards >= 0 for point in (start, end))
        if starts_inside != ends_inside:
            along = (edge - start[axis]) / (end[axis] - start[axis])
            other = start[1 - axis] + along * (end[1 - axis] - start[1 - axis])
            kept.append((edge, other) if axis == 0 else (other, edge))
        if ends_inside:
            kept.append(end)
    return kept


def _number(attributes: dict, key: str) -> float:
    if key not in attributes:
        raise ValueError(f"{key} is missing")
    return _as_number(attributes[key], key)


def _length(attributes: dict, key: str) -> float:
    value = _number(attributes, key)
    if value < 0:
        raise ValueError(f"{key} is {value}, less than 0")
    return value


def _numbers(attributes: dict, key: str) -> list[float]:
    values = attributes.get(key)
    if not isinstance(values, list):
        raise ValueError(f"{key} is not a list of numbers")
    return [_as_number(value, key) for value in values]


def _as_number(value, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:  # NaN is not less than anything
        raise ValueError(f"{key} has {value!r} where a number of pixels belongs")
    return value
