"""Read YOLO annotations: one text file per image, one object per line, in fractions of the image.

A line is ``class cx cy width height`` (a box) or ``class x1 y1 x2 y2 x3 y3 ...`` (an outline). Where the YAML file has ``kpt_shape``, a
line is a box followed by its keypoints.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import yaml

from raydetr.data.formats import shapes
from raydetr.data.formats.files import ImageFinder
from raydetr.data.formats.labels import (
    VAL_FOLDERS,
    LabeledImage,
    Notes,
    Options,
    add_object,
    list_images,
    open_image,
    read_lines,
    read_text,
)
from raydetr.data.images import IMAGE_SUFFIXES
from raydetr.errors import UserError

SPLIT_NAMES = {"train": ("train",), "val": VAL_FOLDERS, "test": ("test",)}
DARKNET_FOLDERS = {"train": "obj_train_data", "val": "obj_valid_data", "test": "obj_test_data"}  # of CVAT's export
CLASS_FILES = ("classes.txt", "obj.names", "data/obj.names", "labels/classes.txt", "_darknet.labels", "train/_darknet.labels")


def read_yolo(src: Path, options: Options, notes: Notes) -> dict[str, list[LabeledImage]]:
    """Read the annotated images by split.

    The images of a split are those that ``train`` and ``val`` of the YAML file name (data.yaml, or the only YAML file with class names): a
    folder, a text file with one image per line, or a list of both. Without it they are in images/train or train/images, or listed in
    train.txt; without any split, all images in images/ or ``src`` are train. Labels are in the folder ``labels`` where the path of the
    images has ``images``, or beside the images. An image without a label file has no objects.

    Class names are ``names`` of the YAML file, else the lines of classes.txt or obj.names. With ``kpt_shape`` in the YAML file, the
    keypoints behind each box are left out. What is in the set but not read is noted.

    Args:
        src: Folder.
        options: What the user says about the annotations.
        notes: Receives what the user should know.

    Returns:
        ``train``, and ``val`` where there is one.

    Raises:
        UserError: Something cannot be read, or leads out of ``src``.
    """
    file, settings = _settings(src)
    names = {} if options.category else _names(src, settings)
    for name, times in Counter(names.values()).items():
        if times > 1:
            notes.add("name of several classes, which become one category", name)
    keypoints = _keypoint_numbers(file, settings)
    paths = {split: _split_images(src, settings, split, notes) for split in SPLIT_NAMES}
    if not any(paths[split] for split in ("train", "val")):
        paths["train"] = _below(src, "images" if (src / "images").is_dir() else ".")
    if not paths["train"]:
        raise UserError(f"{src}: validation images but no training images (images/train or train/images)")
    splits = {split: _images(src, split, paths[split], names, keypoints, options, notes) for split in ("train", "val") if paths[split]}
    _note_left_out(src, paths, splits, notes)
    return splits


def _settings(src: Path) -> tuple[Path, dict]:
    """The YAML file of the set and its content, all values as text; an empty one where there is none."""
    files = [src / "data.yaml"] if (src / "data.yaml").is_file() else sorted([*src.glob("*.yaml"), *src.glob("*.yml")])
    contents = {file: _read_yaml(file) for file in files}
    if len(files) > 1:
        contents = {file: content for file, content in contents.items() if isinstance(content, dict) and "names" in content}
    if len(contents) > 1:
        names = ", ".join(file.name for file in contents)
        raise UserError(f"{src}: which YAML file describes the set, {names}? Name it data.yaml, or keep one there")
    for file, content in contents.items():
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected names, train and val by name")
        return file, content
    return src / "data.yaml", {}


def _read_yaml(file: Path) -> object:
    """The content with every value as text, as ``no``, ``on`` and ``1.0`` are class names here; the loader makes no other objects."""
    try:
        return yaml.load(read_text(file), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file}: not a YAML file ({' '.join(str(error).split())})") from None


def _names(src: Path, settings: dict) -> dict[int, str]:
    """Class number to class name."""
    names = settings.get("names")
    lists = [src / name for name in CLASS_FILES if (src / name).is_file()]
    if not names and "names" not in settings and lists:
        names = read_lines(lists[0])
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if isinstance(names, dict) and all(number.isdecimal() and isinstance(name, str) for number, name in names.items()):
        # A blank name counts, but names no class.
        named = {int(number): name.strip() for number, name in names.items() if name.strip()}
        if named:
            return named
    raise UserError(f"{src}: no class names; give them as a list under names in data.yaml, one a line in classes.txt, or by --category")


def _keypoint_numbers(file: Path, settings: dict) -> int:
    """How many numbers of keypoints follow each box."""
    shape = settings.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(each, str) and each.isdecimal() for each in shape):
        raise UserError(f"{file}: kpt_shape must be a list of two numbers, keypoints and values of each, not {shape!r}")
    if int(shape[0]) < 1 or int(shape[1]) not in (2, 3):
        raise UserError(f"{file}: kpt_shape {', '.join(shape)}: it takes at least one keypoint of 2 or 3 values")
    return int(shape[0]) * int(shape[1])


# ------------------------------------------------------------------------------------------------------------------ the images


def _split_images(src: Path, settings: dict, split: str, notes: Notes) -> list[Path]:
    """The images of a split; nothing where the set does not have it."""
    aliases = SPLIT_NAMES[split]
    entries = next((settings[name] for name in aliases if settings.get(name)), None)
    if entries is None:
        folders = [f"images/{name}" for name in aliases] + [f"{name}/images" for name in aliases] + [*aliases, DARKNET_FOLDERS[split]]
        found = [name for name in folders if (src / name).is_dir()] or [
            f"{name}.txt" for name in aliases if (src / f"{name}.txt").is_file()
        ]
        entries = found[:1]
    elif split == "test" and not all(_exists(src, settings, entry) for entry in _as_list(entries)):
        return []  # what is left out need not be there
    return sorted({path for entry in _as_list(entries) for path in _entry_images(src, settings, entry, split, notes)})


def _as_list(entries: object) -> list:
    return entries if isinstance(entries, list) else [entries]


def _exists(src: Path, settings: dict, entry: object) -> bool:
    return isinstance(entry, str) and _inside(src, entry, _roots(src, settings)) is not None


def _roots(src: Path, settings: dict) -> list[Path]:
    root = settings.get("path") or "."
    if not isinstance(root, str):
        raise UserError(f"{src}: path in the YAML file must be one folder, not {root!r}")
    return [src / root, src]


def _inside(src: Path, entry: str, roots: Iterable[Path]) -> Path | None:
    """What ``entry`` means below ``src``.

    Such entries travel between computers: where it does not exist as it is written, its leading folders are ignored as far as needed.
    """
    inside = os.path.abspath(src)  # not resolved: links in the folder are the user's own
    parts = [part for part in entry.strip().replace("\\", "/").split("/") if part not in ("", ".", "..") and not part.endswith(":")]
    tails = (src.joinpath(*parts[start:]) for start in range(len(parts)))
    for path in (*(root / entry.strip() for root in roots), *tails):
        absolute = Path(os.path.abspath(path))
        if absolute.is_relative_to(inside) and os.path.exists(absolute):
            return src / absolute.relative_to(inside)
    return None


def _entry_images(src: Path, settings: dict, entry: object, split: str, notes: Notes) -> list[Path]:
    """The images that one entry of the YAML file names."""
    if not isinstance(entry, str) or not entry:
        raise UserError(f"{src}: {split} in the YAML file must name folders of images or lists of them, not {entry!r}")
    path = _inside(src, entry, _roots(src, settings))
    if path is None:
        raise UserError(f"{src}: {split} in the YAML file names {entry!r}, which is no folder in {src}")
    if path.is_dir():
        return [path / name for name in list_images(path)]
    if path.suffix.lower() != ".txt":
        raise UserError(f"{src}: {split} in the YAML file names {entry!r}, which is neither a folder nor a list of images (*.txt)")
    found = []
    for line in filter(None, read_lines(path)):
        image = _inside(src, line, [path.parent, *_roots(src, settings)])
        if image and image.is_file() and image.suffix.lower() in IMAGE_SUFFIXES:
            found.append(image)
        elif split != "test":  # what is left out need not be there
            notes.add(f"image of {path.name} is not in the folder, left out", line)
    if not found and split != "test":
        raise UserError(f"{path}: none of the images that it lists is in {src}")
    return found


def _below(src: Path, name: str) -> list[Path]:
    return [src / name / each for each in list_images(src / name)]


def _note_left_out(src: Path, paths: dict[str, list[Path]], splits: dict[str, list[LabeledImage]], notes: Notes) -> None:
    taken = {split: {image.path for image in images} for split, images in splits.items()}
    for path in sorted(taken["train"] & taken.get("val", set())):
        notes.add("image is in both train and val", path.relative_to(src).as_posix())
    used, finder = set().union(*taken.values()), ImageFinder(src)
    test = set(paths["test"]) - used
    for name in finder.names:
        path = src / name
        if path not in used:
            of_test = path in test or any(part in SPLIT_NAMES["test"] for part in PurePosixPath(name).parts[:-1])
            notes.add("image of the test part, left out" if of_test else "image is neither in train nor in val, left out", name)
    labels = {src / name: _label_file(src, src / name) for name in finder.names}
    known = set(labels.values())
    for folder in sorted({file.parent for path, file in labels.items() if file and path in used} - {src}):
        for file in sorted(folder.glob("*.txt")):
            if file not in known and file.name not in ("classes.txt", *(f"{name}.txt" for name in SPLIT_NAMES)):
                notes.add("label file without its image, left out", file.relative_to(src).as_posix())


# ------------------------------------------------------------------------------------------------------------------ the labels


def _images(
    src: Path, split: str, paths: list[Path], names: dict[int, str], keypoints: int, options: Options, notes: Notes
) -> list[LabeledImage]:
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    finder = ImageFinder(folder)
    labels = {path: _label_file(src, path) for path in paths}
    if not any(labels.values()):
        raise UserError(f"{folder}: no image of {split} has a label file; labels belong in the folder labels beside images")
    images = []
    for path, file in labels.items():
        image = open_image(finder, path.relative_to(folder).as_posix(), folder, options, notes)
        if file is None:
            notes.add("image without a label file, taken as one without objects", image.name)
        else:
            _read_labels(image, file, names, keypoints, options, notes)
        images.append(image)
    return images


def _label_file(src: Path, image: Path) -> Path | None:
    parts = list(image.relative_to(src).with_suffix(".txt").parts)
    files = [image.with_suffix(".txt")]
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        files.insert(0, src.joinpath(*parts[:last], "labels", *parts[last + 1 :]))
    return next((file for file in files if file.is_file()), None)


def _read_labels(image: LabeledImage, file: Path, names: dict[int, str], keypoints: int, options: Options, notes: Notes) -> None:
    for number, line in enumerate(read_lines(file), start=1):
        if not line:
            continue
        where = f"{file}, line {number}"
        try:
            class_number, *values = map(float, line.split())
        except ValueError:
            raise UserError(f"{where}: not a line of numbers") from None
        values = _without_keypoints(values, keypoints, where)
        _check_values(values, where)
        category = options.category or names.get(int(class_number) if class_number.is_integer() else -1)
        if not category:
            raise UserError(f"{where}: class {class_number:g} has no name; the classes go from {min(names)} to {max(names)}")
        add_object(image, category, _shape(values, image), f"{file.name} line {number}", notes, outline=len(values) > 4)
    if keypoints:
        notes.add("label file with keypoints (kpt_shape): its classes and boxes are taken, the keypoints are left out", file.name)


def _without_keypoints(values: list[float], keypoints: int, where: str) -> list[float]:
    """The values of the box where keypoints follow it, else all values."""
    count = len(values) + 1
    if keypoints:
        if count != 5 + keypoints:
            raise UserError(
                f"{where}: {count} numbers; with this kpt_shape a line has {5 + keypoints} (class cx cy width height, keypoints)"
            )
        return values[:4]
    if not (len(values) == 4 or (len(values) >= 6 and len(values) % 2 == 0)):
        raise UserError(f"{where}: {count} numbers; a box has 5 (class cx cy width height), an outline 7, 9, 11, ...")
    return values


def _check_values(values: list[float], where: str) -> None:
    if not all(-1 <= value <= 2 for value in values) or (len(values) == 4 and min(values[2:]) < 0):  # false for NaN as well
        hint = "; these look like pixels" if max(values) > 2 else ""
        raise UserError(f"{where}: positions and sizes must be fractions of the image, from 0 to 1{hint}")


def _shape(values: list[float], image: LabeledImage) -> shapes.Shape:
    """Fractions as pixels, rounded to hundredths: text files carry six digits, which is less than that in a large image."""
    pixels = [round(value * side, 2) for value, side in zip(values, [image.width, image.height] * (len(values) // 2), strict=True)]
    if len(pixels) > 4:
        return shapes.from_polygon(list(zip(pixels[::2], pixels[1::2], strict=True)))
    cx, cy, width, height = pixels
    return shapes.from_box(cx - width / 2, cy - height / 2, width, height)
