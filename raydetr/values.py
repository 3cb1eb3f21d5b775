"""Unchecked values from files and metrics: interpret them as numbers, and show them on one line."""

from typing import Any


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float (NaN and infinity included), but not a bool.

    Args:
        value: Any value.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold.

    Args:
        value: Any value.

    Returns:
        True for an int or float whose absolute value is below 1e300. False for a bool, NaN, infinity and any other type.
    """
    return is_number(value) and abs(value) < 1e300  # false for NaN, and for an int that no float can hold


def as_number(value: Any) -> Any:
    """Return a text that is a number as that number, and any other value unchanged.

    Args:
        value: Any value. A text counts as a number if ``int`` or ``float`` reads it, such as ``"12"``, ``"3.5"`` or ``"nan"``, it has at
            most 40 characters, and these are ASCII without underscores.

    Returns:
        An int or a float, or ``value`` itself.
    """
    if not isinstance(value, str) or len(value) > 40 or not value.isascii() or "_" in value:
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def whole_number(value: Any) -> int | None:
    """Return the integer that a value stands for.

    Args:
        value: Any value, such as ``3``, ``3.0`` or ``"3"``.

    Returns:
        The int, whose absolute value is below 2**63, or None if the value does not stand for one.
    """
    if type(value) is int:  # fast path: a large file has millions of them
        return value if abs(value) < 2**63 else None
    value = as_number(value)
    return int(value) if is_finite(value) and value == int(value) and abs(value) < 2**63 else None


def short(value: Any) -> str:
    """Return ``repr(value)``, cut to 100 characters.

    Args:
        value: Any value.
    """
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def plain(value: Any) -> str:
    """Return a value as text for a message.

    Args:
        value: Any value.

    Returns:
        A printable text of 1 to 100 characters unchanged, otherwise ``repr(value)`` cut to 100 characters.
    """
    return value if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 100 else short(value)
