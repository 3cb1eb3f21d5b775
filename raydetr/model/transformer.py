"""DETR's transformer (Carion et al. 2020, section 3.2 and appendix A.3), batch first, with PyTorch's scaled dot-product attention.

It follows ``models/transformer.py`` of the official DETR. Position encodings are added to the queries and keys of every attention, never
to the values. Parameter names are those of ``nn.MultiheadAttention`` and ``nn.Transformer``, as in the official model.

Shapes in this module: B images, S cells of the feature map (height x width), Q object queries, D channels (``hidden_dim``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydetr.model.cpu import Dropout, attention_with_dropout


class Attention(nn.Module):
    """Multi-head attention with drop-out on its weights; its parameters are those of ``nn.MultiheadAttention``.

    Args:
        hidden_dim: Channels D.
        nheads: Attention heads; a divisor of ``hidden_dim``.
        dropout: Probability of dropping an attention weight.
    """

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
        """Attend from ``query`` to ``key`` and ``value``.

        Args:
            query: Float [B, L, D].
            key: Float [B, S, D].
            value: Float [B, S, D].
            attend: Bool [B, 1, 1, S], True for keys that take part; None if all do.

        Returns:
            Float [B, L, D].
        """
        width = query.shape[-1]
        if query is key:  # one matrix product computes both projections
            sizes = (2 * width, width)
            (qk_weight, v_weight), (qk_bias, v_bias) = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            q, k = F.linear(query, qk_weight, qk_bias).chunk(2, -1)
        else:
            (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
            q, k = F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias)
        v = F.linear(value, v_weight, v_bias)
        q, k, v = (each.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for each in (q, k, v))
        return self.out_proj(self._mix(q, k, v, attend).transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, attend: Tensor | None = None) -> Tensor:
        """Return the attention weights before drop-out, which :meth:`forward` uses but does not keep.

        Args:
            query: Float [B, L, D].
            key: Float [B, S, D].
            attend: Bool [B, 1, 1, S], True for keys that take part; None if all do.

        Returns:
            Float32 (float64 for a float64 layer) [B, nheads, L, S]; the weights of each query and head sum to 1.
        """
        (q_weight, k_weight, _), (q_bias, k_bias, _) = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k = F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias)
        q, k = (each.unflatten(-1, (self.nheads, -1)).transpose(1, 2) for each in (q, k))
        similarity = q @ k.mT * q.shape[-1] ** -0.5
        similarity = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
        return (similarity if attend is None else similarity.masked_fill(~attend, -torch.inf)).softmax(-1)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None) -> Tensor:
        rate = self.dropout.rate if self.training else 0.0
        if rate == 0 or not q.is_cpu or torch.compiler.is_compiling():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=rate)
        # No fused kernel on the CPU has drop-out, so attention is written out and uses our cheap drop-out. The attention weights, whose
        # size is quadratic in the cells, are recomputed in the backward pass instead of saved.
        keep, scale = self.dropout.draw((*q.shape[:-1], k.shape[-2]))
        return checkpoint(attention_with_dropout, q, k, v, attend, keep, scale, use_reentrant=False, preserve_rng_state=False)


def feed_forward(x: Tensor, linear1: nn.Linear, linear2: nn.Linear, dropout: Dropout) -> Tensor:
    """Compute ``linear2(dropout(relu(linear1(x))))``.

    Drop-out and ReLU commute because the drop-out's scale is positive. ReLU comes last, because it can then work in place, and only its
    result is saved for the backward pass.

    Args:
        x: Float [..., D].
        linear1: Layer from D channels to hidden channels.
        linear2: Layer from hidden channels to D channels.
        dropout: Drop-out of the hidden channels.

    Returns:
        Float [..., D].
    """
    return linear2(dropout(linear1(x)).relu_())


class EncoderLayer(nn.Module):
    """Self-attention over the cells of the feature map, then a feed-forward network.

    Args:
        hidden_dim: Channels D.
        nheads: Attention heads.
        dim_feedforward: Hidden channels of the feed-forward network.
        dropout: Drop-out probability.
        pre_norm: Normalize before attention and feed-forward network instead of after them.
    """

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
        """Return the layer's output, float [B, S, D].

        Args:
            x: Float [B, S, D].
            position: Position encoding, float [B, S, D] or [1, S, D].
            attend: Bool [B, 1, 1, S], True for cells that are not padded; None if no cell is padded.
        """
        if self.pre_norm:
            x = x + self.dropout(self._attention(self.norm1(x), position, attend))
            return x + self.dropout(self._feed_forward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self._attention(x, position, attend)))
        return self.norm2(x + self.dropout(self._feed_forward(x)))

    def _attention(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        with_position = x + position
        return self.self_attn(with_position, with_position, x, attend)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


class DecoderLayer(nn.Module):
    """Self-attention among the object queries, attention to the image, then a feed-forward network.

    Args:
        hidden_dim: Channels D.
        nheads: Attention heads.
        dim_feedforward: Hidden channels of the feed-forward network.
        dropout: Drop-out probability.
        pre_norm: Normalize before each of the three parts instead of after it.
    """

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

    def forward(
        self, x: Tensor, query_position: Tensor, memory: Tensor, memory_keys: Tensor, attend: Tensor | None, groups: int = 1
    ) -> Tensor:
        """Return the layer's output, float [B, Q, D].

        Args:
            x: State of the object queries, float [B, Q, D].
            query_position: Learned query embeddings, float [1, Q, D].
            memory: Output of the encoder, float [B, S, D].
            memory_keys: ``memory`` plus its position encoding, float [B, S, D].
            attend: Bool [B, 1, 1, S], True for cells that are not padded; None if no cell is padded.
            groups: Number of groups that the queries consist of, one after the other; queries attend to those of their group only.
        """
        if self.pre_norm:
            x = x + self.dropout(self._self_attention(self.norm1(x), query_position, groups))
            x = x + self.dropout(self.multihead_attn(self.norm2(x) + query_position, memory_keys, memory, attend))
            return x + self.dropout(self._feed_forward(self.norm3(x)))
        x = self.norm1(x + self.dropout(self._self_attention(x, query_position, groups)))
        x = self.norm2(x + self.dropout(self.multihead_attn(x + query_position, memory_keys, memory, attend)))
        return self.norm3(x + self.dropout(self._feed_forward(x)))

    def _self_attention(self, x: Tensor, query_position: Tensor, groups: int) -> Tensor:
        query = x + query_position
        if groups == 1:
            return self.self_attn(query, query, x)
        query, x = (each.unflatten(1, (groups, -1)).flatten(0, 1) for each in (query, x))
        return self.self_attn(query, query, x).unflatten(0, (-1, groups)).flatten(1, 2)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.linear2, self.dropout)


class Encoder(nn.Module):
    """The encoder: a stack of layers and, with ``pre_norm``, a final normalization, because those layers leave their sum unnormalized.

    Args:
        layers: Number of layers.
        hidden_dim: Channels D.
        nheads: Attention heads.
        dim_feedforward: Hidden channels of the feed-forward networks.
        dropout: Drop-out probability.
        pre_norm: Normalize before attention and feed-forward network instead of after them.
    """

    def __init__(self, layers: int, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(hidden_dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_dim) if pre_norm else None

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """Run all layers on the cells of the feature map.

        Args:
            x: Projected feature map, float [B, S, D].
            position: Position encoding, float [B, S, D] or [1, S, D].
            attend: Bool [B, 1, 1, S], True for cells that are not padded; None if none is padded.

        Returns:
            The memory, float [B, S, D].
        """
        for layer in self.layers:
            x = layer(x, position, attend)
        return x if self.norm is None else self.norm(x)


class Decoder(nn.Module):
    """The decoder: a stack of layers and one normalization that is applied to the output of each.

    Args:
        layers: Number of layers.
        hidden_dim: Channels D.
        nheads: Attention heads.
        dim_feedforward: Hidden channels of the feed-forward networks.
        dropout: Drop-out probability.
        pre_norm: Normalize before each part of a layer instead of after it.
    """

    def __init__(self, layers: int, hidden_dim: int, nheads: int, dim_feedforward: int, dropout: float, pre_norm: bool):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(hidden_dim, nheads, dim_feedforward, dropout, pre_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(
        self, query_position: Tensor, memory: Tensor, memory_keys: Tensor, attend: Tensor | None, every_layer: bool, groups: int = 1
    ) -> Tensor:
        """Return the states of the object queries after every layer, float [layers, B, Q, D], or only after the last, [1, B, Q, D].

        Args:
            query_position: Learned query embeddings, float [1, Q, D].
            memory: Output of the encoder, float [B, S, D].
            memory_keys: ``memory`` plus its position encoding, float [B, S, D].
            attend: Bool [B, 1, 1, S], True for cells that are not padded; None if no cell is padded.
            every_layer: Return the states of every layer instead of the last one's.
            groups: Number of groups that the queries consist of, see :class:`DecoderLayer`.
        """
        x = query_position.new_zeros(memory.shape[0], *query_position.shape[1:])
        states = []
        for layer in self.layers:
            x = layer(x, query_position, memory, memory_keys, attend, groups)
            states.append(x)
        return self.norm(torch.stack(states if every_layer else states[-1:]))


class Transformer(nn.Module):
    """Encoder and decoder, with matrices initialized from Xavier's uniform distribution.

    Args:
        hidden_dim: Channels D.
        nheads: Attention heads.
        enc_layers: Encoder layers.
        dec_layers: Decoder layers.
        dim_feedforward: Hidden channels of the feed-forward networks.
        dropout: Drop-out probability.
        pre_norm: Normalize before attention and feed-forward networks instead of after them.
    """

    def __init__(
        self, hidden_dim: int, nheads: int, enc_layers: int, dec_layers: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ):
        super().__init__()
        self.encoder = Encoder(enc_layers, hidden_dim, nheads, dim_feedforward, dropout, pre_norm)
        self.decoder = Decoder(dec_layers, hidden_dim, nheads, dim_feedforward, dropout, pre_norm)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, source: Tensor, position: Tensor, padded: Tensor | None, queries: Tensor, every_layer: bool, groups: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Encode a feature map and decode the object queries.

        Args:
            source: Projected feature map, float [B, S, D].
            position: Its position encoding, float [B, S, D] or [1, S, D].
            padded: Padding mask, bool [B, S], True where padded; None if nothing is padded.
            queries: Learned query embeddings, float [Q, D].
            every_layer: Return the states after every decoder layer instead of only the last.
            groups: Number of groups that the queries consist of, see :class:`DecoderLayer`.

        Returns:
            The states of the object queries, float [layers, B, Q, D] ([1, B, Q, D] without ``every_layer``), and the memory (the output of
            the encoder), float [B, S, D].
        """
        attend = None if padded is None else ~padded[:, None, None, :]
        memory = self.encoder(source, position, attend)
        return self.decoder(queries[None], memory, memory + position, attend, every_layer, groups), memory
