"""The data set: where it lies, what its COCO files say, and how its photographs become batches."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from raydetr.config import Data
from raydetr.data.images import image_path, read_header, read_image
from raydetr.data.values import is_finite, is_number, short, whole_number
from raydetr.errors import UserError
from raydetr.storage import fetched

ANNOTATION_FILES = ("custom_{split}.json", "instances_{split}2017.json")  # under annotations/, the first that exists is taken


class Split(NamedTuple):
    """One part of a data set: the folder of its images and its COCO file."""

    images: Path
    annotations: Path


def find_split(data: Data, split: str) -> Split:
    """Where the ``split`` ("train" or "val") of the settings ``data.*`` lies.

    ``data.<split>_images`` and ``data.<split>_annotations`` come first; what they leave open is looked for in ``data.path``:
    <split>2017/ and annotations/custom_<split>.json or annotations/instances_<split>2017.json. Raises UserError, saying what
    was looked for, where one is missing. What lies in an object store is fetched to this machine, once for all its processes.
    """
    images, annotations = getattr(data, f"{split}_images"), getattr(data, f"{split}_annotations")
    if data.path is None and not (images and annotations):
        raise UserError(f"data.path is not set: give the data set's folder (or data.{split}_images and data.{split}_annotations)")
    root = Path() if images and annotations else fetched(data.path)
    if not root.is_dir():
        raise UserError(f"data.path: there is no folder {data.path}")
    candidates = [root / "annotations" / name.format(split=split) for name in ANNOTATION_FILES]
    if annotations:
        candidates = [fetched(annotations)]
    folder = fetched(images) if images else root / f"{split}2017"
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        looked = " and ".join(map(str, candidates))
        raise UserError(f"no {split} annotations: looked for {looked}; set data.{split}_annotations or convert with raydetr data convert")
    if not folder.is_dir():
        raise UserError(f"no {split} images: looked for the folder {folder}; set data.{split}_images if they lie elsewhere")
    return Split(folder, file)


# ---------------------------------------------------------------------------------------------------- the annotation file


def read_coco(path: str | Path) -> dict[str, Any]:
    """The COCO file as it stands: a dict whose "images", "annotations" and "categories" are lists of dicts.

    Raises UserError where it cannot be read, is no JSON, or no COCO annotation file.
    """
    try:
        coco = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, thousands of nested brackets
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if isinstance(coco, list):
        kind = "results (detections)" if coco and isinstance(coco[0], dict) and "score" in coco[0] else f"{len(coco)} entries"
        raise UserError(f"{path}: a list of {kind}, not a COCO annotation file with images, annotations and categories")
    if not isinstance(coco, dict):
        raise UserError(f"{path}: not a COCO annotation file, only {short(coco)}")
    if "_via_img_metadata" in coco or any(isinstance(entry, dict) and "regions" in entry for entry in coco.values()):
        raise UserError(f"{path}: a VIA file, not a COCO annotation file; convert it with raydetr data convert")
    for key in ("images", "annotations", "categories"):
        if key not in coco:
            raise UserError(f"{path}: not a COCO annotation file: {key!r} is missing")
        if not isinstance(coco[key], list) or not all(isinstance(entry, dict) for entry in coco[key]):
            raise UserError(f"{path}: not a COCO annotation file: {key!r} is not a list of objects")
    return coco


def load_coco(annotations: str | Path, images: Path | None = None) -> tuple[dict[str, list[dict]], list[str]]:
    """The COCO file made sound, and warnings (one line each) about what was left out or filled in.

    Images, annotations and categories keep only the fields of object detection. Categories are sorted by id, annotations are
    numbered from 1 whatever the file says (pycocotools reads a matched annotation id 0 as unmatched), ``iscrowd`` and ``area``
    (else width x height) are filled in. Boxes that no prediction can find are left out and counted: a side that is zero, negative
    or not finite, or no pixel of the image covered. With the folder ``images`` every image must be there, and missing sizes
    are read from the files.

    Raises UserError, naming file and image or annotation id, for what would make training fail or lie: ids that are missing, no
    whole numbers, unknown or given twice, names that lead out of the folder, boxes that are not four numbers, a set without
    images or without any box.
    """
    file = read_coco(annotations)
    warnings: list[str] = []
    cleaned = _clean_images(file["images"], annotations)
    if images is not None:
        _find_images(cleaned, images, annotations, warnings)
    categories = _clean_categories(file["categories"], annotations, warnings)
    boxes = _clean_annotations(file["annotations"], cleaned, categories, annotations)
    boxes = _with_area(boxes, cleaned, annotations, warnings)
    if all(box["iscrowd"] for box in boxes):
        raise UserError(f"{annotations}: none of the {len(cleaned)} images has a box; there is nothing to learn and nothing to find")
    for number, box in enumerate(boxes, 1):
        box["id"] = number
    return {"images": list(cleaned.values()), "annotations": boxes, "categories": list(categories.values())}, warnings


def _clean_images(entries: list[dict], path: str | Path) -> dict[int, dict]:
    """By image id, in order of the ids; width and height are None where the file does not say them."""
    if not entries:
        raise UserError(f"{path}: there are no images in it")
    cleaned: dict[int, dict] = {}
    for number, entry in enumerate(entries, 1):
        image_id = _id(entry.get("id"), f"{path}: id of image number {number}")
        if image_id in cleaned:
            raise UserError(f"{path}: image id {image_id} stands twice; give every image its own")
        try:
            image_path(Path(), entry.get("file_name"))
        except UserError as error:
            raise UserError(f"{path}: image id {image_id}: {error}") from None
        size = (entry.get("width"), entry.get("height"))
        width, height = map(int, size) if all(is_finite(side) and side >= 1 for side in size) else (None, None)
        cleaned[image_id] = {"id": image_id, "file_name": entry["file_name"], "width": width, "height": height}
    return dict(sorted(cleaned.items()))


def _find_images(images: dict[int, dict], folder: Path, path: str | Path, warnings: list[str]) -> None:
    """Raises UserError where files are missing; fills in sizes that are."""
    listings: dict[Path, set[str]] = {}  # one listing of a folder is quicker than a question for each of 100 000 files
    missing = []
    for image in images.values():
        file = image_path(folder, image["file_name"])
        if file.parent not in listings:
            listings[file.parent] = {each.name for each in file.parent.iterdir()} if file.parent.is_dir() else set()
        if file.name not in listings[file.parent] and not file.is_file():  # the second where upper and lower case are one
            missing.append(image)
    if missing:
        first = f"{short(missing[0]['file_name'])} (image id {missing[0]['id']})"
        raise UserError(f"{path}: {len(missing)} of {len(images)} images are not in {folder}, the first is {first}")
    unsized = [image for image in images.values() if image["width"] is None]
    for image in unsized:
        image["width"], image["height"] = read_header(image_path(folder, image["file_name"]))[:2]
    if unsized:
        warnings.append(f"{path}: {_counted(unsized, 'image')} without width and height: read from the files")


def _clean_categories(entries: list[dict], path: str | Path, warnings: list[str]) -> dict[int, dict]:
    """By category id, in order of the ids."""
    if not entries:
        raise UserError(f"{path}: there are no categories in it")
    cleaned: dict[int, dict] = {}
    for number, entry in enumerate(entries, 1):
        category_id = _id(entry.get("id"), f"{path}: id of category number {number}")
        name = entry.get("name")
        if category_id in cleaned:
            raise UserError(f"{path}: category id {category_id} stands twice; give every category its own")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: category id {category_id} has no name")
        cleaned[category_id] = {"id": category_id, "name": name}
    names = [each["name"] for each in cleaned.values()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        warnings.append(f"{path}: several categories are named {', '.join(map(short, twice))}; they are told apart by their ids only")
    return dict(sorted(cleaned.items()))


def _clean_annotations(entries: list[dict], images: dict[int, dict], categories: dict[int, dict], path: str | Path) -> list[dict]:
    """Every annotation with what detection needs of it; ``area`` is None where the file does not say it. Ids are the file's."""
    cleaned = []
    for number, entry in enumerate(entries, 1):
        try:
            cleaned.append(_clean_annotation(entry, images, categories))
        except UserError as error:
            which = f"id {short(entry['id'])}" if "id" in entry else f"number {number} (without id)"
            raise UserError(f"{path}: annotation {which}: {error}") from None
    return cleaned


def _clean_annotation(entry: dict, images: dict[int, dict], categories: dict[int, dict]) -> dict:
    image_id, category_id = _id(entry.get("image_id"), "image_id"), _id(entry.get("category_id"), "category_id")
    if image_id not in images:
        raise UserError(f"image id {image_id} is not among the file's images")
    if category_id not in categories:
        raise UserError(f"category id {category_id} is not among the file's categories")
    xywh = entry.get("bbox")
    if not isinstance(xywh, list) or len(xywh) != 4 or not all(map(is_number, xywh)):
        raise UserError(f"bbox {short(xywh)} is not a list of four numbers, [x, y, width, height]")
    crowd = entry.get("iscrowd") or 0
    if crowd not in (0, 1):
        raise UserError(f"iscrowd is {short(crowd)}, not 0 or 1")
    area = entry.get("area")
    area = area if is_finite(area) and area > 0 else None
    return {"id": entry.get("id"), "image_id": image_id, "category_id": category_id, "bbox": xywh, "area": area, "iscrowd": int(crowd)}


def _with_area(annotations: list[dict], images: dict[int, dict], path: str | Path, warnings: list[str]) -> list[dict]:
    """The annotations whose boxes can be found, with their ``area``; the others are counted in ``warnings``."""
    kept, empty, outside = [], [], []
    for annotation in annotations:
        x, y, width, height = annotation["bbox"]
        image = images[annotation["image_id"]]
        if not all(map(is_finite, annotation["bbox"])) or width <= 0 or height <= 0:
            empty.append(annotation)
        elif x + width <= 0 or y + height <= 0 or (image["width"] and (x >= image["width"] or y >= image["height"])):
            outside.append(annotation)
        else:
            kept.append(annotation | {"area": annotation["area"] or width * height})
    for found, what in ((empty, "without area (a side zero, negative or not finite)"), (outside, "outside the image")):
        if found:
            warnings.append(f"{path}: {_counted(found, 'annotation')} {what}: left out")
    return kept


def _id(value: Any, what: str) -> int:
    number = whole_number(value)
    if number is None or abs(number) >= 2**63:
        raise UserError(f"{what} is {'missing' if value is None else short(value)}; it must be a whole number")
    return number


def _counted(found: list[dict], noun: str) -> str:
    return f"{len(found)} {noun}{'s' if len(found) > 1 else ''} (first: {noun} id {short(found[0]['id'])})"


# ------------------------------------------------------------------------------------------------------------ the data set


class CocoImages(Dataset):
    """The photographs of one split with their boxes.

    ``dataset[i]`` is ``image, target``: the image float32 [3, h, w], resized and normalized by ``transforms``; of the target
    ``boxes`` float32 [n, 4] cxcywh normalized by the image's new size, ``labels`` int64 [n] in 0..K-1, ``area`` float32 [n] in
    pixels of the photograph, ``iscrowd`` int64 [n] (0: crowd regions are nobody's box to learn), ``image_id`` int64 [1],
    ``orig_size`` and ``size`` int64 [2], height and width of the photograph and of the image. ``dataset[epoch, i]`` is the same
    as after ``set_epoch(epoch)``.

    ``categories`` fixes the label order (a trained model's, or the training set's for validation): the file's categories are then
    found in it by name, and ``coco`` carries its ids. Without it labels follow the file's ascending category ids.

    Attributes: ``categories`` [{"id", "name"}] in label order, ``coco`` the cleaned file (see :func:`load_coco`), ``image_ids``,
    ``files`` [(path, (width, height))], ``warnings`` one line each, and ``images(path, size)``, which reads a picture as
    :func:`raydetr.data.images.read_image` does and may be exchanged for what reads faster. Raises UserError like :func:`load_coco`,
    and at a picture that cannot be read.
    """

    def __init__(
        self,
        split: Split,
        transforms: Callable,
        seed: int = 0,
        categories: list[dict] | None = None,
    ):
        self.split, self.transforms, self.seed = split, transforms, seed
        self.images: Callable[[Path, tuple[int, int]], torch.Tensor] = read_image
        self.coco, self.warnings = load_coco(split.annotations, split.images)
        self.categories = self.coco["categories"]
        if categories is not None:
            self.categories = [{"id": each["id"], "name": each["name"]} for each in categories]
            self.warnings += _use_categories(self.coco, self.categories, split.annotations)
        self.image_ids = [image["id"] for image in self.coco["images"]]
        self.epoch = 0
        self._pack()

    def _pack(self) -> None:
        from torchvision.ops import box_convert  # as long to import as torch, and who only reads annotations shall not wait for it

        # Whole tensors instead of a million small objects: those, merely looked at, would be copied into every loading process.
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        rows = {image_id: row for row, image_id in enumerate(self.image_ids)}
        boxes = [annotation for annotation in self.coco["annotations"] if not annotation["iscrowd"]]
        boxes.sort(key=lambda annotation: rows[annotation["image_id"]])  # stable: an image's boxes stay in the file's order
        per_image = np.bincount([rows[each["image_id"]] for each in boxes], minlength=len(rows))
        self._starts = np.concatenate([[0], np.cumsum(per_image)])
        self._labels = torch.tensor([label_of[each["category_id"]] for each in boxes], dtype=torch.int64)
        self._area = torch.tensor([each["area"] for each in boxes], dtype=torch.float32)
        xywh = torch.tensor([each["bbox"] for each in boxes], dtype=torch.float64)
        self._xyxy = box_convert(xywh, "xywh", "xyxy").float()
        self.files = [
            (image_path(self.split.images, image["file_name"]), (image["width"], image["height"])) for image in self.coco["images"]
        ]

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """From now on random transforms, and the order of a training loader, are those of ``epoch``."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        from torchvision.ops import box_convert

        epoch, index = index if isinstance(index, tuple) else (self.epoch, index)
        photograph = self.images(*self.files[index])
        orig_size = photograph.shape[-2:]
        mine = slice(self._starts[index], self._starts[index + 1])
        image, boxes = self._transformed(photograph, epoch, index)
        image, xyxy = image.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor)
        keep = (xyxy[:, 2:] > xyxy[:, :2]).all(1)  # a crop leaves boxes without area
        height, width = image.shape[-2:]
        target = {
            "boxes": box_convert(xyxy[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height]),
            "labels": self._labels[mine][keep],
            "area": self._area[mine][keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor([height, width]),
        }
        return image, target

    def _transformed(self, photograph: torch.Tensor, epoch: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        from torchvision import tv_tensors

        from raydetr.data.transforms import drawn_from

        size = photograph.shape[-2:]
        xyxy = _clip(self._xyxy[self._starts[index] : self._starts[index + 1]], size)
        with drawn_from(self.seed, epoch, index):
            return self.transforms(tv_tensors.Image(photograph), tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=tuple(size)))

    def size_of(self, epoch: int, index: int) -> tuple[int, int]:
        """Height and width of the image that ``dataset[epoch, index]`` has; no picture is read for it."""
        width, height = self.files[index][1]
        image, _ = self._transformed(torch.empty(3, height, width, dtype=torch.uint8, device="meta"), epoch, index)
        return tuple(image.shape[-2:])


def _clip(xyxy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return xyxy.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def _use_categories(coco: dict[str, list[dict]], categories: list[dict], path: str | Path) -> list[str]:
    """Gives ``coco`` the ids of ``categories``, found by name (and id, where names repeat); returns warnings.

    Raises UserError where an annotation's category is not among them.
    """
    known = {_spelling(each["name"]): each["id"] for each in reversed(categories)}
    exact = {(each["id"], _spelling(each["name"])) for each in categories}
    new_ids, names = {}, {}
    for each in coco["categories"]:
        name = _spelling(each["name"])
        new_ids[each["id"]] = each["id"] if (each["id"], name) in exact else known.get(name)
        names[each["id"]] = each["name"]
    for annotation in coco["annotations"]:
        old = annotation["category_id"]
        if new_ids[old] is None:
            raise UserError(
                f"{path}: category {short(names[old])} (id {old}, image id {annotation['image_id']}) is not among those of the "
                f"training: {short([each['name'] for each in categories])}"
            )
        annotation["category_id"] = new_ids[old]
    coco["categories"] = [dict(each) for each in categories]
    moved = sum(new is not None and new != old for old, new in new_ids.items())
    return [f"{path}: {moved} categories have other ids than in training; they were found by name"] if moved else []


def _spelling(name: str) -> str:
    return name.strip().casefold()


# ------------------------------------------------------------------------------------------------------------- the batches


def collate(batch: list[tuple[torch.Tensor, dict]]) -> tuple[torch.Tensor, torch.Tensor | None, list[dict]]:
    """Images [B, 3, H, W], filled up with 0 at the right and the bottom to the largest, mask bool [B, H, W] (True where filled up;
    None where nothing is), and the targets."""
    images, targets = zip(*batch, strict=True)
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for image, into, filled in zip(images, padded, mask, strict=True):
        into[:, : image.shape[1], : image.shape[2]] = image
        filled[: image.shape[1], : image.shape[2]] = False
    return padded, mask if mask.any() else None, list(targets)


def build_loader(
    dataset: CocoImages,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    group_sizes: bool = False,
) -> DataLoader:
    """Batches of :func:`collate` for worker ``rank`` of ``world_size``, loaded by ``num_workers`` processes.

    With ``shuffle`` (training) every worker gets as many batches of ``batch_size``, in an order that follows from ``seed`` and the
    epoch of ``dataset.set_epoch``, which is all that has to be called before an epoch; what does not fill a batch is left out as in
    the official code, unless it is all there is; ``group_sizes`` makes the batches as :class:`LikeSizes` does. Without ``shuffle``
    (evaluation) the workers share the batches out, each image once, and only photographs of one size come together: nothing is then
    filled up, so that what the network says of a photograph depends neither on ``batch_size`` nor on ``world_size``.
    """
    if shuffle:
        sampler = EpochSampler(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        batches = (LikeSizes if group_sizes else BatchSampler)(sampler, batch_size, drop_last=len(sampler) >= batch_size)
    else:
        batches = _batches_of_one_size(dataset, batch_size)[rank::world_size]
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator().manual_seed(seed),  # else every epoch would take a number from the process's own
    )


def _batches_of_one_size(dataset: CocoImages, batch_size: int) -> list[list[int]]:
    indices: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(dataset.coco["images"]):
        indices.setdefault((image["width"], image["height"]), []).append(index)
    return [batch for of_one_size in indices.values() for batch in BatchSampler(of_one_size, batch_size, drop_last=False)]


class EpochSampler(DistributedSampler):
    """Yields (epoch, index): so the epoch reaches loading processes, which keep the copy of the data set they began with."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.dataset.epoch
        self.set_epoch(epoch)
        return ((epoch, index) for index in super().__iter__())


class LikeSizes(BatchSampler):
    """The batches of an :class:`EpochSampler`'s images, made of images alike in shape and size as the transforms leave them.

    Every ``window`` batches are put together anew and shuffled: which images an epoch has, and what it leaves out, stays as drawn. The
    workers of a run shuffle alike, so that they have about as large images in the same step.
    """

    window = 64

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        dataset, batches = self.sampler.dataset, super().__iter__()
        generator = torch.Generator().manual_seed(self.sampler.seed + dataset.epoch)
        while drawn := list(itertools.islice(batches, self.window)):
            alike = sorted(itertools.chain(*drawn), key=lambda image: _likeness(dataset.size_of(*image)))
            made = [alike[start : start + self.batch_size] for start in range(0, len(alike), self.batch_size)]
            yield from (made[number] for number in torch.randperm(len(made), generator=generator).tolist())


def _likeness(size: tuple[int, int]) -> tuple[bool, int, int]:
    height, width = size
    return width > height, max(size), min(size)


class Loader(DataLoader):
    """A DataLoader whose processes' UserErrors arrive as the one line that they are, not as a traceback in a message."""

    def __iter__(self) -> Iterator:
        return _one_line_errors(super().__iter__())


def _one_line_errors(batches: Iterator) -> Iterator:
    try:
        yield from batches
    except UserError as error:
        raise UserError(str(error).rstrip().rsplit(f"{UserError.__module__}.{UserError.__qualname__}: ", 1)[-1]) from None
