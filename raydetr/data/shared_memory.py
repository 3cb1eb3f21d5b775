"""Whether the batches that loading processes hand over fit into shared memory, and another way for those that do not.

Loading processes of a torch DataLoader hand tensors over in ``/dev/shm``. Containers often have 64 MB of it (the default of Docker and
Kubernetes). A batch that finds no room is lost without an error, and the training waits for it for ever. NumPy arrays, in contrast, are
sent through the pipe between the processes: one copy more, but no limit.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARED_MEMORY = Path("/dev/shm")  # Linux; where there is none, shared memory has no limit of its own
SHARE = 0.5  # of what is free: other workers, other trials and Ray's object store use it as well


def free_shared_memory() -> int | None:
    """Return the free bytes of ``/dev/shm``; None where there is no such file system."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def fits_shared_memory(needed: int) -> bool:
    """Return whether batches of ``needed`` bytes in all can be handed over in shared memory."""
    free = free_shared_memory()
    return free is None or needed <= SHARE * free


def as_arrays(batch: Any) -> Any:
    """Return a batch (tensors in tuples, lists and dicts) with NumPy arrays in place of the tensors, which share their memory."""
    return _converted(batch, torch.Tensor, torch.Tensor.numpy)


def as_tensors(batch: Any) -> Any:
    """Return a batch of :func:`as_arrays` with tensors in place of the arrays, which share their memory."""
    return _converted(batch, np.ndarray, torch.from_numpy)


def _converted(value: Any, kind: type, convert: Any) -> Any:
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {key: _converted(each, kind, convert) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_converted(each, kind, convert) for each in value)
    return value
