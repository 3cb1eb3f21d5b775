"""The one rule by which categories of two sources are compared."""

import unicodedata

import pytest

from raydetr.data.categories import fold_name, match_categories, twin_names


def named(*names, first_id=1):
    return [{"id": number, "name": name} for number, name in enumerate(names, first_id)]


@pytest.mark.parametrize(
    ("categories", "known", "found"),
    [
        (named("cat", "dog"), named("dog", "cat"), [1, 0]),
        (named("Cat", "dog "), named("dog", "cat"), [1, 0]),
        (named("STRASSE"), named("Straße", first_id=7), [0]),
        (named(unicodedata.normalize("NFD", "Äpfel")), named(unicodedata.normalize("NFC", "äpfel"), first_id=7), [0]),
        (named("traffic  light"), named("traffic light", first_id=7), [0]),
        # Twins by case: the exact name decides, whatever the ids and the order.
        (named("box", "Box"), named("Box", "box"), [1, 0]),
        (named("box", "Box", first_id=11), named("Box", "box"), [1, 0]),
        # A folded name is taken only where it is unique on both sides.
        (named("BOX", first_id=7), named("Box", "box"), [None]),
        (named("Box", "box", first_id=7), named("BOX"), [None, None]),
        (named("Box", "box", first_id=7), named("box"), [None, 0]),
        (named("Box", first_id=7), named("Box", "box"), [0]),
        # Equal names: their ids decide, and nothing else can.
        (named("box", "box"), named("box", "box"), [0, 1]),
        (named("box", "box", first_id=2), named("box", "box"), [1, None]),
        (named("box", first_id=7), named("box", "box"), [None]),
        # The same id means nothing where the name differs.
        (named("cat"), named("dog"), [None]),
        ([], named("dog"), []),
    ],
)
def test_id_and_name_come_first_then_the_exact_name_then_a_unique_folded_one(categories, known, found):
    assert match_categories(categories, known) == found


def test_no_two_categories_are_merged_into_one():
    found = match_categories(named("box", "Box", "bOX", "box ", first_id=3), named("Box", "box"))
    assert found == [1, 0, None, None]


def test_twins_are_grouped_by_folded_name():
    assert twin_names(["Box", "cat", "box", "Straße", "STRASSE", "dog"]) == [["Box", "box"], ["Straße", "STRASSE"]]
    assert twin_names(["same", "same"]) == [["same", "same"]]
    assert twin_names(["cat", "dog"]) == []


def test_folding_keeps_names_apart_that_differ_in_letters():
    assert fold_name("ß") == fold_name("SS")
    assert fold_name("a b") != fold_name("ab")
