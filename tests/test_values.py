import math

import pytest

from raydetr.values import is_finite, is_number


@pytest.mark.parametrize(
    ("value", "number", "finite"),
    [(1, True, True), (0.5, True, True), (math.nan, True, False), (-math.inf, True, False), (10**400, True, False)]
    + [(True, False, False), ("1", False, False), (None, False, False), ([1], False, False)],
)
def test_what_counts_as_a_number(value, number, finite):
    assert (is_number(value), is_finite(value)) == (number, finite)
