"""Check the image files of a data set: whether they exist, can be read, and fit their annotations, and whether one is in both splits."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from raydetr.data.check.findings import MINOR, Report
from raydetr.data.coco import Split, annotated_size
from raydetr.data.file_names import Located, locate_files
from raydetr.data.images import Header, image_path, read_header
from raydetr.data.splits import ALIKE, alike_distance, file_digest, is_telling, thumbnail
from raydetr.errors import UserError
from raydetr.values import plain, short, whole_number

REPLACE = "replace the file, or take it out of the annotations"


class CheckedImage(NamedTuple):
    """An image entry of an annotation file."""

    label: str  # its name in findings
    path: Path | None  # its file; None where that is missing or unreadable
    size: tuple[int, int] | None  # annotated width and height, else those of the file; None where neither is known
    split: Split

    @property
    def file(self) -> Path:
        """The file of an image that has one."""
        assert self.path is not None
        return self.path


def check_images(entries: list[dict], split: Split, name: str, report: Report) -> dict[int, CheckedImage]:
    """Check the image entries of an annotation file and their files; return those with a sound id, by id.

    Args:
        entries: The ``images`` of the file.
        split: Where the files are.
        name: ``train`` or ``val``, for the report.
        report: Where findings are added.
    """
    images: dict[int, CheckedImage] = {}
    names: Counter[str] = Counter()
    located = locate_files(split.images, _sound_names(entries, split.images))
    if not entries:
        report.error(name, "there are no images", None, "training and validation need at least one each")
    for number, entry in enumerate(entries, 1):
        image_id, file_name = whole_number(entry.get("id")), entry.get("file_name")
        label = f"{plain(file_name)} (image id {short(entry.get('id'))})"
        if image_id is None:
            report.error(name, "image id is no whole number", f"{label}, image number {number}", "give it one")
        elif image_id in images:
            report.error(name, "image id is used twice", f"{label} and {images[image_id].label}", "give every image an id of its own")
        else:
            images[image_id] = _check_image(entry, label, split, located, name, report)
            names[str(file_name)] += 1
            if isinstance(entry.get("id"), str):
                report.warn(name, "image id is text", label, "read as a number; other tools do not", MINOR)
    for file_name in (file_name for file_name, times in names.items() if times > 1):
        report.warn(name, "file is listed as several images", plain(file_name), "put all its boxes under one image id")
    return images


def _sound_names(entries: list[dict], folder: Path) -> list[str]:
    names = []
    for entry in entries:
        with contextlib.suppress(UserError):
            image_path(folder, entry.get("file_name"))
            names.append(entry["file_name"])
    return names


def _check_image(entry: dict, label: str, split: Split, located: Located, name: str, report: Report) -> CheckedImage:
    size = annotated_size(entry)
    unusable = CheckedImage(label, None, size, split)
    if size is None:
        report.warn(name, "image has no width and height", label, "they are read from the file; write them into the annotations", MINOR)
    try:
        image_path(split.images, entry.get("file_name"))
    except UserError:
        advice = "give it relative to the image folder; raydetr data convert --from coco finds exported images by their names"
        report.error(name, "file name leads out of the image folder or is none", label, advice)
        return unusable
    file_name = entry["file_name"]
    if file_name not in located.found:
        hint = located.missing[file_name]
        advice = f"put it into {split.images} (mind upper and lower case), or take it out of the annotations"
        report.error(name, "image is missing", f"{label}{hint and ': '}{hint}", advice)
        return unusable
    if located.found[file_name] != file_name:
        what = f"{label} is {plain(located.found[file_name])}"
        report.warn(name, "file name is spelled in another way in the image folder", what, "taken; other tools will not find it", MINOR)
    path = image_path(split.images, located.found[file_name])
    try:
        header = read_header(path, split.max_megapixels)
    except UserError as error:
        report.error(name, "image cannot be read", f"{label}: {_reason(error, path)}", REPLACE)
        return unusable
    if size not in (None, header.stored, header.upright):
        sizes = f"{label}: {size[0]} x {size[1]} annotated, {header.width} x {header.height} in the file"
        report.error(name, "image has another size than its annotation says", sizes, "put the labelled image there, or scale its boxes")
        return unusable
    if header.orientation != 1:
        _warn_of_rotation(header, size, label, split, name, report)
    return CheckedImage(label, path, size or header.size(split.exif), split)


def _warn_of_rotation(header: Header, size: tuple[int, int] | None, label: str, split: Split, name: str, report: Report) -> None:
    taken = "turned upright" if header.is_turned(size, split.exif) else "as stored"
    if size and header.stored != header.upright:
        what = f"image has an EXIF rotation; its annotated size says that the boxes belong to it {taken}"
        advice = "look at its boxes; to be sure, save it upright without the tag"
    else:
        unknown = "its size is the same either way" if size else "its annotation has no size"
        what = f"image has an EXIF rotation, and {unknown}; its boxes are taken to belong to it {taken}"
        other = "stored" if split.exif == "upright" else "upright"
        advice = (
            f"look at its boxes; where they belong to it {'as stored' if other == 'stored' else 'turned upright'}, set data.exif: {other}"
        )
    report.warn(name, what, f"{label}, orientation {header.orientation}", advice)


def check_pixels(images: dict[str, list[CheckedImage]], report: Report, progress: Callable[[int, int], None] | None = None) -> None:
    """Decode every image, report the broken ones, and look for images that are in two splits.

    Args:
        images: By split, the images with a file.
        report: Where findings are added.
        progress: Called with (done, total) after each image.
    """
    jobs = [(split, image) for split, each in images.items() for image in each]
    seen: dict[str, list[tuple[CheckedImage, torch.Tensor]]] = {split: [] for split in images}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        results = pool.map(_thumbnail, (image for _, image in jobs))
        for done, ((split, image), result) in enumerate(zip(jobs, results, strict=True), 1):
            if isinstance(result, UserError):
                report.error(split, "image is broken or truncated", f"{image.label}: {_reason(result, image.file)}", REPLACE)
            else:
                seen[split].append((image, result))
            if progress:
                progress(done, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all the rest
    for one, other, label in (("train", "val", "both"), ("train", "test", "test"), ("val", "test", "test")):
        if seen.get(one) and seen.get(other):
            _find_shared(seen[one], seen[other], f"{one} and {other}", label, report)


def _thumbnail(image: CheckedImage) -> torch.Tensor | UserError:
    """Return the image averaged to a few cells, float32 [3 x 16 x 16], or why it cannot be read."""
    try:
        pixels = image.split.read(image.file, image.size)
    except UserError as error:
        return error
    return thumbnail(pixels)


def _find_shared(
    train: list[tuple[CheckedImage, torch.Tensor]], val: list[tuple[CheckedImage, torch.Tensor]], splits: str, label: str, report: Report
) -> None:
    pairs = _same_files([image for image, _ in train], [image for image, _ in val])
    for one, other in pairs:
        report.error(label, f"same file in {splits}", f"{one.label} = {other.label}", "AP would be too good; keep it in one of them")
    same = {id(other) for _, other in pairs}
    rest = [(image, cells) for image, cells in val if id(image) not in same and is_telling(cells)]
    of_train = torch.stack([cells for _, cells in train])
    for start in range(0, len(rest), 256):
        some = rest[start : start + 256]
        distances, nearest = alike_distance(torch.stack([cells for _, cells in some]), of_train).min(1)
        for (image, _), distance, row in zip(some, distances.tolist(), nearest.tolist(), strict=True):
            if distance < ALIKE:
                pair = f"{train[row][0].label} ~ {image.label}"
                advice = "look at both; one scene in both makes AP too good"
                report.warn(label, f"image looks the same in {splits}", pair, advice)


def _same_files(train: list[CheckedImage], val: list[CheckedImage]) -> list[tuple[CheckedImage, CheckedImage]]:
    """Return pairs of files with the same bytes; only files of the same length are read."""
    lengths = {image.file: image.file.stat().st_size for image in (*train, *val)}
    shared = {lengths[image.file] for image in train} & {lengths[image.file] for image in val}
    of_train = {file_digest(image.file): image for image in train if lengths[image.file] in shared}
    pairs = ((of_train.get(file_digest(image.file)), image) for image in val if lengths[image.file] in shared)
    return [(one, other) for one, other in pairs if one]


def _reason(error: UserError, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
