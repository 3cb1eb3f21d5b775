"""Compare categories of two sources by id and name: the one rule for data sets, checkpoints, predictions, and scores."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raydetr.text import fold_name


def match_categories(categories: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """Find every one of ``categories`` among the ``known`` ones.

    A category with the same id and the same name comes first, one with exactly the same name next, and one whose name is the same
    after :func:`raydetr.text.fold_name` last. A name counts only where it is unique on both sides: two categories that differ by case only
    ("Box" and "box"), or not at all, are never merged.

    Args:
        categories: The categories to find, each with ``id`` and ``name``.
        known: The categories to search, for example those of the training set in label order.

    Returns:
        For each of ``categories`` its position in ``known``; None where it has no counterpart or several.
    """
    by_id_and_name = _positions((each["id"], each["name"]) for each in known)
    found = [by_id_and_name.get((each["id"], each["name"])) for each in categories]
    for key in (str, fold_name):
        ours, theirs = _positions(key(each["name"]) for each in categories), _positions(key(each["name"]) for each in known)
        taken = set(found)
        for name, position in ours.items():
            if found[position] is None and theirs.get(name) not in taken:
                found[position] = theirs.get(name)
    return found


def twin_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of two or more names that are the same after :func:`raydetr.text.fold_name`, in order of their first appearance."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(fold_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _positions(keys: Iterable[Any]) -> dict[Any, int]:
    # Only of keys that occur once.
    keys = list(keys)
    counts = Counter(keys)
    return {key: position for position, key in enumerate(keys) if counts[key] == 1}
