"""Divide a data set into training, validation and test images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from raydetr.data.formats.labels import Notes
from raydetr.data.formats.output import check_new
from raydetr.data.splits import alike_groups, stratified_parts
from raydetr.data.tools.folder import SPLITS, DataSet, Summary, counted_alike, read_data_set, write_data_set
from raydetr.errors import UserError


def split(
    src: str | Path,
    out: str | Path,
    val: float = 0.2,
    test: float = 0.1,
    seed: int = 0,
    copy: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Divide all images of a data set anew, and write the result as a new data set.

    Whatever splits the data set has are put together first. Each new one gets its share of the boxes of every category
    (:func:`raydetr.data.splits.stratified_parts`), and images that look alike stay in one (:func:`raydetr.data.splits.alike_groups`).

    Args:
        src: A COCO folder; nothing in it changes.
        out: Folder to write; it must be empty or not exist.
        val: Share of the validation images, more than 0.
        test: Share of the test images; 0 for no test set.
        seed: Seed of the division.
        copy: Copy the images instead of linking them.
        progress: Called with (done, total) as images are compared.

    Raises:
        UserError: The shares leave nothing for training, there are too few images, or something cannot be read or written.
    """
    src, out = Path(src), Path(out)
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1 or (name == "val" and not share):
            raise UserError(
                f"data split: --{name} {share:g} is out of bounds; it takes {'at least' if name == 'test' else 'more than'} 0, less than 1"
            )
    if val + test >= 1:
        raise UserError(f"data split: --val {val:g} and --test {test:g} leave no image for training; together they must be less than 1")
    check_new(out)
    data = read_data_set(src)
    items = [item for of_split in data.splits.values() for item in of_split]
    groups = alike_groups([(item.path, (item.entry["width"], item.entry["height"])) for item in items], progress=progress)
    columns = {category["id"]: column for column, category in enumerate(data.categories)}
    counts = np.zeros((len(items), len(columns)), dtype=np.int64)
    for row, item in enumerate(items):
        np.add.at(counts[row], [columns[each["category_id"]] for each in item.annotations if not each.get("iscrowd")], 1)
    names = SPLITS if test else SPLITS[:2]
    try:
        parts = stratified_parts(counts, [1 - val - test, val, test][: len(names)], groups, seed)
    except UserError as error:
        raise UserError(f"{src}: {error}") from None
    notes = Notes()
    divided = DataSet(data.categories, {name: [items[row] for row in np.flatnonzero(parts == part)] for part, name in enumerate(names)})
    summary = write_data_set(divided, out, notes, copy)
    alike = counted_alike(groups.tolist(), items)
    summary.notes += [alike] if alike else []
    return summary
