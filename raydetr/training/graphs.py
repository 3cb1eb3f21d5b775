"""CUDA graphs of the network: its forward and backward pass on batches of one shape are recorded once and then replayed.

A forward and backward pass of DETR is two thousand kernels, and with small batches the host takes longer to launch them than the GPU to
run them. A replay launches all of a pass at once. Matching and losses, which need the host, run between the two replays as always.
"""

import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from raydetr.model.detr import DETR

# A shape is recorded when it is seen for the fourth time. A rare one is not worth it, and what the network caches exists by then: made
# during a recording, it would be overwritten by replays.
SEEN_BEFORE_RECORDING = 4
MOST_GRAPHS = 32  # each keeps its batch, its outputs and a copy of all gradients on the GPU (166 MB for detr_resnet50)


class GraphedNetwork:
    """Calls a network by CUDA graphs, one for each shape of a batch; shapes that are seen rarely run as usual.

    All graphs share one pool of memory, since only one runs at a time: the backward pass of a batch must be finished before the next
    batch. If there are too many, the one that was used the longest time ago is dropped.

    Args:
        network: The network on its GPU. Its parameters get gradients of zero, to which those of a graph are added: a replay writes its
            own to the same memory every time.
    """

    def __init__(self, network: DETR):
        self.network = network
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._recorded: OrderedDict[tuple[int, ...], Callable[[Tensor, Tensor], dict[str, Any]]] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def __call__(self, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Return the outputs of the network; arguments are those of :meth:`raydetr.model.detr.DETR.forward`.

        The next batch of the same shape overwrites the outputs.
        """
        if mask is None:  # one graph serves batches with and without padding
            mask = torch.zeros(images.shape[0], *images.shape[-2:], dtype=torch.bool, device=images.device)
        shape = tuple(images.shape)
        if shape not in self._recorded:
            self._seen[shape] += 1
            if self._seen[shape] < SEEN_BEFORE_RECORDING:
                return self.network(images, mask)
            self._record(shape, images, mask)
        self._recorded.move_to_end(shape)
        return self._recorded[shape](images, mask)

    def _record(self, shape: tuple[int, ...], images: Tensor, mask: Tensor) -> None:
        if len(self._recorded) == MOST_GRAPHS:
            dropped, _ = self._recorded.popitem(last=False)
            del self._seen[dropped]
        make = torch.cuda.make_graphed_callables
        # Another thread puts batches into pinned memory meanwhile. Older versions of torch cannot be told to allow that.
        has_mode = "capture_error_mode" in inspect.signature(make).parameters
        options: dict[str, Any] = {"capture_error_mode": "thread_local"} if has_mode else {}
        inputs = (images.clone(), mask.clone())  # which become the graph's own
        recorded: Any = make(_Network(self.network), inputs, allow_unused_input=True, pool=self._pool, **options)
        self._recorded[shape] = recorded


class _Network(nn.Module):
    """The network under another module, since a recording replaces the ``forward`` of the module that it is given."""

    def __init__(self, network: DETR):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        return self.network(images, mask)
