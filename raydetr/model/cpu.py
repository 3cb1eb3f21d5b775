"""Operations that only CPUs need: cheap random numbers for drop-out, attention with drop-out, and weight gradients by matrix products."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class Dropout(nn.Module):
    """Zero elements with probability ``rate`` during training and scale the others so that the mean is kept.

    Drawing one random number per element takes a CPU longer than a matrix product does. On a CPU one 64-bit draw therefore serves four
    elements: ``rate`` is rounded to a multiple of 1/65536, and the scale is that of the rounded rate. Other devices use
    :func:`torch.nn.functional.dropout`.

    Args:
        rate: Probability of zeroing an element, from 0 to 1 (exclusive).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Apply drop-out in training mode; return the input unchanged in evaluation mode.

        Args:
            x: Float tensor of any shape.

        Returns:
            A tensor of the same shape and dtype.
        """
        if not self.training or self.rate == 0:
            return x
        if not x.is_cpu or torch.compiler.is_compiling():
            return F.dropout(x, self.rate)
        keep, scale = self.draw(x.shape)
        return (x * keep).mul_(scale)

    def draw(self, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """Draw on the CPU which elements to keep.

        Args:
            shape: Shape of the tensor that drop-out is applied to.

        Returns:
            A uint8 tensor of that shape, 1 where an element is kept and 0 where it is dropped, and the factor for the kept elements.
        """
        number = math.prod(shape)
        draws = torch.empty((number + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(self.rate * 65536)  # of the 65536 values of an int16, from the lowest
        keep = draws[:number].view(shape) >= dropped - 32768
        # A product with bytes takes a quarter of the time of torch.where, forward and backward, and the bytes are all that is saved.
        return keep.view(torch.uint8), 65536 / (65536 - dropped)


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    """Compute scaled dot-product attention with drop-out on its weights, in plain operations.

    Args:
        q: Queries, float [B, H, L, D].
        k: Keys, float [B, H, S, D].
        v: Values, float [B, H, S, D].
        attend: Bool [B, 1, 1, S], True for keys that take part; None if all do.
        keep: uint8 [B, H, L, S], 1 for each attention weight that is kept and 0 for each that is dropped.
        scale: Factor of the weights that are kept.

    Returns:
        Float [B, H, L, D].
    """
    similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attend is not None:
        similarity = similarity.masked_fill(~attend, -torch.inf)
    return (similarity.softmax(-1) * keep) @ (v * scale)


def products_are_faster(grad: Tensor, weight: Tensor, stride: Pair) -> bool:
    """Return whether :func:`weight_gradient` is faster than oneDNN, whose kernel is slow with AVX2 and with strides.

    Args:
        grad: Gradient of the convolution's output.
        weight: Weight of the convolution.
        stride: Stride of the convolution.
    """
    if not grad.is_cpu or grad.dtype != weight.dtype:
        return False
    return stride[0] > 1 or torch.backends.cpu.get_cpu_capability() != "AVX512"


def weight_gradient(grad: Tensor, x: Tensor, size: int, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Compute the gradient of a convolution's weight with one matrix product for each of its size x size taps.

    Args:
        grad: Gradient of the output, float [B, outputs, h, w] in channels-last memory.
        x: Input of the convolution, float [B, inputs, H, W] in channels-last memory.
        size: Height and width of the kernel.
        stride: Stride of the convolution.
        padding: Padding of the convolution.
        dilation: Dilation of the convolution.

    Returns:
        Float [outputs, inputs, size, size] in channels-last memory.
    """
    (batch, outputs, height, width), inputs = grad.shape, x.shape[1]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    by_pixel = grad.permute(0, 2, 3, 1).reshape(batch * height * width, outputs)
    gradient = grad.new_empty(outputs, size, size, inputs)
    for i in range(size):
        rows = slice(i * dilation[0], i * dilation[0] + stride[0] * (height - 1) + 1, stride[0])
        for j in range(size):
            columns = slice(j * dilation[1], j * dilation[1] + stride[1] * (width - 1) + 1, stride[1])
            inputs_at_tap = x[:, :, rows, columns].permute(0, 2, 3, 1).reshape(len(by_pixel), inputs)
            torch.mm(by_pixel.T, inputs_at_tap, out=gradient[:, i, j])
    return gradient.permute(0, 3, 1, 2)
