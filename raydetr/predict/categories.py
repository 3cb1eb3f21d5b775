"""The categories of a model under the ids of a data set."""

from collections.abc import Sequence
from typing import Any

from raydetr.data.categories import match_categories
from raydetr.model.detr import DETR


def find_categories(model: DETR, known: Sequence[dict[str, Any]]) -> tuple[list[int | None], list[str]]:
    """Find each category of a model in a data set.

    Categories are found by :func:`raydetr.data.categories.match_categories`. If a checkpoint does not name its categories (a bare state
    dict) and none is found by name, its number of classes decides: if it is the number of the data set's categories, the classes are these
    in their order; otherwise each class is the category id of its number, as the official DETR trains custom data sets.

    Args:
        model: A model of :func:`raydetr.load`.
        known: Categories of the data set in label order, ``{"id", "name"}``.

    Returns:
        For each class of the model the position of its category in ``known``, or None, and lines for the user about what was assumed.
    """
    found = match_categories(model.categories, known)
    if model.category_names == "file" or not known or any(position is not None for position in found):
        return found, []
    classes, ids = len(found), [category["id"] for category in known]
    if classes == len(known):
        names = ", ".join(category["name"] for category in known[:3]) + (", ..." if classes > 3 else "")
        classes = f"{classes} classes are" if classes > 1 else "class is"
        return list(range(len(known))), [f"the checkpoint does not name its categories; its {classes} taken for the data set's: {names}"]
    if min(ids) >= 0 and max(ids) < classes:
        positions = {category_id: position for position, category_id in enumerate(ids)}
        note = f"the checkpoint does not name its categories; its {classes} classes are taken for the category ids 0 to {classes - 1}"
        if model.category_names == "coco":
            note += " (if they are COCO's, the data set has none of them)"
        return [positions.get(label) for label in range(classes)], [note]
    return found, []
