"""Position encodings of the feature map (Carion et al. 2020, appendix A.4): fixed sines, or learned rows and columns.

Both follow ``models/position_encoding.py`` of the official DETR.
"""

import functools
import math

import torch
from torch import Tensor, nn

from raydetr.errors import UserError
from raydetr.model.caching import is_traced

TEMPERATURE = 10000
EPS = 1e-6
CACHED_SHAPES = 16  # one encoding takes up to 3.5 MB of the device's memory (DC5)


class SinePosition(nn.Module):
    """Encode each cell of a feature map by sines and cosines of its row and column.

    Rows and columns are counted over the cells that are not padded and scaled to 0..2 pi (``PositionEmbeddingSine`` with
    ``normalize=True``).

    Args:
        hidden_dim: Channels of the encoding: the first half encodes the row, the second half the column.
    """

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoding of every cell.

        Args:
            features: Feature map, [B, C, h, w]. Only its shape and device matter.
            mask: Padding mask, bool [B, h, w], True where padded; None if nothing is padded.

        Returns:
            Float32 [B, h * w, hidden_dim]. Without a mask the encoding is the same for all images: [1, h * w, hidden_dim], cached.
        """
        if mask is not None:
            return _sines(mask, self.hidden_dim)
        compute = _unpadded_sines.__wrapped__ if is_traced(features) else _unpadded_sines
        return compute(*features.shape[-2:], self.hidden_dim, features.device)


@functools.lru_cache(maxsize=CACHED_SHAPES)
def _unpadded_sines(height: int, width: int, hidden_dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an encoding that inference has cached must serve training as well
        return _sines(torch.zeros(1, height, width, dtype=torch.bool, device=device), hidden_dim)


def clear_position_cache() -> None:
    """Release the cached encodings and the device memory that they take."""
    _unpadded_sines.cache_clear()


def _sines(mask: Tensor, hidden_dim: int) -> Tensor:
    inside = ~mask
    rows = inside.cumsum(1, dtype=torch.float32)
    columns = inside.cumsum(2, dtype=torch.float32)
    rows = rows / (rows[:, -1:, :] + EPS) * (2 * math.pi)
    columns = columns / (columns[:, :, -1:] + EPS) * (2 * math.pi)
    positions = torch.stack((rows, columns), -1).flatten(1, 2)  # [B, h * w, 2]
    channel = torch.arange(hidden_dim // 2, dtype=torch.float32, device=mask.device)
    angles = positions[..., None] / TEMPERATURE ** (2 * (channel // 2) / (hidden_dim // 2))
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), -1).flatten(2)


class LearnedPosition(nn.Module):
    """Encode each cell of a feature map by a learned vector for its row and one for its column (``PositionEmbeddingLearned``).

    Args:
        hidden_dim: Channels of the encoding: the first half encodes the column, the second half the row.
    """

    SIZE = 50  # rows and columns that have a vector

    def __init__(self, hidden_dim: int):
        super().__init__()
        self.row_embed = nn.Embedding(self.SIZE, hidden_dim // 2)
        self.col_embed = nn.Embedding(self.SIZE, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Return the encoding of every cell.

        Args:
            features: Feature map, [B, C, h, w]. Only its shape matters.
            mask: Ignored; the encoding does not depend on the padding.

        Returns:
            Float [1, h * w, hidden_dim].

        Raises:
            UserError: The map has more than 50 rows or columns.
        """
        height, width = features.shape[-2:]
        if max(height, width) > self.SIZE:
            raise UserError(
                f"model.position_embedding: learned positions end at {self.SIZE} x {self.SIZE}, the feature map is {height} x {width}; "
                "make the images smaller (data.max_size) or use sine positions"
            )
        columns = self.col_embed.weight[None, :width].expand(height, -1, -1)
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat((columns, rows), -1).flatten(0, 1)[None]
