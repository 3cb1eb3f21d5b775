"""The official DETR's transforms of an image, its boxes and its masks, on tensors.

All of them take and return ``image, boxes``: a ``tv_tensors.Image`` uint8 [3, height, width] and ``tv_tensors.BoundingBoxes`` XYXY in
pixels [n, 4]; after these ``masks``, a ``tv_tensors.Mask`` uint8 [n, height, width], if there are any. Images stay uint8 until they have
their final size. All random numbers are drawn from torch's CPU generator, which :func:`drawn_from` seeds for one image.
"""

import contextlib
import functools
import hashlib
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from raydetr.config import Data

LEAST_SIDE = 32  # pixels: the stride of the backbones. A shorter side has no cell of the feature map of its own
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per RGB channel of 0 to 1


def train_transforms(data: Data, normalized: bool = True) -> v2.Transform:
    """Return the training transforms: with probability ``data.crop`` a resize and a random crop, then a random resize and a random flip.

    With ``data.zoom_out``, what is cropped or not is resized and put on a larger canvas before; with ``data.color`` the colors are
    distorted at the end. Neither draws a random number where it is off.

    The distribution is that of ``make_coco_transforms("train")`` in the official datasets/coco.py. The flip comes last instead of first: it
    commutes with the others, and the image is smaller then. A crop can leave boxes without area, [x, y, x, y], which the caller must drop.

    Args:
        data: The ``data`` section of the settings.
        normalized: Whether images become normalized float32. Otherwise they stay uint8, for :func:`normalize` on a GPU: a batch then has a
            quarter of the bytes to copy.
    """
    # The official code has no limit here: a strip of an image, 1 x 5000 pixels, would become gigabytes.
    crop = [ResizeShortSide(data.crop_resize, 10 * data.max_size), RandomSizeCrop(data.crop_min, data.crop_max)]
    resize = ResizeShortSide(data.train_sizes, data.max_size)
    gray = {tv_tensors.Image: [round(each) for each in _MEAN], "others": 0}  # a mask is empty there
    zoom_out = v2.RandomZoomOut(fill=gray, side_range=(1.0, 2.0), p=1.0)
    return v2.Compose(
        [
            v2.RandomApply(crop, p=data.crop),
            *([v2.RandomApply([resize, zoom_out], p=data.zoom_out)] if data.zoom_out else []),
            resize,
            v2.RandomHorizontalFlip(data.flip),
            *([v2.RandomApply([Distortion()], p=data.color)] if data.color else []),
            *_last(normalized),
        ]
    )


def val_transforms(data: Data, normalized: bool = True) -> v2.Transform:
    """Return the transforms of evaluation and prediction: resize to ``data.val_size`` and normalize. Nothing is random.

    Args:
        data: The ``data`` section of the settings.
        normalized: Whether images become normalized float32, as in :func:`train_transforms`.
    """
    return v2.Compose([ResizeShortSide([data.val_size], data.max_size), *_last(normalized)])


# For pixel values from 0 to 255, because dividing by 255 would be one more pass over the image.
_MEAN, _STD = [255 * each for each in MEAN], [255 * each for each in STD]


def _last(normalized: bool) -> list[v2.Transform]:
    if normalized:
        return [v2.Lambda(_float_planes, tv_tensors.Image), v2.Normalize(_MEAN, _STD, inplace=True)]
    return [v2.Lambda(_byte_planes, tv_tensors.Image)]


def _float_planes(image: tv_tensors.Image) -> tv_tensors.Image:
    # Decoding and resizing work on interleaved pixels, the network on planes: converted in the pass that makes them float.
    planes = image.to(torch.float32, memory_format=torch.contiguous_format)
    return _image_like(planes, image)


def _byte_planes(image: tv_tensors.Image) -> tv_tensors.Image:
    return _image_like(image.contiguous(), image)


def _image_like(pixels: torch.Tensor, image: tv_tensors.Image) -> tv_tensors.Image:
    return tv_tensors.wrap(pixels, like=image)  # pyright: ignore[reportCallIssue]  # its decorator hides its parameters


@functools.lru_cache(8)
def _constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached for each device, because the host waits for every copy.
    with torch.inference_mode(False):
        mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (_MEAN, _STD))
    return mean, std


def normalize(images: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Normalize a uint8 batch on its device. Padded pixels become 0, as if each image had been normalized before padding.

    Args:
        images: Pixel values from 0 to 255, uint8 [B, 3, H, W].
        mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

    Returns:
        Normalized images, float32 [B, 3, H, W].
    """
    mean, std = _constants(images.device)
    images = images.float().sub_(mean).div_(std)
    return images if mask is None else images.masked_fill_(mask[:, None], 0)


def resized_size(height: int, width: int, short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """Return the height and width of an image after resizing its shorter side to a length.

    If the longer side would exceed ``max_size``, the image becomes smaller. The rounding is that of ``get_size_with_aspect_ratio`` in the
    official datasets/transforms.py, so that sizes are the official ones. Unlike there, an elongated image whose shorter side would become
    shorter than ``LEAST_SIDE`` is stretched to that side, because the networks do not accept images of a few pixels.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        short_side: New length of the shorter side in pixels.
        max_size: Largest length of the longer side in pixels; None for no limit.
    """
    if max_size is not None and max(height, width) / min(height, width) * short_side > max_size:
        least, short_side = min(short_side, LEAST_SIDE), round(max_size * min(height, width) / max(height, width))
        if short_side < least:
            return (least, max_size) if height < width else (max_size, least)
    if min(height, width) == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


class ResizeShortSide(v2.Transform):
    """Resize an image and its boxes to a random length of the shorter side.

    Args:
        sizes: Lengths of the shorter side in pixels, of which one is drawn.
        max_size: Largest length of the longer side in pixels; None for no limit.
    """

    def __init__(self, sizes: list[int], max_size: int | None = None):
        super().__init__()
        self.sizes, self.max_size = sizes, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size to which the image and its boxes are resized.

        Args:
            flat_inputs: The image and its boxes.

        Returns:
            ``size``, height and width in pixels.
        """
        short_side = self.sizes[_draw(0, len(self.sizes) - 1)] if len(self.sizes) > 1 else self.sizes[0]
        height, width = functional.get_size(flat_inputs[0])
        return {"size": resized_size(height, width, short_side, self.max_size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image by bilinear interpolation with antialiasing, as Pillow and the official code do, or scale boxes. Masks
        take the nearest pixel.

        Args:
            inpt: The image or the boxes.
            params: The result of :meth:`make_params`.
        """
        if isinstance(inpt, tv_tensors.Mask):
            # torchvision and the official code take the pixel at the corner, which shifts a mask against its box by up to a pixel.
            pixels = functional.resize_image(inpt, list(params["size"]), InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(pixels, like=inpt)  # pyright: ignore[reportCallIssue]  # its decorator hides its parameters
        return functional.resize(inpt, list(params["size"]), antialias=True)


class RandomSizeCrop(v2.Transform):
    """Crop an image and its boxes to a random width and height, at a random position.

    A side that is shorter than ``min_size`` is kept whole. Boxes are clipped to the crop; those outside end up without area.

    Args:
        min_size: Smallest width and height in pixels.
        max_size: Largest width and height in pixels, inclusive.
    """

    def __init__(self, min_size: int, max_size: int):
        super().__init__()
        self.min_size, self.max_size = min_size, max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop of the image and its boxes.

        Args:
            flat_inputs: The image and its boxes.

        Returns:
            ``top``, ``left``, ``height`` and ``width`` in pixels.
        """
        height, width = functional.get_size(flat_inputs[0])
        crop_width = _draw(min(self.min_size, width), min(width, self.max_size))
        crop_height = _draw(min(self.min_size, height), min(height, self.max_size))
        top, left = _draw(0, height - crop_height), _draw(0, width - crop_width)
        return {"top": top, "left": left, "height": crop_height, "width": crop_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, or clip boxes to the crop.

        Args:
            inpt: The image or the boxes.
            params: The result of :meth:`make_params`.
        """
        return functional.crop(inpt, **params)


class Distortion(v2.RandomPhotometricDistort):
    """Torchvision's photometric distortion, that of SSD. An image without pixels, of which only the size is wanted, stays as it is."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Distort the image; boxes stay as they are."""
        return inpt if inpt.is_meta else super().transform(inpt, params)


def _draw(low: int, high: int) -> int:
    # A whole number from low to high, both inclusive.
    return int(torch.randint(low, high + 1, ()))


@contextlib.contextmanager
def drawn_from(*numbers: int):
    """Seed torch's CPU generator within the ``with`` block, and restore its state afterwards.

    Args:
        *numbers: What the seed is derived from; the same numbers give the same random draws.
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator only: torch.manual_seed would set those of the GPUs as well, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        yield
