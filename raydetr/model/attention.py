"""What a DETR looks at: attention weights, which a forward pass uses but does not keep.

They are computed again from the inputs of the attention layers, which hooks hand over. A model that nobody asks runs exactly as it does
without this module, in training and in evaluation.

Shapes in this module: B images, Q object queries, h x w cells of the feature map, P places in the images.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from raydetr.errors import UserError
from raydetr.model.detr import DETR
from raydetr.model.transformer import Attention


class AttentionRecord:
    """The inputs of the last attention layers in the model's latest forward pass, and the weights that follow from them."""

    def __init__(self):
        self._inputs: dict[str, tuple[Attention, tuple[Tensor, Tensor, Tensor | None]]] = {}
        self._cells = (0, 0)

    def decoder(self) -> Tensor:
        """Return how the object queries attend to the image in the last decoder layer, float [B, Q, nheads, h, w]."""
        layer, (query, key, attend) = self._inputs["decoder"]
        return layer.weights(query, key, attend).transpose(1, 2).unflatten(-1, self._cells)

    def encoder(self, places: Sequence[tuple[float, float]]) -> Tensor:
        """Return how places of the images attend to the other places in the last encoder layer, float [B, P, nheads, h, w].

        Args:
            places: (x, y) of each place as fractions of the batch's width and height, 0 to less than 1.

        Raises:
            UserError: The model has no encoder.
        """
        if "encoder" not in self._inputs:
            raise UserError("the model has no encoder layer (model.enc_layers is 0): there is no self-attention to see")
        layer, (query, key, attend) = self._inputs["encoder"]
        height, width = self._cells
        cells = [int(y * height) * width + int(x * width) for x, y in places]
        return layer.weights(query[:, cells], key, attend).transpose(1, 2).unflatten(-1, self._cells)

    def _keep(self, name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        query, key, *rest = inputs
        self._inputs[name] = cast(Attention, layer), (query, key, rest[1] if len(rest) > 1 else None)

    def _keep_cells(self, projected: Tensor) -> None:
        self._cells = projected.shape[-2], projected.shape[-1]


@contextlib.contextmanager
def recorded_attention(model: DETR) -> Iterator[AttentionRecord]:
    """Record the attention of every forward pass of ``model`` in the ``with`` block; the record tells that of the latest one."""
    transformer, record = model.transformer, AttentionRecord()
    layers = {"decoder": cast(Any, transformer.decoder.layers[-1]).multihead_attn}
    if len(transformer.encoder.layers):
        layers["encoder"] = cast(Any, transformer.encoder.layers[-1]).self_attn
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(lambda module, inputs, name=name: record._keep(name, module, inputs))
            stack.callback(handle.remove)
        handle = model.input_proj.register_forward_hook(lambda _module, _inputs, output: record._keep_cells(cast(Tensor, output)))
        stack.callback(handle.remove)
        yield record


@torch.no_grad()
def attention(model: DETR, images: Tensor, mask: Tensor | None = None, points: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """Return what a model predicts and what it looks at, as the DETR paper shows it (Carion et al. 2020, figures 3 and 6).

    The model keeps its mode: call ``model.eval()`` first, or the drop-out of training is in the numbers. Resize a map to the size of the
    batch, with ``torch.nn.functional.interpolate``, to lay it over an image.

    Args:
        model: A model of :func:`raydetr.load` or :func:`raydetr.build_model`.
        images: Normalized images, float [B, 3, H, W].
        mask: Padding mask, bool [B, H, W], True where padded; None if nothing is.
        points: Places (x, y) in pixels of ``images``, P of them, whose self-attention in the encoder is returned as well.

    Returns:
        The outputs of the model with Q object queries, and on the feature map of h x w cells (a 32nd or, with dilation, a 16th of H x W):

        - ``decoder_attention``: float [B, Q, nheads, h, w], how each object query attends to the image in the last decoder layer. Its
          weights sum to 1 over the cells and are 0 where padded; ``.mean(2)`` averages the heads;
        - ``encoder_attention``: float [B, P, nheads, h, w], how each of ``points`` attends to the image in the last encoder layer.

    Raises:
        UserError: A point is outside the images, or the model has no encoder layer.
    """
    height, width = images.shape[-2:]
    for x, y in points:
        if not (0 <= x < width and 0 <= y < height):  # true for NaN
            raise UserError(f"points: ({x:g}, {y:g}) is outside the images, which are {width} x {height} pixels")
    with recorded_attention(model) as record:
        outputs = model(images, mask)
        places = [(x / width, y / height) for x, y in points]
        encoder = {"encoder_attention": record.encoder(places)} if places else {}
        return {**outputs, "decoder_attention": record.decoder(), **encoder}
