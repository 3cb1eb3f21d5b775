"""Read annotations in a CSV table: one box per row, with a header that names the columns (TensorFlow's and Roboflow's form)."""

import csv
from pathlib import Path, PurePosixPath

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    LabeledImage,
    Notes,
    Options,
    add_object,
    find_files,
    find_image,
    number_of,
    open_image,
    read_splits,
    read_text,
    split_files,
)
from raydetr.data.images import IMAGE_SUFFIXES
from raydetr.errors import UserError
from raydetr.values import is_finite, short, whole_number

# Column by the names that tools give it.
COLUMNS = {
    "image": ("filename", "file_name", "image", "image_path", "image_name", "path", "file"),
    "category": ("class", "label", "category", "class_name", "name"),
    "left": ("xmin", "x_min", "x1", "left"),
    "top": ("ymin", "y_min", "y1", "top"),
    "right": ("xmax", "x_max", "x2", "right"),
    "bottom": ("ymax", "y_max", "y2", "bottom"),
}
SIZES = ("width", "height")  # of the image; may be missing


def is_csv_table(file: Path) -> bool:
    """Return whether a file has the header of a table of boxes."""
    try:
        header = _header(file)
    except UserError:
        return False
    return all(_column(header, key) is not None for key in COLUMNS if key != "category")


def lacks_header(file: Path) -> bool:
    """Return whether a file is a table of boxes whose first line is a row: an image file and four numbers, not the names of columns."""
    try:
        cells = [cell.strip() for cell in _header(file)]
    except UserError:
        return False
    numbers = sum(is_finite(number_of(cell)) for cell in cells)
    return numbers >= 4 and any(PurePosixPath(cell).suffix in IMAGE_SUFFIXES for cell in cells)


def check_header(file: Path, options: Options) -> None:
    """Raise UserError where the first line of a file does not name the columns of a table of boxes."""
    header = _header(file)
    missing = [COLUMNS[key][0] for key in COLUMNS if _column(header, key) is None and not (key == "category" and options.category)]
    if missing:
        raise UserError(f"{file}: its first line is no header with the columns {', '.join(missing)}; put such a line in front")


def read_csv(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split; a word of each file's name or folder says its split, see :func:`split_files`.

    The header names image, category and the corners xmin, ymin, xmax, ymax in pixels, see ``COLUMNS``; commas, semicolons or tabs separate
    the columns. A row without corners is an image without objects.

    Args:
        src: Folder or file.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read.
    """
    tables = find_files(src, ".csv")
    bare = next(filter(lacks_header, tables), None)
    if bare is not None and not any(map(is_csv_table, tables)):
        check_header(bare, options)
    files = split_files(src, ".csv", is_csv_table, "CSV table of boxes (*.csv)", notes)

    def read(file: Path, finder: ImageFinder) -> list[LabeledImage]:
        return _images(file, finder, options, notes)

    return read_splits(src, files, read, "image is not in the CSV table, left out", notes)


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _header(file: Path) -> list[str]:
    lines = read_text(file).splitlines()
    return [column.strip().lower() for column in next(csv.reader(lines[:1], delimiter=_delimiter(lines[0])))] if lines else []


def _column(header: list[str], key: str) -> int | None:
    return next((header.index(name) for name in COLUMNS[key] if name in header), None)


def _images(file: Path, finder: ImageFinder, options: Options, notes: Notes) -> list[LabeledImage]:
    header, lines = _header(file), read_text(file).splitlines()
    columns = {key: _column(header, key) for key in COLUMNS}
    check_header(file, options)
    images: dict[str, LabeledImage] = {}
    for number, row in enumerate(csv.reader(lines[1:], delimiter=_delimiter(lines[0])), 2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"{file}, line {number}"
        if len(row) != len(header):
            raise UserError(f"{where}: {len(row)} values in {len(header)} columns")
        cells = {key: row[column].strip() if column is not None else "" for key, column in columns.items()}
        name = finder.find(cells["image"], where)
        if name not in images:
            find_image(finder, cells["image"], where, notes)
            width, height = (whole_number(number_of(row[header.index(side)])) or 0 if side in header else 0 for side in SIZES)
            images[name] = open_image(finder, name, file, options, notes, (width, height))
        if any(cells[key] for key in ("left", "top", "right", "bottom")):
            category = options.category or cells["category"]
            if not category:
                raise UserError(f"{where}: no category")
            add_object(images[name], category, _shape(cells, where), f"{name} line {number}", notes, outline=False)
    return list(images.values())


def _shape(cells: dict[str, str], where: str) -> shapes.Shape:
    corners = [number_of(cells[key]) for key in ("left", "top", "right", "bottom")]
    if not all(is_finite(value) and abs(value) < 1e9 for value in corners):
        raise UserError(f"{where}: {short(list(cells.values())[2:])} are not four numbers")
    left, top, right, bottom = corners
    if right < left or bottom < top:
        raise UserError(f"{where}: box from ({left}, {top}) to ({right}, {bottom}) is turned inside out")
    return shapes.from_box(left, top, right - left, bottom - top)
