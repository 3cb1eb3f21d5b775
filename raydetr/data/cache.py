"""Decoded pictures kept in memory: to decode a photograph of two megapixels takes longer than all else that happens to it."""

import mmap
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from raydetr.config import Data
from raydetr.data.images import read_image

MACHINE_SHARE = 0.25  # of its memory, where data.cache_gb does not say how much
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of the container


class DecodedImages:
    """Reads pictures as :func:`raydetr.data.images.read_image` does, but decodes each only once.

    ``files`` are paths with the annotation's (width, height), the most important first: as many as ``limit`` bytes hold are kept,
    the others decoded at every call. Memory is taken as it fills, and processes forked from this one (those of a DataLoader) fill
    and read the same. Pickled, by ``ray.put`` for example, the pixels are one array, which Ray's workers on a machine share.
    """

    def __init__(self, files: Sequence[tuple[Path, tuple[int, int]]], limit: int):
        sizes = np.array([3 * width * height for _, (width, height) in files], dtype=np.int64)
        ends = np.cumsum(sizes)
        kept = int(np.searchsorted(ends, limit, side="right"))
        self.files = list(files[:kept])
        self.places = {str(path): (number, int(ends[number] - sizes[number])) for number, (path, _) in enumerate(self.files)}
        # Anonymous shared memory: unlike /dev/shm it has no limit of its own, which in containers is a few MB.
        self.pixels = np.frombuffer(mmap.mmap(-1, max(1, int(ends[kept - 1]) if kept else 0)), np.uint8)
        self.filled = np.frombuffer(mmap.mmap(-1, max(1, kept)), np.bool_)[:kept]

    def __call__(self, path: Path, size: tuple[int, int]) -> torch.Tensor:
        """The picture as RGB, uint8 [3, height, width] (strides of channels-last memory); not to be written to."""
        number, start = self.places.get(str(path), (None, 0))
        if number is None:
            return read_image(path, size)
        width, height = size
        kept = self.pixels[start : start + 3 * width * height].reshape(height, width, 3)
        if not self.filled[number]:
            picture = read_image(path, size)
            if kept.flags.writeable:
                kept[:] = picture.permute(1, 2, 0).numpy()
                self.filled[number] = True
            return picture
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of Ray's arrays, which nobody may write to
            return torch.from_numpy(kept).permute(2, 0, 1)

    def __getstate__(self) -> dict:
        if self.filled.all():
            return self.__dict__
        # A process that was not forked has no part in memory that is still being filled: it decodes for itself.
        return {"files": [], "places": {}, "pixels": self.pixels[:0], "filled": self.filled[:0]}

    def fill(self) -> None:
        """Decode all that is kept, on all cores. Raises UserError for a picture that cannot be read."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(lambda file: self(*file), self.files):
                pass


def cache_limit(data: Data) -> int:
    """Bytes that decoded pictures may take on this machine: ``data.cache_gb``, else a quarter of its memory, or its container's."""
    if data.cache_gb is not None:
        return int(data.cache_gb * 1e9)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else "max"
    return int(MACHINE_SHARE * min(memory, int(limit) if limit.isdigit() else memory))
