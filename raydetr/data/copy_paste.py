"""Copy-paste augmentation (Ghiasi et al. 2021, arXiv:2012.07177): objects of one image are pasted into another, cut out along their masks.

Both images stay in the size of their files: the resizing, cropping and flipping of training come after. Boxes stay right: what a pasted
object would hide too much of, or hide without a mask that tells what is left of it, is not pasted over.
"""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from raydetr.data.scene import Scene

CHOSEN = 0.5  # the probability that an object of the other image is pasted; one is in any case
SCALES = (0.5, 1.5)  # of a pasted object: the bounds of its size relative to the image, as a multiple of that in its own image
VISIBLE = 0.5  # share of its pixels that every object keeps
TRIES = 10  # random positions of an object, after which it is left out


def paste(scene: Scene, source: Scene) -> Scene:
    """Paste randomly chosen objects of one image into another, at random sizes and positions.

    Random numbers are drawn from torch's CPU generator.

    Args:
        scene: The image to paste into, with masks.
        source: The image to cut objects out of; at least one of them has a mask.

    Returns:
        The new image. Its first objects are those of ``scene``, whose masks and boxes end where a pasted object hides them; the pasted
        ones follow.
    """
    assert scene.masks is not None
    assert source.masks is not None
    cut_out = [number for number in range(len(source.labels)) if source.has_mask[number]]
    chosen = [number for number in cut_out if torch.rand(()) < CHOSEN]
    canvas = _Canvas(scene, scene.masks)
    for number in chosen or [cut_out[int(torch.randint(len(cut_out), ()))]]:
        canvas.add(source.pixels, source.masks[number], int(source.labels[number]))
    return canvas.scene()


class _Canvas:
    """An image that objects are pasted into."""

    def __init__(self, scene: Scene, masks: Tensor):
        self.pixels, self.masks = scene.pixels.clone(), masks.clone()
        self.xyxy, self.labels, self.area, self.has_mask = scene.xyxy.clone(), scene.labels, scene.area.clone(), scene.has_mask
        self.visible = self.masks.sum((1, 2))  # pixels of each object
        self.least = self.visible * VISIBLE

    def scene(self) -> Scene:
        return Scene(self.pixels, self.xyxy, self.labels, self.area, self.masks, self.has_mask)

    def add(self, pixels: Tensor, mask: Tensor, label: int) -> None:
        """Paste an object at the first of several random positions where it hides no other one too much."""
        patch, shape = _resized(*_cropped(pixels, mask), *self._size(pixels, mask))
        height, width = shape.shape
        for _ in range(TRIES if shape.any() else 0):
            top, left = (int(torch.randint(side - own + 1, ())) for side, own in zip(self.pixels.shape[1:], (height, width), strict=True))
            if self._fits(shape, top, left):
                self._put(patch, shape, top, left, label)
                return

    def _size(self, pixels: Tensor, mask: Tensor) -> tuple[int, int]:
        """Draw the height and width of an object."""
        (top, bottom), (left, right) = _extent(mask)
        low, high = SCALES
        relative = min(self.pixels.shape[1:]) / min(pixels.shape[1:])
        scale = relative * (low + (high - low) * float(torch.rand(())))
        scale = min(scale, self.pixels.shape[1] / (bottom - top), self.pixels.shape[2] / (right - left))
        height, width = (max(1, int(scale * side)) for side in (bottom - top, right - left))
        return height, width

    def _hidden(self, shape: Tensor, top: int, left: int) -> Tensor:
        height, width = shape.shape
        return (self.masks[:, top : top + height, left : left + width] & shape).sum((1, 2))

    def _fits(self, shape: Tensor, top: int, left: int) -> bool:
        x1, y1, x2, y2 = self.xyxy.T
        apart = (x2 <= left) | (y2 <= top) | (x1 >= left + shape.shape[1]) | (y1 >= top + shape.shape[0])
        enough = self.visible - self._hidden(shape, top, left) >= self.least
        return bool(torch.where(self.has_mask, enough, apart).all())

    def _put(self, patch: Tensor, shape: Tensor, top: int, left: int, label: int) -> None:
        height, width = shape.shape
        rows, columns = slice(top, top + height), slice(left, left + width)
        hidden = self._hidden(shape, top, left)
        self.pixels[:, rows, columns] = torch.where(shape, patch, self.pixels[:, rows, columns])
        self.masks[:, rows, columns] &= ~shape
        for number in torch.nonzero(hidden).flatten().tolist():
            left_over = self.visible[number] - hidden[number]
            self.area[number] *= left_over / self.visible[number]
            self.visible[number] = left_over
            self.xyxy[number] = _shrunk(self.xyxy[number], self.masks[number])
        mask = torch.zeros_like(self.pixels[0], dtype=torch.bool)
        mask[rows, columns] = shape
        count = mask.sum()
        self.xyxy = torch.cat([self.xyxy, _box(mask)[None]])
        self.masks = torch.cat([self.masks, mask[None]])
        self.labels = torch.cat([self.labels, torch.tensor([label])])
        self.area = torch.cat([self.area, count[None].float()])
        self.has_mask = torch.cat([self.has_mask, torch.tensor([True])])
        self.visible, self.least = torch.cat([self.visible, count[None]]), torch.cat([self.least, count[None] * VISIBLE])


def _extent(mask: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the first row and the one after the last row with a pixel, and the same of the columns."""
    rows, columns = (torch.nonzero(mask.any(dim)).flatten() for dim in (1, 0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _box(mask: Tensor) -> Tensor:
    (top, bottom), (left, right) = _extent(mask)
    return torch.tensor([left, top, right, bottom], dtype=torch.float32)


def _cropped(pixels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    (top, bottom), (left, right) = _extent(mask)
    return pixels[:, top:bottom, left:right], mask[top:bottom, left:right]


def _resized(patch: Tensor, shape: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    patch = functional.resize(patch, [height, width], antialias=True)
    shape = functional.resize_image(shape[None].to(torch.uint8), [height, width], InterpolationMode.NEAREST_EXACT)[0].bool()
    return patch, shape


def _shrunk(xyxy: Tensor, mask: Tensor) -> Tensor:
    """Return a box without what lies outside of the mask; the box itself if it and the mask are apart."""
    seen = _box(mask)
    inside = torch.cat([torch.maximum(xyxy[:2], seen[:2]), torch.minimum(xyxy[2:], seen[2:])])
    return inside if bool((inside[2:] > inside[:2]).all()) else xyxy
