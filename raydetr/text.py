"""Text for messages: counts, short lists, text on one line. All messages are made with these functions, so that they read alike."""

import unicodedata
from collections.abc import Iterable
from typing import Any


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the right form: ``1 image``, ``3 images``.

    Args:
        number: The number to state.
        noun: The noun in the singular.
        plural: The plural, such as ``categories``. It may be left out if the plural is the singular with an ``s``, or with ``es`` after an
            ``x``.
    """
    return f"{number} {noun if number == 1 else plural or noun + ('es' if noun.endswith('x') else 's')}"


def shortlist(items: Iterable[object], most: int = 3) -> str:
    """Return the first items separated by commas, and how many are left: ``a, b, c and 4 more``.

    Args:
        items: What to list; each item is converted by ``str``.
        most: How many items to show.
    """
    shown = list(map(str, items))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def one_line(text: object, longest: int = 300) -> str:
    """Return a text, or the text of an error, on one line.

    The end of a long text is kept, because libraries that wrap errors say there what was wrong.

    Args:
        text: The text or error, which is converted by ``str``. Runs of white space become single spaces.
        longest: Number of characters that are kept at most; ``...`` replaces what comes before.
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
    """Return the form of a category name by which names are compared.

    Differences of case, of surrounding or repeated white space, and of Unicode composition are removed, so that ``Straße`` equals
    ``STRASSE``.

    Args:
        name: The name.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", " ".join(name.split())).casefold())
