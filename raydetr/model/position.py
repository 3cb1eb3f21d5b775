"""Position encodings of the feature map (Carion et al. 2020, appendix A.4): fixed sines or learned rows and columns."""

import functools
import math

import torch
from torch import Tensor, nn

from raydetr.errors import UserError

TEMPERATURE = 10000
EPS = 1e-6


class SinePosition(nn.Module):
    """Sines and cosines of a place's row and column, counted over what is not padded and scaled to 0..2 pi."""

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, C, h, w] and their mask [B, h, w] (True where padded) to float32 [B, h * w, hidden_dim].

        The first half of the channels encodes the row, the second the column. With mask None the result is [1, ...]: it is
        the same for all images, and remembered.
        """
        if mask is not None:
            return _sines(mask, self.hidden_dim)
        # While the network is traced, its tensors hold no numbers to remember.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(features) is not Tensor
        compute = _unpadded_sines.__wrapped__ if traced else _unpadded_sines
        return compute(*features.shape[-2:], self.hidden_dim, features.device)


@functools.lru_cache(maxsize=256)
def _unpadded_sines(height: int, width: int, hidden_dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is remembered must serve training, too
        return _sines(torch.zeros(1, height, width, dtype=torch.bool, device=device), hidden_dim)


def _sines(mask: Tensor, hidden_dim: int) -> Tensor:
    inside = ~mask
    rows = inside.cumsum(1, dtype=torch.float32)
    columns = inside.cumsum(2, dtype=torch.float32)
    rows = rows / (rows[:, -1:, :] + EPS) * (2 * math.pi)
    columns = columns / (columns[:, :, -1:] + EPS) * (2 * math.pi)
    places = torch.stack((rows, columns), -1).flatten(1, 2)  # [B, h * w, 2]
    channel = torch.arange(hidden_dim // 2, dtype=torch.float32, device=mask.device)
    angles = places[..., None] / TEMPERATURE ** (2 * (channel // 2) / (hidden_dim // 2))
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(2)


class LearnedPosition(nn.Module):
    """A learned vector for each of up to 50 columns and 50 rows of the feature map."""

    SIZE = 50

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.row_embed = nn.Embedding(self.SIZE, hidden_dim // 2)
        self.col_embed = nn.Embedding(self.SIZE, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, C, h, w] to [1, h * w, hidden_dim], the column first; the mask plays no part.

        Raises UserError where the map has more than 50 rows or columns.
        """
        height, width = features.shape[-2:]
        if max(height, width) > self.SIZE:
            raise UserError(
                f"model.position_embedding: learned positions end at {self.SIZE} x {self.SIZE}, the feature map is {height} x {width}; "
                "make the images smaller (data.max_size) or take sine positions"
            )
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), -1).flatten(0, 1)[None]
