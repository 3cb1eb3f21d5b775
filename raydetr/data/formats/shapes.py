"""Outline, box and area of the shapes that people draw around objects, in pixels of the image."""

import dataclasses
import math
from collections.abc import Iterable

# Corners of the polygon that approximates a circle or an ellipse; a multiple of 4, so that an upright one touches its exact box.
ROUND_CORNERS = 64

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Shape:
    """An outline and what it encloses.

    Attributes:
        polygon: Corners (x, y); the last is joined to the first.
        box: xywh.
        area: Square pixels; 0 where nothing is enclosed.
    """

    polygon: list[Point]
    box: tuple[float, float, float, float]
    area: float


def from_polygon(polygon: list[Point]) -> Shape:
    """Return the shape of a closed polygon: its area by the shoelace formula, its box from the extremes.

    A polygon without corners gives an empty shape.
    """
    if not polygon:
        return Shape([], (0.0, 0.0, 0.0, 0.0), 0.0)
    xs, ys = zip(*polygon, strict=True)
    x, y = min(xs), min(ys)
    # Relative to a corner: far from the origin the products would otherwise lose their last digits.
    edges = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    doubled = sum((x0 - x) * (y1 - y) - (x1 - x) * (y0 - y) for (x0, y0), (x1, y1) in edges)
    return Shape(polygon, (x, y, max(xs) - x, max(ys) - y), abs(doubled) / 2)


def from_box(x: float, y: float, width: float, height: float) -> Shape:
    """Return the shape of an upright rectangle.

    Args:
        x: Left edge.
        y: Top edge.
        width: Width.
        height: Height, all in pixels.
    """
    polygon = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    return Shape(polygon, (x, y, width, height), width * height)


def from_ellipse(cx: float, cy: float, rx: float, ry: float, theta: float = 0.0) -> Shape:
    """Return the shape of an ellipse. Box and area are the ellipse's own, not those of the polygon that outlines it.

    Args:
        cx: Horizontal position of the center.
        cy: Vertical position of the center.
        rx: Horizontal radius before the rotation.
        ry: Vertical radius before the rotation, all in pixels.
        theta: Rotation in radians.
    """
    cos, sin = math.cos(theta), math.sin(theta)
    angles = [2 * math.pi * corner / ROUND_CORNERS for corner in range(ROUND_CORNERS)]
    rim = [(rx * math.cos(angle), ry * math.sin(angle)) for angle in angles]
    polygon = [(round(cx + u * cos - v * sin, 2), round(cy + u * sin + v * cos, 2)) for u, v in rim]
    half_width, half_height = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return Shape(polygon, (cx - half_width, cy - half_height, 2 * half_width, 2 * half_height), math.pi * rx * ry)


def from_rotated_box(x: float, y: float, width: float, height: float, theta: float) -> Shape:
    """Return the shape of a rectangle that is rotated about its top left corner.

    Args:
        x: Horizontal position of the corner.
        y: Vertical position of the corner.
        width: Width before the rotation.
        height: Height before the rotation, all in pixels.
        theta: Clockwise rotation in radians.
    """
    cos, sin = math.cos(theta), math.sin(theta)
    corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
    return from_polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in corners])


def from_via(attributes: dict) -> Shape:
    """Return the shape that the ``shape_attributes`` of a VIA region describe, version 1 or 2; a point is a shape without area.

    Raises:
        ValueError: Unknown shape, missing value, no number, or a negative size.
    """
    name = attributes.get("name")
    if name in ("polygon", "polyline"):  # a polyline outlines its object but for the last edge
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
        theta = _number(attributes, "theta") if name == "ellipse" and "theta" in attributes else 0.0  # since version 2
        return from_ellipse(cx, cy, rx, ry, theta)
    if name == "point":
        return from_polygon([(_number(attributes, "cx"), _number(attributes, "cy"))])
    raise ValueError(f"unknown shape {name!r}")


def extent(shapes: Iterable[Shape]) -> Point:
    """Return the right and the lower end of all shapes; (0, 0) for none."""
    ends = [(x + width, y + height) for x, y, width, height in (shape.box for shape in shapes)]
    return max((right for right, _ in ends), default=0), max((bottom for _, bottom in ends), default=0)


def scale(shape: Shape, factor: float) -> Shape:
    """Return the shape with all coordinates multiplied by ``factor``."""
    if factor == 1:
        return shape
    x, y, width, height = (value * factor for value in shape.box)
    return Shape([(u * factor, v * factor) for u, v in shape.polygon], (x, y, width, height), shape.area * factor**2)


def clip(shape: Shape, width: int, height: int) -> Shape:
    """Return the part of ``shape`` inside an image of that size.

    A shape that is inside already is returned unchanged. The outline of another is clipped at the edges (Sutherland and Hodgman, 1974); box
    and shoelace area are those of what is left.
    """
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
    try:
        number = float(value) if isinstance(value, str) else value  # some scripts write numbers as text
    except ValueError:
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 1e9:  # false for NaN
        raise ValueError(f"{key} has {value!r} where a number of pixels belongs")
    return number
