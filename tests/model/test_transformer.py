"""The transformer against a plain one written out here, and against torch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raydetr.model.cpu import Dropout
from raydetr.model.transformer import Attention, EncoderLayer, Transformer

D, HEADS, FEED_FORWARD, B, S, Q = 16, 4, 24, 2, 6, 5


def build(pre_norm: bool, dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    transformer = Transformer(D, HEADS, 2, 3, FEED_FORWARD, dropout, pre_norm)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms, too, away from where they start
    return transformer.double()


def inputs(masked: bool):
    torch.manual_seed(1)
    padded = torch.zeros(B, S, dtype=torch.bool)
    padded[1, 4:] = True
    source, position, queries = (torch.randn(*shape, D, dtype=torch.float64) for shape in ((B, S), (B, S), (Q,)))
    return source, position, padded if masked else None, queries


class Plain:
    """The paper's transformer with all that makes it fast left out; ``drop`` stands wherever the official model drops out."""

    def __init__(self, state: dict, pre_norm: bool, drop=lambda x: x):
        self.state, self.pre_norm, self.drop = state, pre_norm, drop

    def linear(self, name, x):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name, x):
        return F.layer_norm(x, (D,), self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attention(self, name, query, key, value, padded):
        weight, bias = self.state[f"{name}.in_proj_weight"], self.state[f"{name}.in_proj_bias"]
        q, k, v = (x @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D] for i, x in enumerate((query, key, value)))
        heads = []
        for h in range(HEADS):
            part = slice(h * D // HEADS, (h + 1) * D // HEADS)
            similarity = q[..., part] @ k[..., part].mT / (D // HEADS) ** 0.5
            if padded is not None:
                similarity = similarity + torch.zeros_like(similarity).masked_fill(padded[:, None], float("-inf"))
            heads.append(self.drop(similarity.softmax(-1)) @ v[..., part])
        return self.linear(f"{name}.out_proj", torch.cat(heads, -1))

    def around(self, norm, x, inner):
        """A residual branch with its normalization, after the sum or before the branch."""
        return x + self.drop(inner(self.norm(norm, x))) if self.pre_norm else self.norm(norm, x + self.drop(inner(x)))

    def feed_forward(self, name):
        return lambda x: self.linear(f"{name}.linear2", self.drop(self.linear(f"{name}.linear1", x).relu()))

    def __call__(self, source, position, padded, queries):
        memory = source
        for i in range(2):
            name = f"encoder.layers.{i}"

            def attend(x, name=name):
                return self.attention(f"{name}.self_attn", x + position, x + position, x, padded)

            memory = self.around(f"{name}.norm1", memory, attend)
            memory = self.around(f"{name}.norm2", memory, self.feed_forward(name))
        if self.pre_norm:
            memory = self.norm("encoder.norm", memory)
        x, states = torch.zeros(B, Q, D, dtype=torch.float64), []
        for i in range(3):
            name = f"decoder.layers.{i}"

            def among(x, name=name):
                return self.attention(f"{name}.self_attn", x + queries, x + queries, x, None)

            def look(x, name=name):
                return self.attention(f"{name}.multihead_attn", x + queries, memory + position, memory, padded)

            x = self.around(f"{name}.norm1", x, among)
            x = self.around(f"{name}.norm2", x, look)
            x = self.around(f"{name}.norm3", x, self.feed_forward(name))
            states.append(self.norm("decoder.norm", x))
        return torch.stack(states)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_transformer(pre_norm, masked):
    transformer = build(pre_norm)
    source, position, padded, queries = inputs(masked)
    states = transformer(source, position, padded, queries, every_layer=True)[0]
    slope = torch.randn_like(states)
    ours = torch.autograd.grad((states * slope).sum(), list(transformer.parameters()))
    parameters = dict(transformer.named_parameters())
    expected = Plain(parameters, pre_norm)(source, position, padded, queries)
    torch.testing.assert_close(states, expected)
    theirs = torch.autograd.grad((expected * slope).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    last = transformer(source, position, padded, queries, every_layer=False)[0]
    torch.testing.assert_close(last, states[-1:])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_drop_out_stands_where_the_official_model_has_it(pre_norm, monkeypatch):
    """With drop-out replaced by a factor, every place of it shows in the output, attention weights included."""
    monkeypatch.setattr(Dropout, "draw", lambda _self, shape: (torch.ones(shape, dtype=torch.uint8), 0.7))
    transformer = build(pre_norm, dropout=0.1)
    source, position, padded, queries = inputs(masked=True)
    expected = Plain(dict(transformer.named_parameters()), pre_norm, drop=lambda x: 0.7 * x)(source, position, padded, queries)
    torch.testing.assert_close(transformer(source, position, padded, queries, every_layer=True)[0], expected)


def test_attention_weights_that_drop_out_are_computed_again_and_not_kept(monkeypatch):
    drawn, scale = torch.randint(0, 2, (B, HEADS, S, S), dtype=torch.uint8), 1.6
    monkeypatch.setattr(Dropout, "draw", lambda _self, _shape: (drawn, scale))
    attention = Attention(D, HEADS, dropout=0.4).double()
    source, position, padded, _ = inputs(masked=True)
    place, source = (source + position).requires_grad_(), source.requires_grad_()

    def plain():
        qkv = zip((place, place, source), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
        q, k, v = ((x @ weight.T + bias).view(B, S, HEADS, D // HEADS).transpose(1, 2) for x, weight, bias in qkv)
        similarity = (q @ k.mT / (D // HEADS) ** 0.5).masked_fill(padded[:, None, None], -torch.inf)
        return attention.out_proj((similarity.softmax(-1) * drawn * scale @ v).transpose(1, 2).flatten(2))

    def ours():
        return attention(place, place, source, ~padded[:, None, None])

    def keep(x):
        weights.append(x.shape[-2:] == (S, S) and x.is_floating_point())
        return x

    outputs, gradients, kept = [], [], []
    for compute in (ours, plain):
        weights = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs.append(compute())
        kept.append(any(weights))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [place, source, *attention.parameters()]))
    torch.testing.assert_close(*outputs)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert kept == [False, True]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_layer_without_positions_is_torchs_own(pre_norm):
    ours = EncoderLayer(D, HEADS, FEED_FORWARD, 0.0, pre_norm).double()
    theirs = nn.TransformerEncoderLayer(D, HEADS, FEED_FORWARD, 0.0, batch_first=True, norm_first=pre_norm).double()
    theirs.load_state_dict(ours.state_dict())
    source, _, padded, _ = inputs(masked=True)
    found = ours(source, torch.zeros(1, S, D, dtype=torch.float64), ~padded[:, None, None])
    torch.testing.assert_close(found[~padded], theirs(source, src_key_padding_mask=padded)[~padded])


def test_what_is_padded_does_not_count():
    transformer = build(pre_norm=False)
    source, position, padded, queries = inputs(masked=True)
    states = transformer(source, position, padded, queries, every_layer=True)[0]
    source[padded] = 100.0
    torch.testing.assert_close(transformer(source, position, padded, queries, every_layer=True)[0], states)
    alone = transformer(source[1:, :4], position[1:, :4], None, queries, every_layer=True)[0]
    torch.testing.assert_close(alone, states[:, 1:])


def test_nothing_drops_out_in_evaluation():
    transformer = build(pre_norm=False, dropout=0.5)
    source, position, padded, queries = inputs(masked=True)
    still = [transformer.eval()(source, position, padded, queries, every_layer=True)[0] for _ in range(2)]
    assert torch.equal(*still)
    moving = [transformer.train()(source, position, padded, queries, every_layer=True)[0] for _ in range(2)]
    assert not torch.allclose(*moving)
    assert not torch.allclose(moving[0], still[0])


def test_matrices_start_from_xaviers_uniform_distribution():
    transformer = Transformer(64, 4, 1, 1, 128, 0.1, False)
    for name, parameter in transformer.named_parameters():
        if parameter.dim() > 1:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        elif "norm" in name and name.endswith("weight"):
            assert parameter.eq(1).all(), name
        elif "linear" not in name:  # the feed-forward's biases keep nn.Linear's start
            assert parameter.eq(0).all(), name
