"""Values from files and metrics, where anything can stand: interpret them as numbers, and show them in one line."""

from typing import Any


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or a float (NaN and infinity included), but not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether ``value`` is a number to calculate with: neither NaN nor infinite, and in the range of a float."""
    return is_number(value) and abs(value) < 1e300  # false for NaN, and for an int that no float can hold


def as_number(value: Any) -> Any:
    """Return the number that a text such as ``"12"`` or ``"3.5"`` spells; any other value, and any other text, as it is."""
    if not isinstance(value, str) or len(value) > 40 or not value.isascii() or "_" in value:
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def whole_number(value: Any) -> int | None:
    """Return the 64-bit integer that an int, a float such as ``3.0`` or a text such as ``"3"`` stands for; None for anything else."""
    if type(value) is int:  # by far the most: a large file has millions
        return value if abs(value) < 2**63 else None
    value = as_number(value)
    return int(value) if is_finite(value) and value == int(value) and abs(value) < 2**63 else None


def short(value: Any) -> str:
    """Return ``repr(value)``, cut to 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def plain(value: Any) -> str:
    """Return a printable text of at most 100 characters as it is, anything else as :func:`short` shows it."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100 else short(value)
