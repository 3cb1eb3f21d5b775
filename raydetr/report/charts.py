"""Charts as inline SVG.

An SVG needs no script and no network, prints sharply, and takes its colors from the style sheet of the page, so that one chart serves
the light and the dark page. What a mark stands for is given as a CSS class, and its numbers as a tooltip.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from raydetr.text import compact

WIDTH, HEIGHT = 350, 230  # of a chart in pixels: it fits a phone, and three fit side by side on a desk
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 36  # margins in pixels
MOST_TICKS = 6
LETTER = 5.8  # mean width of a character in pixels

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
        label: What it shows.
        low: The value at its beginning; above ``high`` for an axis that runs backward.
        high: The value at its end.
        log: Whether it is logarithmic.
        whole: Whether only whole numbers are marked.
        names: The values of an axis of categories, whose positions are 0, 1, and so on.
    """

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    names: tuple[str, ...] = ()

    def share(self, value: float) -> float:
        """Return where a value lies on the axis, 0 at its beginning and 1 at its end."""
        scale = math.log if self.log else float
        low, high = scale(self.low), scale(self.high)
        return (scale(value) - low) / (high - low) if high != low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return the values to mark, with their text."""
        if self.names:
            return [(float(position), name) for position, name in enumerate(self.names)]
        low, high = sorted((self.low, self.high))
        values = _log_ticks(low, high) if self.log else _linear_ticks(low, high, self.whole)
        return [(value, compact(value)) for value in values]


def axis(label: str, values: Iterable[float], *, log: bool = False, whole: bool = False, margin: float = 0.05) -> Axis:
    """Return an axis that holds the values, with a margin on both sides as a share of its length."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    if log:
        factor = (high / low) ** margin if high > low else 2.0
        return Axis(label, low / factor, high * factor, log=True)
    room = margin * (high - low) or 0.5 * abs(high) or 0.5
    return Axis(label, low - room, high + room, whole=whole)


def _linear_ticks(low: float, high: float, whole: bool) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= MOST_TICKS)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{factor}e{decade}") for decade in decades for factor in factors if low <= float(f"{factor}e{decade}") <= high]
        if len(ticks) <= MOST_TICKS:
            return ticks if len(ticks) > 1 else [low, high]
    return ticks[:: math.ceil(len(ticks) / MOST_TICKS)]


class Chart:
    """A chart with two axes. Marks that are added later lie on top.

    Args:
        name: What the chart shows, for its heading and for screen readers.
        x: The axis across.
        y: The axis upward.
        height: In pixels.
    """

    def __init__(self, name: str, x: Axis, y: Axis, height: int = HEIGHT):
        self.name, self._x, self._y, self._height = name, x, y, height
        self._marks: list[Markup] = []

    def _at(self, point: Point) -> Point:
        across = LEFT + self._x.share(point[0]) * (WIDTH - LEFT - RIGHT)
        up = self._height - BOTTOM - self._y.share(point[1]) * (self._height - TOP - BOTTOM)
        return round(across, 1), round(up, 1)

    def line(self, points: Iterable[Point], css: str, title: str = "") -> None:
        """Add a line; points that are not finite numbers are left out."""
        path = _path(self._at(point) for point in points if all(map(math.isfinite, point)))
        if path:
            self._marks.append(_with_title(Markup('<path class="line {}" d="{}"').format(css, path), title, "path"))

    def band(self, low: Sequence[Point], high: Sequence[Point], css: str) -> None:
        """Fill the area between two lines over the same values."""
        path = _path(self._at(point) for point in [*low, *reversed(high)])
        if path:
            self._marks.append(Markup('<path class="band {}" d="{}Z"/>').format(css, path))

    def dot(self, point: Point, css: str, title: str = "", radius: float = 3.5) -> None:
        """Add a dot."""
        if all(map(math.isfinite, point)):
            x, y = self._at(point)
            mark = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}"').format(css, x, y, round(radius, 1))
            self._marks.append(_with_title(mark, title, "circle"))

    def bar(self, low: float, high: float, y: float, css: str, title: str = "", thickness: float = 5.0) -> None:
        """Add a horizontal bar."""
        (left, middle), (right, _) = self._at((low, y)), self._at((high, y))
        shape = left, round(middle - thickness / 2, 1), round(max(right - left, 1), 1), round(thickness, 1)
        mark = Markup('<rect class="bar {}" x="{}" y="{}" width="{}" height="{}"').format(css, *shape)
        self._marks.append(_with_title(mark, title, "rect"))

    def across(self, y: float, css: str, title: str = "") -> None:
        """Add a line across the whole chart."""
        self.line([(self._x.low, y), (self._x.high, y)], css, title)

    def upright(self, x: float, css: str, title: str = "") -> None:
        """Add a line over the whole height of the chart."""
        self.line([(x, self._y.low), (x, self._y.high)], css, title)

    def svg(self) -> Markup:
        """Return the chart."""
        return _svg(self.name, WIDTH, self._height, [*self._axes(), *self._marks])

    def _axes(self) -> list[Markup]:
        bottom, right = self._height - BOTTOM, WIDTH - RIGHT
        parts = [Markup('<path class="axis" d="M{} {}V{}H{}"/>').format(LEFT, TOP, bottom, right)]
        for value, text in self._x.ticks():
            across, _ = self._at((value, self._y.low))
            anchor = "end" if across + LETTER * len(text) / 2 > WIDTH else "middle"
            parts.append(_text(across, bottom + 13, text, anchor))
        for value, text in self._y.ticks():
            _, up = self._at((self._x.low, value))
            parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, up, right))
            parts.append(_text(LEFT - 5, up + 3.5, text, "end"))
        parts.append(_text((LEFT + right) / 2, self._height - 6, self._x.label, "middle", "label"))
        upward = Markup('<text class="label" text-anchor="middle" transform="translate(10 {}) rotate(-90)">{}</text>')
        parts.append(upward.format((TOP + bottom) / 2, self._y.label))
        return parts


def parallel(name: str, axes: Sequence[Axis], lines: Iterable[tuple[Sequence[float | None], str, str]], gap: int = 88) -> Markup:
    """Return parallel coordinates: an upright axis for each setting, and a line across all of them for each trial.

    Args:
        name: What the chart shows.
        axes: The axes.
        lines: The values of each line (None: it has no value there and passes below the axis), its CSS class and its tooltip.
        gap: Between two axes, in pixels.
    """
    top, bottom, below, left = 34, 250, 270, 30
    width = left + gap * (len(axes) - 1) + 56
    parts = []
    for values, css, title in lines:
        points = [
            (left + gap * index, below if value is None else round(bottom - each.share(value) * (bottom - top), 1))
            for index, (each, value) in enumerate(zip(axes, values, strict=True))
        ]
        parts.append(_with_title(Markup('<path class="line {}" d="{}"').format(css, _path(points)), title, "path"))
    for index, each in enumerate(axes):
        x = left + gap * index
        parts.append(Markup('<path class="axis" d="M{} {}V{}"/>').format(x, top, bottom))
        # The names of neighbors are at different heights, so that they do not meet.
        parts.append(_text(x, 11 + 12 * (index % 2), each.label, "start" if index == 0 else "middle", "label"))
        for value, text in each.ticks():
            parts.append(_text(x + 4, bottom - each.share(value) * (bottom - top) + 3.5, text, "start", "halo"))
    return _svg(name, width, below + 8, parts)


def bars(name: str, rows: Sequence[tuple[str, float, float, float]], axis_label: str) -> Markup:
    """Return horizontal bars with the interval of each.

    Args:
        name: What the chart shows.
        rows: The label, the value and the ends of its interval of each bar; all of them shares from 0 to 1.
        axis_label: What the values are.
    """
    left, row = 14 + LETTER * max(len(label) for label, *_ in rows), 24
    height, right = row * len(rows) + 42, WIDTH - 14
    scale = Axis(axis_label, 0.0, 1.0)

    def at(value: float) -> float:
        return round(left + scale.share(min(1.0, max(0.0, value))) * (right - left), 1)

    parts = []
    for value, text in scale.ticks()[::2] or scale.ticks():
        parts.append(Markup('<path class="grid" d="M{} 6V{}"/>').format(at(value), height - 34))
        parts.append(_text(at(value), height - 22, text, "middle"))
    for number, (label, value, low, high) in enumerate(rows):
        y = 8 + row * number
        title = f"{label}: {value:.2f} (95 % interval {low:.2f} to {high:.2f})"
        shape = left, y, max(1.0, round(at(value) - left, 1)), row - 10
        parts.append(_with_title(Markup('<rect class="bar trial" x="{}" y="{}" width="{}" height="{}"').format(*shape), title, "rect"))
        parts.append(Markup('<path class="whisker" d="M{} {}H{}"/>').format(at(low), y + row / 2 - 5, at(high)))
        parts.append(_text(left - 6, y + 11, label, "end", "label"))
    parts.append(_text((left + right) / 2, height - 6, axis_label, "middle", "label"))
    return _svg(name, WIDTH, height, parts)


def _svg(name: str, width: float, height: float, parts: Iterable[Markup]) -> Markup:
    # min-width keeps the letters of a wide chart readable; its card scrolls.
    start = Markup('<svg class="chart" viewBox="0 0 {0} {1}" style="--wide: {0}px" role="img" aria-label="{2}">')
    return start.format(round(width), round(height), name) + Markup("\n").join(parts) + Markup("</svg>")


def _path(points: Iterable[Point]) -> str:
    return "L".join(f"{x:g} {y:g}" for x, y in points).join(("M", "")) if (points := list(points)) else ""


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> Markup:
    kind = Markup(' class="{}"').format(css) if css else ""
    return Markup('<text x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(round(x, 1), round(y, 1), anchor, kind, text)


def _with_title(start: Markup, title: str, tag: str) -> Markup:
    return start + (Markup("><title>{}</title></{}>").format(title, tag) if title else Markup("/>"))
