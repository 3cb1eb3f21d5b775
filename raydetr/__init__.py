"""Fine-tune DETR on a small set of labeled images, distributed and searched with Ray.

This is the public Python API. Importing it imports neither torch nor ray: each name loads what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raydetr.errors import UserError

if TYPE_CHECKING:
    from raydetr.config import load_config
    from raydetr.launch.command import tune
    from raydetr.launch.train import train
    from raydetr.loss.criterion import build_criterion
    from raydetr.model.attention import attention
    from raydetr.model.detr import build_model
    from raydetr.weights.fitting import load

__version__ = "0.2.0"

_HOME = {
    "attention": "raydetr.model.attention",
    "build_model": "raydetr.model.detr",
    "build_criterion": "raydetr.loss.criterion",
    "load": "raydetr.weights.fitting",
    "load_config": "raydetr.config",
    "train": "raydetr.launch.train",
    "tune": "raydetr.launch.command",
}

__all__ = ["UserError", "attention", "build_criterion", "build_model", "load", "load_config", "train", "tune"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'raydetr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
