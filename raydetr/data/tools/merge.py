"""Put several data sets together."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from raydetr.data.categories import twin_names
from raydetr.data.coco import box_of
from raydetr.data.formats.labels import Notes
from raydetr.data.formats.output import check_new
from raydetr.data.splits import file_digest
from raydetr.data.tools.folder import SPLITS, DataSet, Item, Summary, join_categories, read_data_set, write_data_set
from raydetr.errors import UserError


def merge(sources: Sequence[str | Path], out: str | Path, copy: bool = False) -> Summary:
    """Put several data sets together: training images with training images, and so on.

    Categories are joined by name and keep the ids that they have in the first data set; new ones get their own id where it is free. An
    image file that several data sets have, to the byte, is taken once, in the split where it comes first, with the boxes of all. Other
    files of one name are renamed.

    Args:
        sources: COCO folders, two or more; nothing in them changes.
        out: Folder to write; it must be empty or not exist.
        copy: Copy the images instead of linking them.

    Raises:
        UserError: Something cannot be read or written.
    """
    out = Path(out)
    if len(sources) < 2:
        raise UserError("data merge: give at least two data sets and the folder to write")
    same = [name for name, times in Counter(Path(source).resolve() for source in sources).items() if times > 1]
    if same:
        raise UserError(f"data merge: {same[0]} is given twice")
    check_new(out)
    notes, whole = Notes(), DataSet([], {})
    for source in sources:
        data = read_data_set(source)
        ids = join_categories(whole.categories, data.categories)
        for name in SPLITS:
            for item in data.splits.get(name, []):
                item.annotations = [each | {"category_id": ids[each["category_id"]]} for each in item.annotations]
                whole.splits.setdefault(name, []).append(item)
    whole.splits = {name: whole.splits[name] for name in SPLITS if name in whole.splits}
    _join_copies(whole, notes)
    _note_twin_categories(whole, notes)
    return write_data_set(whole, out, notes, copy)


def _join_copies(data: DataSet, notes: Notes) -> None:
    """Keep the first of several image files with the same bytes, and give it the boxes of all; the same box counts once."""
    lengths = Counter(item.path.stat().st_size for items in data.splits.values() for item in items)
    seen: dict[tuple, tuple[str, Item]] = {}
    for split, items in data.splits.items():
        kept = []
        for item in items:
            alone = lengths[item.path.stat().st_size] == 1
            key = (item.path if alone else file_digest(item.path), item.entry["width"], item.entry["height"])
            if key not in seen:
                seen[key] = (split, item)
                kept.append(item)
                continue
            first_split, first = seen[key]
            known = {_box_key(each) for each in first.annotations}
            first.annotations += [each for each in item.annotations if _box_key(each) not in known]
            where = f"{item.name} = {first.name}" + ("" if split == first_split else f" ({split} and {first_split}: kept in {first_split})")
            notes.add("image is the same file as another, taken once with the boxes of both", where)
        data.splits[split] = kept
    data.splits = {split: items for split, items in data.splits.items() if items}


def _box_key(annotation: dict) -> tuple:
    return annotation["category_id"], *(box_of(annotation) or ())


def _note_twin_categories(data: DataSet, notes: Notes) -> None:
    for twins in twin_names(each["name"] for each in data.categories):
        notes.add("categories whose names differ by case or spaces only stay apart", " and ".join(twins))
