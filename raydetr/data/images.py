"""Decode image files to RGB pixels, and name those that cannot be decoded.

EXIF orientation. Cameras store an image as the sensor captured it, with a tag that says how to turn it upright. Boxes are given in the
pixels of the image that the annotator saw, which today's browsers and annotation tools show upright. If the tag swaps width and height, the
annotated size tells which image it was: the image is turned if the upright image has the annotated size, and the stored one has not. If the
sizes are equal (orientations 2, 3 and 4, and all orientations of square images) or nothing is annotated, the setting ``data.exif`` decides:
``upright`` (the default) or ``stored``, which is what the official DETR reads. An image without annotations (prediction) is turned upright.
"""

import contextlib
import errno
import re
import struct
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from raydetr.errors import UserError
from raydetr.values import short

with contextlib.suppress(ImportError):  # the extra "heic"
    from pillow_heif import register_heif_opener

    register_heif_opener()

# Suffixes, in lower case, of the files in a folder that count as images.
IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"]
    + [".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
MAX_MEGAPIXELS = 178  # Pillow's own limit
# What Pillow raises for broken files, besides OSError.
_BROKEN = (SyntaxError, ValueError, EOFError, LookupError, TypeError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}  # ISO/IEC 23008-12, annex B


class TooLarge(UserError):
    """An image has more pixels than are decoded."""


class Header(NamedTuple):
    """Size and orientation of an image file, read without decoding it."""

    width: int  # pixels, as stored
    height: int
    orientation: int  # EXIF: 1 is upright, 5 to 8 swap width and height

    @property
    def stored(self) -> tuple[int, int]:
        """Width and height of the stored pixels."""
        return self.width, self.height

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after the image was turned as its EXIF tag demands."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    def size(self, exif: str) -> tuple[int, int]:
        """Return the width and height of the image if no annotation states them.

        Args:
            exif: ``"upright"`` or ``"stored"``, the value of ``data.exif``.
        """
        return self.upright if exif == "upright" else self.stored

    def is_turned(self, size: tuple[int, int] | None, exif: str) -> bool:
        """Return whether the image must be turned as its EXIF tag demands to be the one that was annotated.

        Args:
            size: The annotated width and height; None if there is no annotation.
            exif: ``"upright"`` or ``"stored"``, which decides if ``size`` does not.
        """
        if self.orientation == 1:
            return False
        return exif == "upright" if size is None or self.stored == self.upright else size == self.upright


def image_path(folder: Path, file_name: object) -> Path:
    """Return the path of an image whose name was read from an annotation file.

    Only the name is checked (no "..", no absolute path, on any operating system). Links inside the folder are followed.

    Args:
        folder: The image folder.
        file_name: The name relative to the folder, unchecked.

    Returns:
        ``folder / file_name``, which need not exist.

    Raises:
        UserError: The name leads out of the folder, or is not a file name.
    """
    if not isinstance(file_name, str) or not PurePosixPath(file_name).name or any(ord(letter) < 32 for letter in file_name):
        raise UserError(f"file name {short(file_name)} is no file name")
    as_windows = PureWindowsPath(file_name)  # splits at both / and \, and knows drives
    if as_windows.anchor or ".." in as_windows.parts:
        raise UserError(f"file name {short(file_name)} leads out of the image folder; give it relative to that folder")
    return Path(folder) / file_name


def read_header(path: str | Path, max_megapixels: int = MAX_MEGAPIXELS) -> Header:
    """Read the size and orientation of an image file without decoding it.

    Args:
        path: The image file.
        max_megapixels: The largest image to accept, in millions of pixels (``data.max_megapixels``).

    Raises:
        UserError: The file is missing, is not an image, or is too large.
    """
    try:
        with _open(path, max_megapixels) as image:
            return _header(image)
    except (OSError, *_BROKEN) as error:
        raise _unreadable(path, error, max_megapixels) from None


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, exif: str = "upright", max_megapixels: int = MAX_MEGAPIXELS
) -> torch.Tensor:
    """Decode an image file to RGB.

    Grayscale and palette images become RGB, CMYK is converted, of 16 bits the upper 8 are kept, of several frames the first is used, and an
    alpha channel is dropped.

    Args:
        path: The image file.
        size: The annotated (width, height) in pixels; None for an image without annotations.
        exif: ``"upright"`` or ``"stored"``, the value of ``data.exif``, which decides about EXIF orientation if ``size`` does not.
        max_megapixels: The largest image to decode, in millions of pixels (``data.max_megapixels``).

    Returns:
        uint8 [3, height, width], with the strides of channels-last memory.

    Raises:
        UserError: The file is missing, truncated, broken, too large, or not of the annotated size.
    """
    try:
        with _open(path, max_megapixels) as image:
            header = _header(image)
            if image.format == "EPS":  # decoding it would run a program on it
                raise UserError(f"{path}: EPS is no photograph; convert it to JPEG or PNG")
            if size is not None and size not in (header.stored, header.upright):
                raise UserError(
                    f"{path}: the image is {header.width} x {header.height} pixels, its annotation says {size[0]} x {size[1]}; "
                    "correct the annotation or put the annotated image there"
                )
            image.load()
            pixels = _rgb(ImageOps.exif_transpose(image) if header.is_turned(size, exif) else image, path)
    except (OSError, *_BROKEN) as error:
        raise _unreadable(path, error, max_megapixels) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open(path: str | Path, max_megapixels: int) -> Image.Image:
    if Path(path).is_fifo():
        raise OSError(errno.EINVAL, "not a regular file")  # opening it would wait for another program to write
    if max_megapixels > MAX_MEGAPIXELS and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_megapixels * 1_000_000)  # otherwise Pillow's own limit applies first
    image = Image.open(path)
    if image.width * image.height > max_megapixels * 1_000_000:
        image.close()
        raise Image.DecompressionBombError(f"({image.width * image.height} pixels)")
    return image


def _header(image: Image.Image) -> Header:
    orientation = 1
    # Pillow turns TIFF itself. Reading the tags of a PNG that has none in its head would decode it.
    if "exif" in image.info and image.format != "TIFF":
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except (OSError, *_BROKEN):
            orientation = 1  # the pixels may be intact although the tag is broken
    return Header(*image.size, orientation if orientation in range(1, 9) else 1)


def _rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    """Return the pixels as uint8 [height, width, 3]."""
    if image.mode == "RGB":
        return np.array(image)
    if image.mode == "F":
        raise UserError(f"{path}: floating-point pixels have no known range; convert the image to 8 bits")
    if image.mode.startswith("I"):
        gray = np.array(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise UserError(f"{path}: pixel values outside 0 to 65535; convert the image to 8 bits")
        return np.repeat((gray.astype(np.uint16) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colors; Pillow warns of the direct conversion
    return np.array(image.convert("RGB"))


def _unreadable(path: str | Path, error: Exception, max_megapixels: int) -> UserError:
    if isinstance(error, OSError) and error.strerror:  # the system's: no such file, permission denied, ...
        return UserError(f"{path}: {error.strerror}")
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        size = f"{int(pixels[1]) / 1e6:.0f} megapixels" if pixels else "the image"
        return TooLarge(f"{path}: too large: {size}, more than data.max_megapixels ({max_megapixels}); raise it, or scale the image down")
    if isinstance(error, Image.UnidentifiedImageError):
        return UserError(f"{path}: {_kind_of_file(Path(path))}")
    return UserError(f"{path}: broken or truncated image ({' '.join(str(error).split()) or type(error).__name__})")


def _kind_of_file(path: Path) -> str:
    """Describe a file that Pillow does not recognize by its first bytes."""
    with path.open("rb") as file:
        start = file.read(64)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return (
            "broken HEIC image"
            if "HEIF" in Image.OPEN
            else "a HEIC image; install what reads it: pip install 'raydetr[heic]' (or convert it to JPEG)"
        )
    if not start:
        return "not an image file that can be read: it is empty"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "not an image file that can be read: it is a web page, as failed downloads leave them"
    if start.startswith(b"version https://git-lfs"):
        return "not an image file that can be read: it is a Git LFS pointer; fetch the image with git lfs pull"
    return "not an image file that can be read"
