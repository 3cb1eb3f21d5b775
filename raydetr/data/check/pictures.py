"""The files of a data set's images: are they there, can they be read, are they what the annotations speak of, is one in both sets."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import adaptive_avg_pool2d

from raydetr.data.check.findings import Report
from raydetr.data.images import image_path, read_header, read_image
from raydetr.data.values import is_finite, plain, short, whole_number
from raydetr.errors import UserError

THUMBNAIL = 16  # cells a side that a picture is averaged to, to find its likes
# Root mean square difference (of 255) between the cells of two pictures, below which they are taken for the same scene. The same
# photograph compressed or scaled anew differs by about 1, another view of a microscope's field by 3, different photographs by 12 or more.
ALIKE = 5.0
REPLACE = "replace the file, or take it out of the annotations"


class Photo(NamedTuple):
    """An entry of a file's images."""

    place: str  # its name in findings
    path: Path | None  # its file; None where that is missing or unreadable
    size: tuple[int, int] | None  # annotated width and height, else those of the file; None where neither says


def check_images(entries: list[dict], folder: Path, split: str, report: Report) -> dict[int, Photo]:
    """Every image entry with a sound id, by id."""
    photos: dict[int, Photo] = {}
    names = Counter()
    if not entries:
        report.error(split, "there are no images", None, "training and validation need at least one each")
    for number, entry in enumerate(entries, 1):
        image_id, name = whole_number(entry.get("id")), entry.get("file_name")
        place = f"{plain(name)} (image id {short(entry.get('id'))})"
        if image_id is None:
            report.error(split, "image id is no whole number", f"{place}, image number {number}", "give it one")
        elif image_id in photos:
            report.error(split, "image id stands twice", f"{place} and {photos[image_id].place}", "give every image an id of its own")
        else:
            photos[image_id] = _check_image(entry, place, folder, split, report)
            names[str(name)] += 1
    for name in (name for name, times in names.items() if times > 1):
        report.warn(split, "file is listed as several images", plain(name), "put all its boxes under one image id")
    return photos


def _check_image(entry: dict, place: str, folder: Path, split: str, report: Report) -> Photo:
    sides = (entry.get("width"), entry.get("height"))
    size = (int(sides[0]), int(sides[1])) if all(is_finite(side) and side >= 1 for side in sides) else None
    unusable = Photo(place, None, size)
    if size is None:
        report.warn(split, "image has no width and height", place, "they are read from the file; write them into the annotations")
    try:
        path = image_path(folder, entry.get("file_name"))
    except UserError:
        report.error(split, "file name leads out of the image folder or is none", place, "give it relative to the image folder")
        return unusable
    if not os.path.isfile(path):  # unlike Path.is_file no error for names that no file can have
        report.error(
            split, "image is missing", place, f"put it into {folder} (mind upper and lower case), or take it out of the annotations"
        )
        return unusable
    try:
        header = read_header(path)
    except UserError as error:
        report.error(split, "image cannot be read", f"{place}: {_reason(error, path)}", REPLACE)
        return unusable
    stored = (header.width, header.height)
    if size not in (None, stored, header.upright):
        sizes = f"{place}: {size[0]} x {size[1]} annotated, {stored[0]} x {stored[1]} in the file"
        report.error(split, "image has another size than its annotation says", sizes, "put the labelled picture there, or scale its boxes")
        return unusable
    if header.orientation != 1:
        seen = "as stored" if size in (None, stored) else "turned upright"
        what = f"image has an EXIF rotation; its annotated size says that the boxes belong to it {seen}"
        report.warn(
            split, what, f"{place}, orientation {header.orientation}", "look at its boxes; to be sure, save it upright without the tag"
        )
    return Photo(place, path, size or stored)


def check_pixels(photos: dict[str, list[Photo]], report: Report, progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every picture, name the broken ones, and look for those of train in val; ``progress(done, total)`` after each."""
    jobs = [(split, photo) for split, each in photos.items() for photo in each]
    seen: dict[str, list[tuple[Photo, torch.Tensor]]] = {split: [] for split in photos}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(_thumbnail, (photo for _, photo in jobs))
        for done, ((split, photo), result) in enumerate(zip(jobs, results, strict=True), 1):
            if isinstance(result, UserError):
                report.error(split, "image is broken or truncated", f"{photo.place}: {_reason(result, photo.path)}", REPLACE)
            else:
                seen[split].append((photo, result))
            if progress:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt shall not wait for all the rest
    if all(seen.get(split) for split in ("train", "val")):
        _find_shared(seen["train"], seen["val"], report)


def _thumbnail(photo: Photo) -> torch.Tensor | UserError:
    """The picture averaged to a few cells, float32 [3 x 16 x 16], or why it cannot be read."""
    try:
        pixels = read_image(photo.path, photo.size)
    except UserError as error:
        return error
    step = max(1, min(pixels.shape[-2:]) // (32 * THUMBNAIL))  # 1000 samples a cell are enough
    return adaptive_avg_pool2d(pixels[:, ::step, ::step].float(), THUMBNAIL).flatten()


def _find_shared(train: list[tuple[Photo, torch.Tensor]], val: list[tuple[Photo, torch.Tensor]], report: Report) -> None:
    pairs = _same_files([photo for photo, _ in train], [photo for photo, _ in val])
    for one, other in pairs:
        report.error("both", "same file in train and val", f"{one.place} = {other.place}", "AP would be too good; keep it in one of them")
    same = {id(other) for _, other in pairs}
    rest = [(photo, cells) for photo, cells in val if id(photo) not in same and cells.std() > 2 * ALIKE]  # blank ones are all alike
    of_train = torch.stack([cells for _, cells in train])
    for start in range(0, len(rest), 256):
        some = rest[start : start + 256]
        distances, nearest = (torch.cdist(torch.stack([cells for _, cells in some]), of_train) / of_train.shape[1] ** 0.5).min(1)
        for (photo, _), distance, row in zip(some, distances.tolist(), nearest.tolist(), strict=True):
            if distance < ALIKE:
                places = f"{train[row][0].place} ~ {photo.place}"
                report.warn("both", "picture looks the same in train and val", places, "look at both; one scene in both makes AP too good")


def _same_files(train: list[Photo], val: list[Photo]) -> list[tuple[Photo, Photo]]:
    """Pairs of files with the same bytes. Only files of the same length are read."""
    lengths = {photo.path: photo.path.stat().st_size for photo in (*train, *val)}
    shared = {lengths[photo.path] for photo in train} & {lengths[photo.path] for photo in val}
    of_train = {_digest(photo.path): photo for photo in train if lengths[photo.path] in shared}
    pairs = ((of_train.get(_digest(photo.path)), photo) for photo in val if lengths[photo.path] in shared)
    return [(one, other) for one, other in pairs if one]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _reason(error: UserError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
