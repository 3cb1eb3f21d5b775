import pytest

from raydetr.text import count, fold_name, one_line, shortlist


@pytest.mark.parametrize(("number", "says"), [(0, "0 images"), (1, "1 image"), (2, "2 images")])
def test_counts_agree_with_their_noun(number, says):
    assert count(number, "image") == says


def test_a_plural_of_its_own():
    assert count(2, "category", "categories") == "2 categories"
    assert count(1, "category", "categories") == "1 category"


@pytest.mark.parametrize(("items", "says"), [([], ""), ("abc", "a, b, c"), ("abcde", "a, b, c and 2 more"), ([1, 2], "1, 2")])
def test_a_short_list_says_how_many_it_leaves_out(items, says):
    assert shortlist(items) == says


def test_one_line_keeps_the_end_of_a_long_text():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line(ValueError("x" * 400 + "end"), longest=10) == "... xxxxxxxend"


def test_names_are_compared_without_case():
    assert fold_name(" Straße ") == fold_name("STRASSE")
    assert fold_name("cat") != fold_name("cats")
