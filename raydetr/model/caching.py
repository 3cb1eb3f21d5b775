"""Tensors that are computed once from others that rarely change, and when that is impossible."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Cached:
    """Tensors derived from fixed ones, recomputed only when one of them is replaced or written to.

    A change is recognized by identity and version counter, so ``load_state_dict``, ``Module.to`` and in-place operations count at
    once. Tensors without a version counter (made under ``torch.inference_mode``) and traced ones are never cached.
    """

    def __init__(self):
        self._sources: tuple[tuple[Tensor, int], ...] = ()
        self._key: Any = None
        self._value: Any = None

    def get(self, compute: Callable[[], Any], *sources: Tensor, key: Any = None) -> Any:
        """Return the result of ``compute``, from the cache if neither ``sources`` nor ``key`` has changed since it was computed.

        Args:
            compute: Computes the result; called without arguments.
            key: What the result depends on besides the tensors in ``sources``.
        """
        if is_traced(*sources) or any(each.is_inference() for each in sources):
            return compute()
        known = len(self._sources) == len(sources) and all(
            old is new and version == new._version for (old, version), new in zip(self._sources, sources, strict=True)
        )
        if not known or key != self._key:
            with torch.inference_mode(False), torch.no_grad():  # a value that inference has cached must serve training as well
                self._value = compute()
            self._sources, self._key = tuple((each, each._version) for each in sources), key
        return self._value

    def __getstate__(self) -> dict:
        return {}  # a copy of the module computes its own

    def __setstate__(self, _: dict) -> None:
        self.__init__()


def is_traced(*tensors: Tensor) -> bool:
    """Return whether the program is being traced, so that ``tensors`` hold no numbers that a cache could keep."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or any(type(each) not in (Tensor, nn.Parameter) for each in tensors)
