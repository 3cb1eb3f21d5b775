"""Text of messages: counts, short lists, one line. Every room uses these, so that all messages read alike."""

import unicodedata
from collections.abc import Iterable
from typing import Any


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the right form: ``1 image``, ``3 images``.

    Args:
        number: The number to state.
        noun: The noun in the singular.
        plural: The plural where it is not the singular with an ``s``, or with ``es`` after an ``x``, such as ``categories``.
    """
    return f"{number} {noun if number == 1 else plural or noun + ('es' if noun.endswith('x') else 's')}"


def shortlist(items: Iterable[object], most: int = 3) -> str:
    """Return the first items separated by commas, and how many are left: ``a, b, c and 4 more``.

    Args:
        items: What to list; each is shown as ``str`` shows it.
        most: How many items to show.
    """
    shown = list(map(str, items))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def one_line(text: object, longest: int = 300) -> str:
    """Return text (or an error's text) on one line; the beginning of a text longer than ``longest`` characters is left out.

    The end is kept because libraries that wrap errors say there what was wrong.
    """
    line = " ".join(str(text).split())
    return line if len(line) <= longest else f"... {line[-longest:]}"


def compact(value: Any) -> str:
    """Return a setting or another value in few characters: ``0.05``, ``3.2e-4``, ``cosine``; a list as ``480, 512``."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 100_000:
        return f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def fold_name(name: str) -> str:
    """Return a category name as names are compared: without differences of case, surrounding or repeated white space, and Unicode
    composition, so that ``Straße`` equals ``STRASSE``."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", " ".join(name.split())).casefold())
