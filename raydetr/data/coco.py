"""The data set: where it lies, what its COCO files say, and how its photographs become batches."""

from pathlib import Path
from typing import NamedTuple

from raydetr.config import Data
from raydetr.errors import UserError

ANNOTATION_FILES = ("custom_{split}.json", "instances_{split}2017.json")  # under annotations/, the first that exists is taken


class Split(NamedTuple):
    """One part of a data set: the folder of its images and its COCO file."""

    images: Path
    annotations: Path


def find_split(data: Data, split: str) -> Split:
    """Where the ``split`` ("train" or "val") of the settings ``data.*`` lies.

    ``data.<split>_images`` and ``data.<split>_annotations`` come first; what they leave open is looked for in ``data.path``:
    <split>2017/ and annotations/custom_<split>.json or annotations/instances_<split>2017.json. Raises UserError, saying what
    was looked for, where one is missing.
    """
    images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
    if data.path is None and not (images and annotations):
        raise UserError(f"data.path is not set: give the data set's folder (or data.{split}_images and data.{split}_annotations)")
    if data.path is not None and not (images and annotations) and not Path(data.path).expanduser().is_dir():
        raise UserError(f"data.path: there is no folder {data.path}")
    root = Path(data.path or ".").expanduser()
    candidates = [root / "annotations" / name.format(split=split) for name in ANNOTATION_FILES]
    if annotations:
        candidates = [Path(annotations).expanduser()]
    folder = Path(images).expanduser() if images else root / f"{split}2017"
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        looked = " and ".join(map(str, candidates))
        raise UserError(f"no {split} annotations: looked for {looked}; set data.{split}_annotations or convert with raydetr data convert")
    if not folder.is_dir():
        raise UserError(f"no {split} images: looked for the folder {folder}; set data.{split}_images if they lie elsewhere")
    return Split(folder, file)
