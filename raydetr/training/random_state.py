"""The random number generators of a worker: seed them, save their state in a checkpoint, and restore it."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, including those of all GPUs.

    Args:
        *numbers: Non-negative integers; the same ones always give the same state.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of this worker's generators as tensors and plain data, which a checkpoint may contain.

    Args:
        device: The worker's device.

    Returns:
        The states under ``python``, ``numpy``, ``torch`` and ``cuda``; the last is None if ``device`` is not a GPU.
    """
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the state of all random number generators.

    Args:
        state: The result of :func:`get_random_state`.
        device: Where the model is. The generator of a GPU is left alone if ``state`` was taken on a CPU.
    """
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
