"""Operations that only CPUs need: drop-out with cheap random numbers, and attention with drop-out."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Module):
    """Zeroes elements with probability ``rate`` while training and scales the others so that the mean stays.

    On CPU, where drawing a number for every element takes longer than a matrix product does, one 64-bit draw serves four
    elements: ``rate`` is then rounded to a multiple of 1/65536 and the scale is that of the rounded rate.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x [...] to [...]."""
        if not self.training or self.rate == 0:
            return x
        if not x.is_cpu or torch.compiler.is_compiling():
            return F.dropout(x, self.rate)
        keep, scale = self.draw(x.shape)
        return (x * keep).mul_(scale)

    def draw(self, shape: tuple[int, ...]) -> tuple[Tensor, float]:
        """On CPU: what to keep, uint8 1 and what to drop, 0, in this shape, and the factor for what is kept."""
        number = math.prod(shape)
        draws = torch.empty((number + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        dropped = round(self.rate * 65536)  # of the 65536 values an int16 takes, from the lowest
        keep = draws[:number].view(shape) >= dropped - 32768
        # As bytes of 0 and 1 the product takes a quarter of the time of torch.where, forward and backward; they are all that is kept.
        return keep.view(torch.uint8), 65536 / (65536 - dropped)


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, keep: Tensor, scale: float) -> Tensor:
    """Scaled-dot-product attention with drop-out on its weights, written out in plain operations.

    Args:
        q: Queries, float [B, H, L, D].
        k: Keys, float [B, H, S, D].
        v: Values, float [B, H, S, D].
        attend: Bool [B, 1, 1, S], True where a key counts; None where all do.
        keep: uint8 [B, H, L, S], 1 for each attention weight that is kept and 0 for each that is dropped.
        scale: Factor of the weights that are kept.

    Returns:
        Float [B, H, L, D].
    """
    similarity = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attend is not None:
        similarity = similarity.masked_fill(~attend, -torch.inf)
    return (similarity.softmax(-1) * keep) @ (v * scale)
