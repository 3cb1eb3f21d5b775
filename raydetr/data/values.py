"""Values out of annotation files, where anything can stand: is it a number, and how to show it in one line."""

from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, NaN and infinity among them; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether it is a number that can be calculated with."""
    return is_number(value) and abs(value) < 1e300  # false for NaN, and for an int that no float can hold


def whole_number(value: Any) -> int | None:
    """The int of 64 bits that ``value`` (an int, or a float such as 3.0) stands for; None for anything else."""
    return int(value) if is_finite(value) and value == int(value) and abs(value) < 2**63 else None


def short(value: Any) -> str:
    """The value as Python writes it, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def plain(value: Any) -> str:
    """Text as it is where it fits in a line, anything else as :func:`short` shows it."""
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100 else short(value)
