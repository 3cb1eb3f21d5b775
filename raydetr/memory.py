"""How this process uses memory: when Python collects garbage, and when freed memory is kept or given back."""

import contextlib
import ctypes
import gc
import platform
import sys
import traceback
from collections.abc import Iterator

# Parameters of glibc's mallopt (malloc.h). GIVE_BACK holds what glibc's own adjustment to a network's feature maps ends with.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
GIVE_BACK = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Turn Python's garbage collection off within the ``with`` block, for code that creates many objects and no garbage."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextlib.contextmanager
def kept_memory(device_type: str) -> Iterator[None]:
    """Keep freed memory for the next use within the ``with`` block, and give it back at its end.

    On a CPU this is what PyTorch's allocator does on a GPU anyway: otherwise every large feature map is allocated by the system, which
    has to zero its pages first, a hundred thousand of them in a step of ``detr_resnet50``. It has no effect without glibc. On a GPU
    other processes can use the memory afterwards, also if the block ended with an exception, such as running out of memory.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.
    """
    try:
        if device_type == "cpu" and platform.libc_ver()[0] == "glibc":
            with _kept_by_glibc():
                yield
        else:
            yield
    except BaseException as error:
        if device_type == "cuda":
            clear_frames(error)
        raise
    finally:
        if device_type == "cuda" and "torch" in sys.modules:
            release_gpu_memory()


def release_gpu_memory() -> None:
    """Give the GPU memory back that nothing refers to any more, so that other processes can use it."""
    gc.collect()  # a model and its optimizer refer to each other
    sys.modules["torch"].cuda.empty_cache()


def clear_frames(error: BaseException | None) -> None:
    """Clear the local variables of the functions that failed: they hold tensors for as long as somebody has the exception."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _kept_by_glibc() -> Iterator[None]:
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
