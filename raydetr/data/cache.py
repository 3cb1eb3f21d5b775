"""Keep decoded images and masks in memory: decoding an image of two megapixels takes longer than all its transforms."""

import mmap
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydetr.config import Data
from raydetr.data.images import read_image
from raydetr.data.masks import decode_masks

MACHINE_SHARE = 0.25  # of its memory, where data.cache_gb does not say how much
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container


class DecodedImages:
    """Decode images like :func:`raydetr.data.images.read_image`, but each only once.

    As many images as ``limit`` bytes hold are kept, in the order of ``files``; the others are decoded at every call. Memory is used as it
    fills. Processes forked from this one (those of a DataLoader) fill and read the same memory. Pickled when full, for example by
    ``ray.put``, the pixels are one array, which Ray's workers on a node share.

    Args:
        files: (path, annotated (width, height)) of each image, the most important first.
        limit: Bytes of pixels to keep.
        read: What decodes one image, called with a path and its annotated size.
        rles: The masks of each file's objects as RLEs, which are kept with the image, a bit for each pixel; None without masks.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, tuple[int, int]]],
        limit: int,
        read: Callable[[Path, tuple[int, int]], torch.Tensor] = read_image,
        rles: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ):
        self.read = read
        rles = [[] for _ in files] if rles is None else rles
        masks = [_packed_bytes(of_file, size) for of_file, (_, size) in zip(rles, files, strict=True)]
        sizes = np.array([3 * width * height for _, (width, height) in files], dtype=np.int64) + np.array(masks, dtype=np.int64)
        ends = np.cumsum(sizes)
        kept = int(np.searchsorted(ends, limit, side="right"))
        self.files, self.rles = list(files[:kept]), list(rles[:kept])
        self.slots = {str(path): (number, int(ends[number] - sizes[number])) for number, (path, _) in enumerate(self.files)}
        # Anonymous shared memory: unlike /dev/shm it has no limit of its own, which in containers is a few MB.
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, int(ends[kept - 1]) if kept else 0)), np.uint8)
        self.filled = np.frombuffer(mmap.mmap(-1, max(1, kept)), np.bool_)[:kept]

    def __call__(self, path: Path, size: tuple[int, int]) -> torch.Tensor:
        """Return an image as RGB, uint8 [3, height, width] with the strides of channels-last memory; do not write to it."""
        number, start = self.slots.get(str(path), (None, 0))
        if number is None:
            return self.read(path, size)
        width, height = size
        kept = self.pixels[start : start + 3 * width * height].reshape(height, width, 3)
        if not self.filled[number]:
            image = self.read(path, size)
            if kept.flags.writeable:
                kept[:] = image.permute(1, 2, 0).numpy()
                self._packed_masks(number, start)[:] = np.packbits(decode_masks(self.rles[number], (height, width)))
                self.filled[number] = True
            return image
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # Ray's arrays are read-only
            return torch.from_numpy(kept).permute(2, 0, 1)

    def masks(self, path: Path, size: tuple[int, int], rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Return the masks of an image's objects, bool [n, height, width]: those that are kept with the image, or else decoded.

        Args:
            path: The image file.
            size: Its annotated width and height.
            rles: The masks.
        """
        width, height = size
        number, start = self.slots.get(str(path), (None, 0))
        if number is None or not self.filled[number] or self.rles[number] != rles:
            return decode_masks(rles, (height, width))
        bits = np.unpackbits(self._packed_masks(number, start), count=len(rles) * height * width)
        return bits.view(np.bool_).reshape(len(rles), height, width)

    def _packed_masks(self, number: int, start: int) -> np.ndarray:
        _, (width, height) = self.files[number]
        start += 3 * width * height  # behind the pixels
        return self.pixels[start : start + _packed_bytes(self.rles[number], (width, height))]

    def __getstate__(self) -> dict:
        if self.filled.all():
            return self.__dict__
        # A process that was not forked does not share memory that is still being filled: it decodes for itself.
        return {"read": self.read, "files": [], "rles": [], "slots": {}, "pixels": self.pixels[:0], "filled": self.filled[:0]}

    def fill(self) -> None:
        """Decode all images that are kept, on all cores.

        Raises:
            UserError: If an image cannot be read.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda file: self(*file), self.files):
                pass


def _packed_bytes(rles: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> int:
    return -(-len(rles) * size[0] * size[1] // 8)


def cache_limit(data: Data) -> int:
    """Return how many bytes of decoded images this machine may keep.

    It is ``data.cache_gb``, or else a quarter of the memory of the machine or of its container.

    Args:
        data: The settings ``data.*``.
    """
    if data.cache_gb is not None:
        return int(data.cache_gb * 1e9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return int(MACHINE_SHARE * min(memory, int(limit) if limit.isdigit() else memory))
