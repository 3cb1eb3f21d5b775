"""From an image file to pixels: every kind of file becomes RGB, and what cannot be read is named.

EXIF orientation. Boxes are given in the pixels of the picture that the annotator saw, and the annotation's width and height
say which that was. A picture is turned as its EXIF tag demands where that, and not the stored picture, has the annotation's
size; else it stays as it is stored, which is also what the official DETR sees. Where nothing is annotated (prediction), it is
turned upright.
"""

import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from raydetr.data.values import short
from raydetr.errors import UserError

# What Pillow raises on broken files, beside OSError.
_BROKEN = (SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


class Header(NamedTuple):
    """What a file says of its picture before it is decoded."""

    width: int  # pixels, as stored
    height: int
    orientation: int  # EXIF: 1 is upright, 5 to 8 swap width and height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height once turned as the EXIF tag demands."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def image_path(folder: Path, file_name: object) -> Path:
    """``folder / file_name`` for a file name out of an annotation file; raises UserError where it would leave the folder.

    Only the name is judged (no "..", no absolute path, on any system); links inside the folder are the user's own.
    """
    if not isinstance(file_name, str) or not PurePosixPath(file_name).name or any(ord(letter) < 32 for letter in file_name):
        raise UserError(f"file name {short(file_name)} is no file name")
    as_windows = PureWindowsPath(file_name)  # splits at both / and \, and knows drives
    if as_windows.anchor or ".." in as_windows.parts:
        raise UserError(f"file name {short(file_name)} leads out of the image folder; give it relative to that folder")
    return Path(folder) / file_name


def read_header(path: str | Path) -> Header:
    """Size and orientation of an image file, without decoding it; raises UserError naming the file."""
    try:
        with Image.open(path) as image:
            return _header(image)
    except (OSError, *_BROKEN) as error:
        raise _unreadable(path, error) from None


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The picture as RGB: uint8 [3, height, width] (strides of channels-last memory).

    ``size`` is the annotation's (width, height); without one the picture is turned upright. Grey and palette pictures become
    RGB, CMYK is converted, 16 bits become the upper 8, of several frames the first is taken, and an alpha channel is dropped.
    Raises UserError, naming the file, where it is missing, truncated, broken or not of that size.
    """
    try:
        with Image.open(path) as image:
            header = _header(image)
            if image.format == "EPS":  # decoding it would run a program on it
                raise UserError(f"{path}: EPS is no photograph; convert it to JPEG or PNG")
            if size is not None and size not in (header[:2], header.upright):
                raise UserError(
                    f"{path}: the picture is {header.width} x {header.height} pixels, its annotation says {size[0]} x {size[1]}; "
                    "correct the annotation or put the annotated picture there"
                )
            image.load()
            if header.orientation != 1 and (size is None or size != header[:2]):
                image = ImageOps.exif_transpose(image)
            pixels = _rgb(image, path)
    except (OSError, *_BROKEN) as error:
        raise _unreadable(path, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _header(image: Image.Image) -> Header:
    orientation = 1
    # TIFF and AVIF come turned already. Asking a PNG whose head holds no tag would decode it.
    if "exif" in image.info and image.format not in ("TIFF", "AVIF"):
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, *_BROKEN):
            orientation = 1  # a broken tag says nothing; the pixels may be whole
    return Header(*image.size, orientation if orientation in range(1, 9) else 1)


def _rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """The pixels as uint8 [height, width, 3]."""
    if image.mode == "RGB":
        return np.array(image)
    if image.mode == "F":
        raise UserError(f"{path}: floating-point pixels have no known range; convert the picture to 8 bits")
    if image.mode.startswith("I"):
        grey = np.array(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise UserError(f"{path}: pixel values outside 0 to 65535; convert the picture to 8 bits")
        return np.repeat((grey.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct way
    return np.array(image.convert("RGB"))


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, OSError) and error.strerror:  # the system's: no such file, permission denied, ...
        return UserError(f"{path}: {error.strerror}")
    if isinstance(error, Image.UnidentifiedImageError):
        return UserError(f"{path}: not an image file that can be read")
    return UserError(f"{path}: broken or truncated image ({' '.join(str(error).split()) or type(error).__name__})")
