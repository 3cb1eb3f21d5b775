"""Checkpoint files: written atomically, and read without running code that they contain.

A checkpoint of raydetr is a dict: ``model`` (the weights to use, a state dict under the official DETR's names), ``settings`` (the whole
tree as nested dicts), ``categories`` (``[{"id", "name"}, ...]`` in label order), ``data`` (fingerprints of the data sets), ``epoch``,
``step``, ``metrics``, and, for resuming, ``optimizer``, ``lr_scheduler``, ``scaler``, ``ema``, ``ema_updates``, ``trained`` (the weights
whose moving average ``model`` is), ``random`` and ``progress``.
"""

import argparse
import copy
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.files import atomic_write
from raydetr.weights.huggingface import is_huggingface_folder, read_huggingface


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint atomically.

    Tensors are stored as CPU tensors, so that plain ``torch.load(path, weights_only=True)`` reads the file on a computer without a GPU.

    Args:
        path: File to write; its folder is created.
        content: Tensors and plain data.

    Raises:
        UserError: The file cannot be written, for example because the disk is full. An earlier file at ``path`` is then untouched, and no
            partial file is left.
        TypeError: ``content`` has an object that :func:`read_checkpoint` would refuse.
    """
    path = Path(path)
    content = _plain_on_cpu(content, "content")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch's writer hides what stopped it, the disk's error or Ctrl-C, behind its own error about a file that ends too early.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        kept = "; the file that was there is untouched" if path.exists() else ""
        kind = DiskFull if is_disk_full(cause) else UserError
        raise kind(f"{path}: not saved ({cause.strerror or cause}){kept}") from None


_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.Size, torch.device, torch.dtype)


def _plain_on_cpu(value: Any, where: str) -> Any:
    """Return ``value`` with its tensors on the CPU; raise TypeError for an object that is neither a tensor nor plain data."""
    if type(value) in (dict, OrderedDict, Counter):
        moved = copy.copy(value)  # keeps the attributes of a state dict
        for key, each in value.items():
            _plain_on_cpu(key, f"a key of {where}")
            moved[key] = _plain_on_cpu(each, f"{where}[{key!r}]")
        return moved
    if type(value) in (list, tuple, set):
        return type(value)(_plain_on_cpu(each, f"{where}[{index}]") for index, each in enumerate(value))
    if isinstance(value, Tensor):
        return value.cpu()
    if type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors and plain data")
    return value


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of ``torch.save``, or a model folder of transformers, to the CPU without running code in it (``weights_only=True``).

    ``argparse.Namespace``, which official training checkpoints contain, is allowed by name. NumPy's numbers become Python's, and paths
    become text.

    Args:
        path: File to read.

    Returns:
        The dict that the file contains.

    Raises:
        UserError: The file is missing, damaged, not a checkpoint, or contains anything else.
    """
    path = Path(path).expanduser()
    if is_huggingface_folder(path):
        return read_huggingface(path)
    start = _first_bytes(path)
    try:
        _check_not_compressed(path, start)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything: KeyError, struct.error, MemoryError, ...
        raise UserError(f"{path}: {_what_it_is(start, error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise UserError(f"{path}: {_what_folder_it_is(path)}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _what_folder_it_is(path: Path) -> str:
    for name in ("best.pth", "last.pth"):
        if (path / name).is_file():
            return f"a folder, not a checkpoint; did you mean {path / name}?"
    if any((path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")):
        return f"a model folder of Hugging Face transformers, not a checkpoint; {HUGGING_FACE_ADVICE}"
    return "a folder, not a checkpoint"


HUGGING_FACE_ADVICE = (
    "raydetr reads the folder that save_pretrained writes, with config.json and model.safetensors in one file; for the COCO weights use "
    "model.weights coco"
)


def _check_not_compressed(path: Path, start: bytes) -> None:
    # torch.save stores without compression; torch.load would fill the memory with what a small file expands to.
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > path.stat().st_size:
            raise UserError(f"{path}: a compressed archive that expands to {expanded} bytes; torch.save does not write such files")


# The first bytes of files that are mistaken for checkpoints.
_OTHER_FILES = {
    b"\x80": "a pickle that may contain code, which raydetr does not run; it reads what torch.save writes",
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for; run git lfs pull",
    b"\x89HDF": "an HDF5 file (of Keras, perhaps), not a checkpoint of PyTorch",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
}


def _what_it_is(start: bytes, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"contains code ({code[1]}), which raydetr does not run; a checkpoint holds tensors and plain data only"
    if isinstance(error, MemoryError):
        return "asks for more memory than there is"
    if "TorchScript" in str(error):
        return "a TorchScript program, not a checkpoint"
    if start.startswith(b"PK") or b"\xfc\x9cF\xf9 j\xa8P\x19" in start:  # zip; the magic number of torch before 1.6
        return "a damaged checkpoint, perhaps cut short by a broken copy; get it again"
    if start[8:9] == b"{" and start[5:8] == bytes(3):  # the length of the JSON header that follows, in 8 bytes
        return f"a safetensors file, not a checkpoint; {HUGGING_FACE_ADVICE}"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not a checkpoint"
    known = (text for beginning, text in _OTHER_FILES.items() if start.startswith(beginning))
    return next(known, "not a checkpoint" if start else "empty")


class _NumpyDtype:
    """Stand-in for ``numpy.dtype`` while a file is read."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(dtype: _NumpyDtype, raw: bytes) -> bool | int | float:
    """Stand-in for NumPy's own constructor, which trusts its arguments."""
    if not isinstance(dtype, _NumpyDtype) or not re.fullmatch("[<>|=](b1|[iu][1248]|f[248])", dtype.order + dtype.code):
        raise pickle.UnpicklingError("not a number")
    (number,) = np.frombuffer(raw, dtype.order + dtype.code)
    return number.item()


def _path_text(*parts: str) -> str:
    """Stand-in for a ``pathlib`` path, which trainers keep among their arguments."""
    return str(PurePosixPath(*parts))


_ALLOWED = [
    argparse.Namespace,
    *((_path_text, f"pathlib.{module}{kind}") for module in ("", "_local.") for kind in ("PosixPath", "WindowsPath")),
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
