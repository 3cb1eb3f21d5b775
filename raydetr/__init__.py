"""raydetr: from a folder of labelled photographs to the best DETR for it.

The public Python API. Importing it imports neither torch nor ray; each name loads what it needs when it is first used.
"""

import importlib

from raydetr.errors import UserError

__version__ = "0.1.0"

_HOME = {
    "build_model": "raydetr.model.detr",
    "build_criterion": "raydetr.loss.criterion",
    "load": "raydetr.weights.fitting",
    "load_config": "raydetr.config",
    "train": "raydetr.launch.train",
    "tune": "raydetr.launch.command",
}

__all__ = ["UserError", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'raydetr' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__():
    return sorted([*globals(), *_HOME])
