"""What the process asks of Python's and the C library's memory, where they take time to tidy up after every step."""

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# glibc's mallopt: its parameters (malloc.h), what they are set to, and what glibc's own adjustment to a network's maps ends with.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
GIVE_BACK = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Within it Python does not look for garbage, which it does again and again as objects become many; among these there is none."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextlib.contextmanager
def kept_memory(device_type: str) -> Iterator[None]:
    """Within it, on a ``"cpu"``, the C library keeps freed memory for the next use, as PyTorch does on a GPU; afterwards it is given back.

    Else every large feature map comes from the system anew, as pages to be zeroed first: a hundred thousand of them in a step of
    ``detr_resnet50``. Without glibc nothing changes.
    """
    if device_type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    _set(libc, KEEP)
    try:
        yield
    finally:
        _set(libc, GIVE_BACK)
        libc.malloc_trim(ctypes.c_size_t(0))


def _set(libc: ctypes.CDLL, parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        libc.mallopt(parameter, value)
