"""Labels in YOLO's text files: one file a picture, one object a line, in fractions of the picture.

A line is ``class cx cy width height`` (a box) or ``class x1 y1 x2 y2 x3 y3 ...`` (an outline).
"""

from pathlib import Path

import yaml

from raydetr.data.formats import shapes
from raydetr.data.formats.labels import IMAGE_SUFFIXES, VAL_FOLDERS, Notes, Picture, add_object, open_picture, read_lines, read_text
from raydetr.errors import UserError


def read_yolo(src: Path, category: str | None, notes: Notes) -> dict[str, list[Picture]]:
    """The labelled pictures by split.

    Layouts: what ``train`` and ``val`` in SRC/data.yaml (or the only YAML file) name; else SRC/images/train and SRC/images/val; else
    SRC/train/images and SRC/val/images (or valid); else SRC/images, all of it train. Labels lie in the folder ``labels`` where the
    pictures' path has ``images``, or beside the pictures. Class names: ``names`` in the YAML file, else classes.txt. A picture without a
    label file has no objects. ``category``: one name for all objects. Raises UserError for anything that cannot be read.
    """
    settings = _settings(src)
    folders = _image_folders(src, settings)
    names = None if category else _names(src, settings)
    return {split: _pictures(src, folder, category, names, notes) for split, folder in folders.items()}


def _settings(src: Path) -> dict:
    files = [src / "data.yaml"] if (src / "data.yaml").is_file() else sorted([*src.glob("*.yaml"), *src.glob("*.yml")])
    if len(files) != 1:
        return {}
    try:
        content = yaml.safe_load(read_text(files[0]))
    except yaml.YAMLError as error:
        raise UserError(f"{files[0]}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{files[0]}: expected names, train and val by name")
    return content


def _names(src: Path, settings: dict) -> dict[int, str]:
    """Class number to class name."""
    names = settings.get("names")
    lists = [file for file in (src / "classes.txt", src / "labels" / "classes.txt") if file.is_file()]
    if names is None and lists:
        names = [line for line in read_lines(lists[0]) if line]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(number, int) for number in names):
        raise UserError(f"{src}: no class names; give them as a list under names in data.yaml, one a line in classes.txt, or by --category")
    return {number: str(name).strip() for number, name in names.items()}


def _image_folders(src: Path, settings: dict) -> dict[str, Path]:
    found = {}
    for split, aliases in (("train", ("train",)), ("val", VAL_FOLDERS)):
        places = [src / "images" / name for name in aliases] + [src / name / "images" for name in aliases]
        place = next((place for place in places if place.is_dir()), None)
        if settings.get(split) is not None:
            found[split] = _named_folder(src, settings, split)
        elif place:
            found[split] = place
    if found and "train" not in found:
        raise UserError(f"{src}: validation pictures but no training pictures (images/train or train/images)")
    return found or {"train": src / "images" if (src / "images").is_dir() else src}


def _named_folder(src: Path, settings: dict, split: str) -> Path:
    """The picture folder that the YAML file names for a split. It must lie in ``src``; a leading ../ or an absolute ``path`` is
    forgiven where the rest fits, as such files travel from machine to machine."""
    entry, root = settings[split], settings.get("path") or "."
    if not isinstance(entry, str) or not isinstance(root, str):
        raise UserError(f"{src}: {split} in the YAML file must name one folder of pictures, not {entry!r}")
    inside = src.resolve()
    for place in (src / root / entry, src / entry, src / entry.replace("../", "")):
        if place.resolve().is_relative_to(inside) and place.is_dir():
            return src / place.resolve().relative_to(inside)
    raise UserError(f"{src}: {split} in the YAML file names {entry!r}, which is no folder in {src}")


def _pictures(src: Path, folder: Path, category: str | None, names: dict[int, str] | None, notes: Notes) -> list[Picture]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    labels = {file: _label_file(src, file) for file in files}
    if not any(labels.values()):
        raise UserError(f"{folder}: no picture with a label file; its labels belong in the folder labels beside images")
    pictures = []
    for file, label in labels.items():
        picture = open_picture(folder, file.relative_to(folder).as_posix(), folder, notes)
        if label is None:
            notes.add("picture without a label file, taken as one without objects", picture.name)
        else:
            _read_labels(picture, label, category, names, notes)
        pictures.append(picture)
    return pictures


def _label_file(src: Path, image: Path) -> Path | None:
    parts = list(image.relative_to(src).with_suffix(".txt").parts)
    places = [image.with_suffix(".txt")]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        places.insert(0, src.joinpath(*parts[:last], "labels", *parts[last + 1 :]))
    return next((place for place in places if place.is_file()), None)


def _read_labels(picture: Picture, file: Path, category: str | None, names: dict[int, str] | None, notes: Notes) -> None:
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        where = f"{file}, line {number}"
        try:
            which, *values = map(float, line.split())
        except ValueError:
            raise UserError(f"{where}: not a line of numbers") from None
        if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
            raise UserError(f"{where}: {len(values) + 1} numbers; a box has 5 (class cx cy width height), an outline 7, 9, 11, ...")
        if not all(-1 <= value <= 2 for value in values) or (len(values) == 4 and min(values[2:]) < 0):
            raise UserError(f"{where}: places and sizes must be fractions of the picture, from 0 to 1")
        shows = category or names.get(which)
        if not shows:
            raise UserError(f"{where}: class {which:g} has no name; the classes go from {min(names)} to {max(names)}")
        add_object(picture, shows, _shape(values, picture), f"{file.name} line {number}", notes, outline=len(values) > 4)


def _shape(values: list[float], picture: Picture) -> shapes.Shape:
    """Fractions as pixels, rounded to hundredths: text files carry six digits, which is less than that in a large picture."""
    pixels = [round(value * side, 2) for value, side in zip(values, [picture.width, picture.height] * (len(values) // 2), strict=True)]
    if len(pixels) > 4:
        return shapes.from_polygon(list(zip(pixels[::2], pixels[1::2], strict=True)))
    cx, cy, width, height = pixels
    return shapes.from_box(cx - width / 2, cy - height / 2, width, height)
