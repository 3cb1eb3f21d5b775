"""Find out whether the batches of loading processes fit into shared memory, and provide another way for those that do not.

The loading processes of a torch DataLoader pass tensors on through ``/dev/shm``. Containers often have 64 MB of it (the default of Docker
and Kubernetes). A batch that does not fit is lost without an error, and the training waits for it forever. NumPy arrays, in contrast, are
sent through the pipe between the processes: this takes one more copy, but has no limit.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARED_MEMORY = Path("/dev/shm")  # Linux; where there is none, shared memory has no limit of its own
SHARE = 0.5  # of what is free: other workers, other trials and Ray's object store use it as well


def free_shared_memory() -> int | None:
    """Return the free bytes of ``/dev/shm``, or None if there is no such file system."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def fits_shared_memory(needed: int) -> bool:
    """Return whether batches can be passed on through shared memory.

    Args:
        needed: Bytes of all batches that are in it at the same time.

    Returns:
        Whether they take at most ``SHARE`` of the free shared memory; True where shared memory has no limit of its own.
    """
    free = free_shared_memory()
    return free is None or needed <= SHARE * free


def as_arrays(batch: Any) -> Any:
    """Return a batch with NumPy arrays in place of its CPU tensors. The arrays share the tensors' memory.

    Args:
        batch: Tensors and other values, nested in tuples, lists and dicts.
    """
    return _converted(batch, torch.Tensor, torch.Tensor.numpy)


def as_tensors(batch: Any) -> Any:
    """Return a batch with tensors in place of its NumPy arrays. The tensors share the arrays' memory.

    Args:
        batch: A batch from :func:`as_arrays`.
    """
    return _converted(batch, np.ndarray, torch.from_numpy)


def _converted(value: Any, kind: type, convert: Any) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {key: _converted(each, kind, convert) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_converted(each, kind, convert) for each in value)
    return value
