"""The images that a prediction is made for: files, folders, or a data set, with true boxes if they are annotated."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raydetr.config import Data
from raydetr.data.coco import find_split, load_coco
from raydetr.data.images import IMAGE_SUFFIXES, image_path
from raydetr.data.masks import decode_masks
from raydetr.draw import Box
from raydetr.errors import UserError
from raydetr.text import count


@dataclass
class InputImage:
    """An image to predict on.

    Attributes:
        path: The file.
        name: Its path relative to the folder that contains all images.
        image_id: Its id in the results.
        size: Annotated width and height in pixels; None if they are unknown.
        true: True boxes; None if the image is not annotated.
        true_rles: Their masks as RLEs of the annotated size, each None where there is only a box.
    """

    path: Path
    name: str
    image_id: int
    size: tuple[int, int] | None = None
    true: list[Box] | None = None
    true_rles: list[dict[str, Any] | None] = field(default_factory=list)

    def true_masks(self, size: tuple[int, int]) -> list[np.ndarray | None] | None:
        """Return the masks of the true boxes, bool [height, width] each; None if there is none.

        Args:
            size: Width and height of the image in pixels; masks of another size are not its own and are left out.
        """
        if not any(self.true_rles):
            return None
        width, height = size
        fitting = [rle if rle and rle["size"] == [height, width] else None for rle in self.true_rles]
        return [decode_masks([rle], (height, width))[0] if rle else None for rle in fitting]


def find_images(
    sources: Sequence[str | Path], annotations: str | Path | None, out: Path, masks: bool = False
) -> tuple[list[InputImage], list[dict[str, Any]] | None, list[str]]:
    """Find the images of a prediction.

    Args:
        sources: Images and folders of images, or one data set folder.
        annotations: COCO file of some or all of the images, or None.
        out: The output folder; what an earlier prediction wrote into it is left out.
        masks: Whether to read the true masks too.

    Returns:
        The images, the categories of the annotations (None without annotations), and warnings.

    Raises:
        UserError: A source does not exist, no image is found, or the annotations belong to none of them.
    """
    paths = [Path(source).expanduser() for source in sources]
    data_sets = [path for path in paths if (path / "annotations").is_dir() and (path / "val2017").is_dir()]
    if data_sets and len(paths) > 1:
        raise UserError(f"{data_sets[0]} is a data set's folder: give it alone, or give {data_sets[0] / 'val2017'}")
    if data_sets:
        split = find_split(Data(path=str(data_sets[0]), val_annotations=str(annotations) if annotations else None), "val")
        # What is missing or cannot be read is left out and counted later.
        coco, warnings = load_coco(split.annotations, split.images, split.exif, split.max_megapixels, must_exist=False, masks=masks)
        files = [image_path(split.images, image["file_name"]) for image in coco["images"]]
        return _annotated(files, [image["file_name"] for image in coco["images"]], coco["images"], coco), coco["categories"], warnings
    files = list(dict.fromkeys(_files_of(paths, out)))
    if not files:
        raise UserError(f"no images in {', '.join(map(str, paths)) or 'nothing'}: looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    names = _names(files)
    if annotations is None:
        return [InputImage(file, name, number) for number, (file, name) in enumerate(zip(files, names, strict=True), 1)], None, []
    coco, warnings = load_coco(annotations, masks=masks)
    images = _images_of(files, coco["images"], annotations)
    unknown = images.count(None)
    if unknown == len(files):
        images_given = count(len(files), "image")
        raise UserError(f"{annotations} knows none of the {images_given}: the first is {names[0]}, not in its file names")
    if unknown:
        warnings.append(f"{annotations}: {unknown} of {len(files)} images not in it, shown without true boxes")
    return _annotated(files, names, images, coco), coco["categories"], warnings


def _files_of(sources: Sequence[Path], out: Path) -> Iterator[Path]:
    """Yield the files of the sources as absolute paths; links are not resolved, because users know the links' names."""
    written = [(out / folder / name).resolve() for folder in ("", "compare") for name in ("pictures", "thumbnails", "attention")]
    for source in sources:
        if source.is_dir():
            for path in _walk(source):
                if not any(path.resolve().is_relative_to(folder) for folder in written):
                    yield path
        elif source.exists():
            if any(source.resolve().is_relative_to(folder) for folder in written):
                raise UserError(f"{source} is in a folder that annotated images are written to; choose another output folder")
            yield Path(os.path.abspath(source))
        else:
            raise UserError(f"{source}: no such file or folder")


def _walk(folder: Path) -> Iterator[Path]:
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_stop):
        if os.path.realpath(parent) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for file in sorted(files):
            if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                yield Path(os.path.abspath(os.path.join(parent, file)))


def _stop(error: OSError) -> None:
    raise UserError(f"{error.filename}: {error.strerror}")


def _names(files: Sequence[Path]) -> list[str]:
    """Return the paths relative to the folder that contains all files."""
    try:
        top = os.path.commonpath([file.parent for file in files])
    except ValueError:  # on different drives
        return [file.as_posix() for file in files]
    return [file.relative_to(top).as_posix() for file in files]


def _images_of(files: Sequence[Path], images: list[dict], annotations: str | Path) -> list[dict | None]:
    """Return for each file the annotated image whose file_name is the end of its path, or None."""
    by_name = {tuple(Path(image["file_name"]).parts): image for image in images}
    depth = max(map(len, by_name))
    found, taken = [], {}
    for file in files:
        image = next((by_name[end] for n in range(depth, 0, -1) if (end := file.parts[-n:]) in by_name), None)
        if image and image["id"] in taken:
            raise UserError(
                f"{taken[image['id']]} and {file} are both called {image['file_name']} as in {annotations}: give only one of them"
            )
        if image:
            taken[image["id"]] = file
        found.append(image)
    return found


def _annotated(files: Sequence[Path], names: Sequence[str], images: Sequence[dict | None], coco: dict[str, list[dict]]) -> list[InputImage]:
    """Return input images with the true boxes and ids of ``images``; files without an image get the ids after the last one."""
    category = {each["id"]: each["name"] for each in coco["categories"]}
    true: dict[int, list[Box]] = {image["id"]: [] for image in coco["images"]}
    rles: dict[int, list[dict[str, Any] | None]] = {image["id"]: [] for image in coco["images"]}
    for each in coco["annotations"]:
        if not each["iscrowd"]:
            x, y, width, height = each["bbox"]
            true[each["image_id"]].append(Box((x, y, x + width, y + height), category[each["category_id"]]))
            rles[each["image_id"]].append(each.get("segmentation"))
    free = max(true) + 1
    inputs = []
    for file, name, image in zip(files, names, images, strict=True):
        if image is None:
            inputs.append(InputImage(file, name, free))
            free += 1
        else:
            size = (image["width"], image["height"]) if image["width"] else None
            inputs.append(InputImage(file, name, image["id"], size, true[image["id"]], rles[image["id"]]))
    return inputs
