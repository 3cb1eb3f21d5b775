"""Keep tensors that are computed from others that rarely change, and recognize when that is impossible."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Cached:
    """A value derived from tensors, which is computed again only when one of them is replaced or written to.

    A change is recognized by identity and version counter, so that ``load_state_dict``, ``Module.to`` and in-place operations are noticed
    at once. Tensors without a version counter (made under ``torch.inference_mode``) and traced tensors are never cached.
    """

    def __init__(self):
        self._sources: tuple[tuple[Tensor, int], ...] = ()
        self._key: Any = None
        self._value: Any = None

    def get(self, compute: Callable[[], Any], *sources: Tensor, key: Any = None) -> Any:
        """Return the result of ``compute``, from the cache if neither ``sources`` nor ``key`` has changed since it was computed.

        Args:
            compute: Computes the result; called without arguments.
            *sources: The tensors that the result is derived from.
            key: What the result depends on besides these tensors.
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
    """Return whether the program is being traced, in which case tensors have no values that a cache could keep.

    Args:
        *tensors: Tensors; any that is neither a plain tensor nor a parameter counts as traced.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return tracing or any(type(each) not in (Tensor, nn.Parameter) for each in tensors)
