"""DETR's transformer (Carion et al. 2020, section 3.2 and appendix A.3), batch first, on native scaled-dot-product attention.

Positions are added to queries and keys of every attention, never to values. Parameter names are those of the official
model, which are those of ``nn.MultiheadAttention`` and ``nn.Transformer``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with drop-out on its weights; parameters as in ``nn.MultiheadAttention``."""

    def __init__(self, hidden_dim: int, nheads: int, dropout: float):
        super().__init__()
        self.nheads = nheads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:
        """Query [B, L, D], key and value [B, S, D] to [B, L, D]; ``attend`` bool [B, 1, 1, S] is True where a key counts."""
        width = query.shape[-1]
        if query is key:
            q, k = F.linear(query, self.in_proj_weight[: 2 * width], self.in_proj_bias[: 2 * width]).chunk(2, -1)
        else:
            q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
            k = F.linear(key, self.in_proj_weight[width : 2 * width], self.in_proj_bias[width : 2 * width])
        v = F.linear(value, self.in_proj_weight[2 * width :], self.in_proj_bias[2 * width :])
        q, k, v = (each.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for each in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Self-attention over the places of the feature map, then a feed-forward network."""

    def __init__(self, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x [B, S, D], position [B or 1, S, D], attend as in :class:`Attention`; to [B, S, D]."""
        if self.pre_norm:
            x = x + self.dropout(self._attention(self.norm1(x), position, attend))
            return x + self.dropout(self._feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self._attention(x, position, attend)))
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _attention(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        place = x + position
        return self.self_attn(place, place, x, attend)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Self-attention among the object queries, attention to the image, then a feed-forward network."""

    def __init__(self, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(hidden_dim, nheads, dropout)
        self.multihead_attn = Attention(hidden_dim, nheads, dropout)
        self.linear1 = nn.Linear(hidden_dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, hidden_dim)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, query_position: Tensor, memory: Tensor, place: Tensor, attend: Tensor | None) -> Tensor:
        """x [B, Q, D], query_position [1, Q, D], memory [B, S, D], place (memory + its positions) [B, S, D]; to [B, Q, D]."""
        if self.pre_norm:
            x = x + self.dropout(self._self_attention(self.norm1(x), query_position))
            x = x + self.dropout(self.multihead_attn(self.norm2(x) + query_position, place, memory, attend))
            return x + self.dropout(self._feed_forward(self.norm3(x)))
        x = self.norm1(x + self.dropout(self._self_attention(x, query_position)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + query_position, place, memory, attend)))
        return self.norm3(x + self.dropout(self._feed_forward(x)))

    def _self_attention(self, x: Tensor, query_position: Tensor) -> Tensor:
        query = x + query_position
        return self.self_attn(query, query, x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class Encoder(nn.Module):
    """The encoder layers; with pre-norm a last normalization, since the layers leave their sum unnormalized."""

    def __init__(self, layers: int, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(hidden_dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_dim) if pre_norm else None

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """x [B, S, D] to [B, S, D]."""
        for layer in self.layers:
            x = layer(x, position, attend)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """The decoder layers; the same normalization is applied to what each of them gives out."""

    def __init__(self, layers: int, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, query_position: Tensor, memory: Tensor, place: Tensor, attend: Tensor | None, every_layer: bool) -> Tensor:
        """The queries after every layer [layers, B, Q, D], or after the last one only [1, B, Q, D]."""
        x = query_position.new_zeros(memory.shape[0], *query_position.shape[1:])
        states = []
        for layer in self.layers:
            x = layer(x, query_position, memory, place, attend)
            states.append(x)
        return self.norm(torch.stack(states if every_layer else states[-1:]))


class Transformer(nn.Module):
    """Encoder and decoder. Matrices start from Xavier's uniform distribution."""

    def __init__(
        self, hidden_dim: int, nheads: int, enc_layers: int, dec_layers: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ):
        super().__init__()
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout, pre_norm)
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout, pre_norm)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, source: Tensor, position: Tensor, padded: Tensor | None, queries: Tensor, every_layer: bool) -> Tensor:
        """From the image to the states of the object queries.

        source [B, S, D]; position [B or 1, S, D]; padded bool [B, S] (True where padded) or None; queries [Q, D]. Returns
        [layers, B, Q, D], or [1, B, Q, D] of the last layer unless ``every_layer``.
        """
        attend = None if padded is None else ~padded[:, None, None, :]
        memory = self.encoder(source, position, attend)
        return self.decoder(queries[None], memory, memory + position, attend, every_layer)
