"""A model's categories in a data set, by name or by what their number tells."""

from types import SimpleNamespace

import pytest

from raydetr.predict.categories import find_categories
from raydetr.weights.official import COCO_CATEGORIES


def model(*names, source="file", first_id=0):
    return SimpleNamespace(categories=[{"id": i, "name": name} for i, name in enumerate(names, first_id)], category_names=source)


def unnamed(number):
    return model(*(f"class {i}" for i in range(number)), source="unknown")


def named(**ids):
    return [{"id": number, "name": name} for name, number in ids.items()]


@pytest.mark.parametrize(
    ("made", "known", "found", "note"),
    [
        (model("dog", "cat"), named(cat=5, dog=9), [1, 0], None),
        (model("dog", "kite"), named(cat=5, dog=9), [1, None], None),
        (model("kite", "ball"), named(cat=5, dog=9), [None, None], None),
        (model("STRASSE"), [{"id": 1, "name": "Straße"}], [0], None),
        (model("box", "Box"), [{"id": 1, "name": "Box"}, {"id": 2, "name": "box"}], [1, 0], None),
        (unnamed(2), named(cat=5, dog=9), [0, 1], "its 2 classes are taken for the data set's: cat, dog"),
        (unnamed(1), named(cat=5), [0], "its class is taken for the data set's: cat"),
        # The official DETR has as many classes as the highest category id plus one.
        (unnamed(10), named(cat=5, dog=9), [None] * 5 + [0] + [None] * 3 + [1], "its 10 classes are taken for the category ids 0 to 9"),
        (unnamed(3), named(cat=5, dog=9), [None] * 3, None),
        (unnamed(3), [], [None] * 3, None),
    ],
)
def test_classes_are_found(made, known, found, note):
    assert find_categories(made, known) == (found, [f"the checkpoint does not name its categories; {note}"] if note else [])


def test_a_head_of_cocos_size_has_cocos_categories_if_the_data_set_has_one_of_them():
    coco = SimpleNamespace(categories=COCO_CATEGORIES, category_names="coco")
    found, notes = find_categories(coco, named(helmet=1, person=2))
    assert (found[1], found.count(None), notes) == (1, 90, [])
    found, (note,) = find_categories(coco, named(helmet=1, balloon=2))
    assert found[:4] == [None, 0, 1, None]
    assert note.endswith("its 91 classes are taken for the category ids 0 to 90 (if they are COCO's, the data set has none of them)")
