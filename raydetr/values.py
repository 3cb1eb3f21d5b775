"""Values from files and metrics, where anything can stand: which of them are numbers?"""

from typing import Any


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float. NaN and infinity are; ``True`` and ``False`` are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that can be calculated with: not NaN, not infinite, and within a float's range."""
    return is_number(value) and abs(value) < 1e300  # false for NaN, and for an int that no float can hold
