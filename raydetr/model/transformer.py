"""DETR's transformer (Carion et al. 2020, section 3.2 and appendix A.3), batch first, on native scaled-dot-product attention.

Positions are added to queries and keys of every attention, never to values. Parameter names are those of the official
model, which are those of ``nn.MultiheadAttention`` and ``nn.Transformer``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydetr.model.cpu import Dropout, attention_with_dropout


class Attention(nn.Module):
    """Multi-head attention with drop-out on its weights; parameters as in ``nn.MultiheadAttention``."""

    def __init__(self, hidden_dim: int, nheads: int, dropout: float):
        super().__init__()
        self.nheads = nheads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:
        """Query [B, L, D], key and value [B, S, D] to [B, L, D]; ``attend`` bool [B, 1, 1, S] is True where a key counts."""
        width = query.shape[-1]
        if query is key:  # one product makes both
            sizes = (2 * width, width)
            (qk_weight, v_weight), (qk_bias, v_bias) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            q, k = F.linear(query, qk_weight, qk_bias).chunk(2, -1)
        else:
            (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            q, k = F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias)
        v = F.linear(value, v_weight, v_bias)
        q, k, v = (each.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.out_proj(self._mix(q, k, v, attend).transpose(1, 2).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None) -> Tensor:
        rate = self.dropout.rate if self.training else 0.0
        if rate == 0 or not q.is_cpu:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=rate)
        # No fused kernel has drop-out on CPU: written out it can use our own. What grows with the square of the places, the weights,
        # is not kept for the backward pass but computed again.
        keep, scale = self.dropout.draw((*q.shape[:-1], k.shape[-2]))
        return checkpoint(attention_with_dropout, q, k, v, attend, keep, scale, use_reentrant=False, preserve_rng_state=False)


def feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, dropout: Dropout) -> Tensor:
    """``linear2(dropout(relu(linear1(x))))``: [..., D] to [..., D].

    Drop-out and ReLU commute, as the scale is positive; in this order ReLU works in place and nothing of it is kept but its result.
    """
    return linear2(dropout(linear1(x)).relu_())


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
        self.dropout = Dropout(dropout)

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
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


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
        self.dropout = Dropout(dropout)

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
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


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
