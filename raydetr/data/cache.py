"""Keep decoded images in memory: decoding an image of two megapixels takes longer than all its transforms."""

import mmap
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from raydetr.config import Data
from raydetr.data.images import read_image

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
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, tuple[int, int]]],
        limit: int,
        read: Callable[[Path, tuple[int, int]], torch.Tensor] = read_image,
    ):
        self.read = read
        sizes = np.array([3 * width * height for _, (width, height) in files], dtype=np.int64)
        ends = np.cumsum(sizes)
        kept = int(np.searchsorted(ends, limit, side="right"))
        self.files = list(files[:kept])
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
                self.filled[number] = True
            return image
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # Ray's arrays are read-only
            return torch.from_numpy(kept).permute(2, 0, 1)

    def __getstate__(self) -> dict:
        if self.filled.all():
            return self.__dict__
        # A process that was not forked does not share memory that is still being filled: it decodes for itself.
        return {"read": self.read, "files": [], "slots": {}, "pixels": self.pixels[:0], "filled": self.filled[:0]}

    def fill(self) -> None:
        """Decode all images that are kept, on all cores.

        Raises:
            UserError: If an image cannot be read.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda file: self(*file), self.files):
                pass


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
