"""What the parts of a report have in common: cards, tables, numbers as the page shows them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from raydetr.evaluate.coco import METRICS
from raydetr.text import compact
from raydetr.training.metrics import MASK_METRICS

# Shown in points, 100 being perfect, as papers and the verdict of a confirmation have them.
POINTS = frozenset([*METRICS, *MASK_METRICS, "AP_low", "AP_high", "best_AP"])
SERIES = 8  # colors for runs or searches side by side; see the classes s0, s1, ... in report.html

Rows = Iterable[tuple[Sequence[Any], str]]


def points(value: float | None) -> str:
    """Return an AP of 0 to 1 in points: ``45.3``."""
    return "-" if value is None else f"{100 * value:.1f}".replace("-0.0", "0.0")


def gain(value: float | None, other: float | None) -> str:
    """Return a difference of two APs in points, with its sign; a dash if one is unknown."""
    return "-" if value is None or other is None else f"{100 * (value - other):+.1f}"


def interval_words(low: float | None, high: float | None) -> str:
    """Return the interval of an AP in parentheses, after a space; empty if it is unknown."""
    return "" if low is None or high is None else f" (95 % interval {points(low)} to {points(high)})"


def cell(value: Any, name: str = "") -> str:
    """Return a metric or setting as a table shows it."""
    if value is None:
        return "-"
    if name in POINTS and isinstance(value, float):
        return points(value)
    return compact(value)


def table(headings: Sequence[str], rows: Rows, left: Collection[int] = (), note: str = "") -> dict[str, Any]:
    """Return a table for the page.

    Args:
        headings: The headings of its columns.
        rows: The cells of each row and the row's CSS class. A cell that is not text is shown as the metric or setting that the row's first
            cell names.
        left: The columns of text, besides the first one.
        note: A sentence below the table.
    """
    shown = [
        {"cells": [each if isinstance(each, str) else cell(each, str(cells[0])) for each in cells], "mark": mark} for cells, mark in rows
    ]
    return {"headings": headings, "rows": shown, "left": left, "note": note}


def card(heading: str, explanation: str = "", **content: Any) -> dict[str, Any]:
    """Return a card for the page.

    Args:
        heading: Its heading.
        explanation: A sentence below the heading.
        **content: ``words`` (sentences), ``charts`` (pairs of a heading and an SVG), ``wide`` (whether the charts may be wider than the
            window and scroll), ``legend`` (pairs of a CSS class and its meaning), ``table``, ``details`` (pairs of a summary and a table or
            preformatted text), ``open`` (whether the details are shown at first).
    """
    empty: dict[str, Any] = {"words": [], "charts": [], "wide": False, "legend": [], "table": None, "details": [], "open": False}
    return {"heading": heading, "explanation": explanation, **empty, **content}


def chart(heading: str, svg: Markup) -> dict[str, Any]:
    """Return a chart of a card."""
    return {"heading": heading, "svg": svg}


def as_yaml(plain: Mapping[str, Any]) -> str:
    """Return settings as YAML, for reading."""
    return yaml.safe_dump(dict(plain), sort_keys=False, default_flow_style=None, width=120)


def duration(seconds: float) -> str:
    """Return a time in words: ``3 h 05 min``, ``12 min 30 s``, ``8 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
