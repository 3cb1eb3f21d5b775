"""Checkpoints: written whole, read without running what they contain, and fitted to a model with other categories.

A checkpoint of raydetr is a dict: ``model`` (state dict under the official DETR's names: the weights to use), ``settings`` (the
whole tree as nested dicts), ``categories`` (``[{"id", "name"}, ...]`` in label order), ``epoch``, ``metrics``; and, to go on
from, ``optimizer``, ``lr_scheduler``, ``scaler``, ``ema``, ``random``. Read as well: the official weights and training
checkpoints, those of its detectron2 wrapper (``d2/`` there), bare state dicts, and torchvision's ResNets.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydetr.errors import DiskFull, UserError, is_disk_full
from raydetr.weights.files import written_whole


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain data) to ``path``, whole or not at all.

    Raises UserError where it cannot be written (a full disk): what was at ``path`` is then untouched, nothing else is left.
    Raises TypeError for an object that :func:`read_checkpoint` would refuse.
    """
    path = Path(path)
    _check_plain(content, "content")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch's writer covers what stopped it, the disk's error or Ctrl-C, with its own about a file that ends too early.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        kept = "; the file that was there is untouched" if path.exists() else ""
        kind = DiskFull if is_disk_full(cause) else UserError
        raise kind(f"{path}: not saved ({cause.strerror or cause}){kept}") from None


_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.Size, torch.device, torch.dtype)


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict, Counter):
        for key, each in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(each, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, each in enumerate(value):
            _check_plain(each, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors and plain data")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a file of ``torch.save`` holds, on the CPU; code in it is never run (``weights_only``).

    ``argparse.Namespace`` (in official training checkpoints) and numpy's numbers, which become Python's, are allowed by name. Raises
    UserError for a file that is missing, damaged, no checkpoint, or contains anything else.
    """
    path = Path(path).expanduser()
    start = _first_bytes(path)
    try:
        _check_not_blown_up(path, start)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ALLOWED):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # damaged bytes lead the unpickler anywhere: KeyError, struct.error, MemoryError, ...
        raise UserError(f"{path}: {_what_it_is(start, error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        hint = next((f"; did you mean {path / name}?" for name in ("best.pth", "last.pth") if (path / name).is_file()), "")
        raise UserError(f"{path}: a folder, not a checkpoint{hint}")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _check_not_blown_up(path: Path, start: bytes) -> None:
    # torch.save stores, it does not compress; torch.load would fill the memory with what a small file expands to.
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        if expanded > path.stat().st_size:
            raise UserError(f"{path}: a compressed archive that expands to {expanded} bytes; torch.save does not write such files")


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
    if start.startswith(b"\x80"):
        return "a pickle that may contain code, which raydetr does not run; it reads what torch.save writes"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for; run git lfs pull"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not a checkpoint"
    return "not a checkpoint" if start else "empty"


class _NumpyDtype:
    """Stands in for ``numpy.dtype`` while a file is read."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


def _numpy_scalar(dtype: _NumpyDtype, raw: bytes) -> bool | int | float:
    """Stands in for numpy's own constructor, which trusts its arguments."""
    if not isinstance(dtype, _NumpyDtype) or not re.fullmatch("[<>|=](b1|[iu][1248]|f[248])", dtype.order + dtype.code):
        raise pickle.UnpicklingError("not a number")
    (number,) = np.frombuffer(raw, dtype.order + dtype.code)
    return number.item()


_ALLOWED = [
    argparse.Namespace,
    (_NumpyDtype, "numpy.dtype"),
    (_numpy_scalar, "numpy.core.multiarray.scalar"),
    (_numpy_scalar, "numpy._core.multiarray.scalar"),
]
