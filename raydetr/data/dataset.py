"""The images of a COCO data set with their boxes and masks, as training and evaluation take them."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from raydetr.data.categories import match_categories
from raydetr.data.coco import Split, load_coco
from raydetr.data.images import image_path
from raydetr.data.masks import decode_masks, no_mask
from raydetr.data.scene import Scene
from raydetr.errors import UserError
from raydetr.text import fold_name, shortlist
from raydetr.values import short


class CocoImages(Dataset):
    """The images of one split with their boxes.

    ``dataset[i]`` is ``image, target``, drawn for the epoch of the last :meth:`set_epoch`; ``dataset[epoch, i]`` is drawn for ``epoch``.
    ``dataset[epoch, i, size]`` is ``image, target, size``: what ``image`` is to be padded to, see :func:`raydetr.data.loader.collate`.
    ``image`` is float32 [3, h, w], resized and normalized by the transforms. ``target`` is a dict with, for n boxes:

    - ``boxes``: float32 [n, 4], cxcywh, normalized by the size of ``image``
    - ``labels``: int64 [n] in 0..K-1
    - ``area``: float32 [n], in pixels of the image file
    - ``iscrowd``: int64 [n], always 0 (crowd regions are not learned)
    - ``image_id``: int64 [1]
    - ``masks``: with ``masks`` only, bool [n, h, w] (where there is no mask, nothing is set), and ``has_mask``: bool [n]
    - ``orig_size`` and ``size``: int64 [2], height and width of the image file and of ``image``

    Args:
        split: Where the data set is, see :func:`raydetr.data.coco.find_split`.
        transforms: What happens to an image and its boxes, see :mod:`raydetr.data.transforms`.
        seed: What random transforms follow from, beside epoch and index.
        categories: The categories in label order, of a trained model or of the training set. The file's categories are found among them
            (:func:`raydetr.data.categories.match_categories`), and ``coco`` carries their ids. Without it, labels follow the ascending
            category ids of the file.
        masks: Whether targets have masks.

    Attributes:
        coco: The content of the COCO file, see :func:`raydetr.data.coco.load_coco`.
        warnings: What was left out, filled in or corrected; one line each.
        categories: ``{"id", "name"}`` of each label, in label order.
        image_ids: The image ids, in the order of the indices.
        files: (path, annotated (width, height)) of each image.
        images: What decodes a file of ``files``; assign, for example, a :class:`raydetr.data.cache.DecodedImages`.
        rles: The masks of each image's boxes as RLEs; None without masks.
        target_masks: Whether targets have the masks, if there are any.
        copy_paste: Probability that objects of another image are pasted into an image, see :mod:`raydetr.data.copy_paste`.
        decode_masks: What decodes masks, called with a file of ``files`` and its RLEs; returns bool [n, height, width]. Assign, for
            example, the method of a :class:`raydetr.data.cache.DecodedImages`.

    Raises:
        UserError: See :func:`raydetr.data.coco.load_coco`; also if a category with boxes is not among ``categories``.
    """

    def __init__(
        self,
        split: Split,
        transforms: Callable,
        seed: int = 0,
        categories: Sequence[Mapping[str, Any]] | None = None,
        masks: bool = False,
    ):
        self.split, self.transforms, self.seed = split, transforms, seed
        self.images: Callable[[Path, tuple[int, int]], torch.Tensor] = split.read
        self.coco, self.warnings = load_coco(split.annotations, split.images, split.exif, split.max_megapixels, masks=masks)
        self.categories = self.coco["categories"]
        if categories is not None:
            self.categories = [{"id": each["id"], "name": each["name"]} for each in categories]
            self.warnings += _use_categories(self.coco, self.categories, split.annotations)
        self.image_ids = [image["id"] for image in self.coco["images"]]
        self.files = [
            (image_path(self.split.images, image["file_name"]), (image["width"], image["height"])) for image in self.coco["images"]
        ]
        self.epoch = 0
        self._pack()
        self.rles: list[list[dict[str, Any]]] | None = self._pack_masks() if masks else None
        self.decode_masks: Callable[[Path, tuple[int, int], Sequence[Mapping[str, Any]]], np.ndarray] = _decode_masks
        self.target_masks, self.copy_paste = masks, 0.0

    def _pack(self) -> None:
        from torchvision.ops import box_convert  # takes as long to import as torch: not for those who only read annotations

        # Whole tensors instead of a million small objects: reading those copies them into every loading process (reference counts).
        label_of = {category["id"]: label for label, category in enumerate(self.categories)}
        rows = {image_id: row for row, image_id in enumerate(self.image_ids)}
        boxes = [annotation for annotation in self.coco["annotations"] if not annotation["iscrowd"]]
        boxes.sort(key=lambda annotation: rows[annotation["image_id"]])  # stable: an image's boxes stay in the file's order
        per_image = np.bincount([rows[each["image_id"]] for each in boxes], minlength=len(rows))
        self._starts = np.concatenate([[0], np.cumsum(per_image)])
        self._labels = torch.tensor([label_of[each["category_id"]] for each in boxes], dtype=torch.int64)
        self._area = torch.tensor([each["area"] for each in boxes], dtype=torch.float32)
        xywh = torch.tensor([each["bbox"] for each in boxes], dtype=torch.float64).view(-1, 4)
        self._xyxy = box_convert(xywh, "xywh", "xyxy").float()

    def selected(self, rows: Iterable[int], transforms: Callable | None = None) -> "CocoImages":
        """Return a data set of some of the images; it has no warnings of its own.

        Args:
            rows: Positions of the images.
            transforms: Their transforms; None: as before.
        """
        rows = sorted(map(int, rows))
        ids = {self.image_ids[row] for row in rows}
        annotations = [each for each in self.coco["annotations"] if each["image_id"] in ids]
        coco = {**self.coco, "images": [self.coco["images"][row] for row in rows], "annotations": annotations}
        return self._with(coco, [self.files[row] for row in rows], transforms or self.transforms)

    def joined(self, other: "CocoImages") -> "CocoImages":
        """Return a data set of the images of both, with new ids for those of ``other``, which has the same categories."""
        ids = {each: self.image_ids[-1] + 1 + row for row, each in enumerate(other.image_ids)}
        images = [{**each, "id": ids[each["id"]]} for each in other.coco["images"]]
        boxes = [{**each, "image_id": ids[each["image_id"]]} for each in other.coco["annotations"]]
        annotations = [{**each, "id": number} for number, each in enumerate([*self.coco["annotations"], *boxes], 1)]
        coco = {**self.coco, "images": [*self.coco["images"], *images], "annotations": annotations}
        return self._with(coco, self.files + other.files, self.transforms)

    def _with(self, coco: dict[str, list[dict]], files: list, transforms: Callable) -> "CocoImages":
        changed = copy.copy(self)
        changed.coco, changed.files, changed.transforms, changed.warnings = coco, files, transforms, []
        changed.image_ids = [image["id"] for image in coco["images"]]
        changed._pack()
        changed.rles = None if self.rles is None else changed._pack_masks()
        return changed

    def _pack_masks(self) -> list[list[dict[str, Any]]]:
        rles: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in self.image_ids}
        sizes = {image["id"]: (image["height"], image["width"]) for image in self.coco["images"]}
        there: dict[int, list[bool]] = {image_id: [] for image_id in self.image_ids}
        for each in self.coco["annotations"]:
            if not each["iscrowd"]:
                image_id = each["image_id"]
                rles[image_id].append(each["segmentation"] or no_mask(sizes[image_id]))
                there[image_id].append(each["segmentation"] is not None)
        self._has_mask = torch.tensor([one for of_image in there.values() for one in of_image], dtype=torch.bool)
        self._with_mask = [row for row, of_image in enumerate(there.values()) if any(of_image)]  # the images to cut objects out of
        return list(rles.values())

    @property
    def has_masks(self) -> bool:
        """Whether a box of the set has a mask; there are none if the set is made without ``masks``."""
        return self.rles is not None and bool(self._has_mask.any())

    def __len__(self) -> int:
        return len(self.image_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draw random transforms, and the order of a training loader, for ``epoch`` (from 0) from now on."""
        self.epoch = epoch

    def __getitem__(self, index: int | tuple) -> tuple:
        from torchvision.ops import box_convert

        epoch, index, *size = index if isinstance(index, tuple) else (self.epoch, index)
        scene = self._scene(index)
        if self.copy_paste:
            scene = self._with_pasted(scene, epoch, index)
        orig_size = scene.pixels.shape[-2:]
        masks = scene.masks.view(torch.uint8) if self.target_masks and scene.masks is not None else None
        image, boxes, masks = self._transformed(scene.pixels, scene.xyxy, epoch, index, masks)
        image, xyxy = image.as_subclass(torch.Tensor), boxes.as_subclass(torch.Tensor)
        keep = (xyxy[:, 2:] > xyxy[:, :2]).all(1)  # a crop leaves boxes without area
        height, width = image.shape[-2:]
        target = {
            "boxes": box_convert(xyxy[keep], "xyxy", "cxcywh") / torch.tensor([width, height, width, height]),
            "labels": scene.labels[keep],
            "area": scene.area[keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "image_id": torch.tensor([self.image_ids[index]]),
            "orig_size": torch.tensor(orig_size),
            "size": torch.tensor([height, width]),
        }
        if masks is not None:
            target |= {"masks": masks.as_subclass(torch.Tensor)[keep].bool(), "has_mask": scene.has_mask[keep]}
        return image, target, *size

    def _scene(self, index: int) -> Scene:
        """Return an image as it is in the file, with its objects."""
        pixels, mine = self.images(*self.files[index]), slice(self._starts[index], self._starts[index + 1])
        xyxy = _clip(self._xyxy[mine], (pixels.shape[-2], pixels.shape[-1]))
        if self.rles is None:
            return Scene(pixels, xyxy, self._labels[mine], self._area[mine])
        masks = torch.from_numpy(self.decode_masks(*self.files[index], self.rles[index]))
        return Scene(pixels, xyxy, self._labels[mine], self._area[mine], masks, self._has_mask[mine])

    def _with_pasted(self, scene: Scene, epoch: int, index: int) -> Scene:
        from raydetr.data.copy_paste import paste  # torchvision, see _pack
        from raydetr.data.transforms import drawn_from

        with drawn_from(self.seed, epoch, index, 1):  # apart from the transforms, which are those of size_of
            if torch.rand(()) >= self.copy_paste:
                return scene
            others = [row for row in self._with_mask if row != index]
            return paste(scene, self._scene(others[int(torch.randint(len(others), ()))])) if others else scene

    def _transformed(
        self, pixels: torch.Tensor, xyxy: torch.Tensor, epoch: int, index: int, masks: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        from torchvision import tv_tensors

        from raydetr.data.transforms import drawn_from

        size = (pixels.shape[-2], pixels.shape[-1])
        with drawn_from(self.seed, epoch, index):
            boxes = tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=size)  # pyright: ignore[reportCallIssue]  # checked as a Tensor
            if masks is None:
                return (*self.transforms(tv_tensors.Image(pixels), boxes), None)
            return self.transforms(tv_tensors.Image(pixels), boxes, tv_tensors.Mask(masks))

    def size_of(self, epoch: int, index: int) -> tuple[int, int]:
        """Return the height and width of a transformed image, in pixels, without reading its file.

        Args:
            epoch: Number of the epoch, from which the random transforms follow.
            index: Position of the image in the data set.
        """
        width, height = self.files[index][1]
        pixels = torch.empty(3, height, width, dtype=torch.uint8, device="meta")
        image, *_ = self._transformed(pixels, torch.zeros(0, 4), epoch, index)
        return image.shape[-2], image.shape[-1]


def _decode_masks(_path: Path, size: tuple[int, int], rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    width, height = size
    return decode_masks(rles, (height, width))


def _clip(xyxy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = size
    return xyxy.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def _use_categories(coco: dict[str, list[dict]], categories: list[dict], path: str | Path) -> list[str]:
    """Give the categories of ``coco`` the ids that the same ones have in ``categories``; return warnings.

    Raises:
        UserError: If an annotation's category is not among them, or may be several of them.
    """
    positions = match_categories(coco["categories"], categories)
    new_ids = {
        each["id"]: None if position is None else categories[position]["id"]
        for each, position in zip(coco["categories"], positions, strict=True)
    }
    names = {each["id"]: each["name"] for each in coco["categories"]}
    for annotation in coco["annotations"]:
        old = annotation["category_id"]
        if new_ids[old] is None:
            known = [each["name"] for each in categories]
            alike = [short(name) for name in known if fold_name(name) == fold_name(names[old])]
            why = f"cannot be told from {shortlist(alike)}" if alike else f"is not among those of the training: {short(known)}"
            raise UserError(f"{path}: category {short(names[old])} (id {old}, image id {annotation['image_id']}) {why}")
        annotation["category_id"] = new_ids[old]
    coco["categories"] = [dict(each) for each in categories]
    moved = sum(new is not None and new != old for old, new in new_ids.items())
    return [f"{path}: {moved} categories have other ids than in training; they were found by name"] if moved else []
