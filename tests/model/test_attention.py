"""Attention weights against numbers of the official model, and what recording them leaves alone."""

import math

import pytest
import torch
from torch import nn

import raydetr
from raydetr.errors import UserError
from raydetr.model.attention import recorded_attention
from raydetr.model.detr import build_model
from raydetr.model.transformer import Attention
from tests.helpers import official_numbers
from tests.networks import official_values, padded


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = build_model("detr_tiny", num_classes=3).eval()
    model.query_embed.weight.data *= 20  # else the queries of random weights all look at the same
    return model


def test_the_decoder_s_attention_is_the_official_one():
    numbers, _ = official_numbers("detr_resnet50_masks")
    model = build_model(num_classes=91, num_queries=20, dropout=0.0).eval()
    shapes = {f"detr.{name}": tensor.shape for name, tensor in model.state_dict().items()}  # as a model with masks names them
    model.load_state_dict({name.removeprefix("detr."): tensor for name, tensor in official_values(shapes).items()})
    images, mask = padded([(192, 256), (224, 160)])
    result = raydetr.attention(model, images, mask)
    assert result["decoder_attention"].shape == (2, 20, 8, 7, 8)
    averaged = result["decoder_attention"].mean(2).flatten(2)
    assert (averaged - torch.from_numpy(numbers["decoder_attention"])).abs().max() < 1e-5
    with torch.no_grad():
        outputs = model(images, mask)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(result[name], outputs[name]), "asking changes no output"
    with recorded_attention(model) as record, torch.no_grad():
        model(images, mask)
    torch.testing.assert_close(record.decoder(), result["decoder_attention"])


@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_pytorch_for_each_head(masked):
    torch.manual_seed(0)
    ours, theirs = Attention(32, 4, 0.0), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    padding = torch.arange(7) >= torch.tensor([[7], [4]]) if masked else None
    _, expected = theirs(query, key, key, key_padding_mask=padding, average_attn_weights=False)
    got = ours.weights(query, key, None if padding is None else ~padding[:, None, None])
    torch.testing.assert_close(got, expected)


def test_the_encoder_s_attention_of_a_point_is_that_of_its_cell(tiny):
    """Against weights that PyTorch's own layer computes for every cell, from the layer's inputs."""
    images, seen = torch.randn(2, 3, 64, 96), []
    layer = tiny.transformer.encoder.layers[-1].self_attn
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs))
    points = [(0, 0), (95.9, 63.9), (40, 17)]  # a cell is 16 x 16 pixels
    result = raydetr.attention(tiny, images, points=points)["encoder_attention"]
    handle.remove()
    theirs = nn.MultiheadAttention(layer.out_proj.weight.shape[0], layer.nheads, batch_first=True)
    theirs.load_state_dict(layer.state_dict())
    query, key, value, _ = seen[0]
    _, every = theirs.eval()(query, key, value, average_attn_weights=False)
    assert result.shape == (2, 3, layer.nheads, 4, 6)
    torch.testing.assert_close(result, every[:, :, [0, 23, 8]].transpose(1, 2).unflatten(-1, (4, 6)))


def test_padding_gets_no_attention_and_the_rest_sums_to_one(tiny):
    images, mask = padded([(64, 96), (48, 64)])
    result = raydetr.attention(tiny, images, mask, points=[(10, 10)])
    for name in ("decoder_attention", "encoder_attention"):
        weights = result[name]
        torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(weights.shape[:3]))
        assert not weights[1, :, :, 3:].any()
        assert not weights[1, :, :, :, 4:].any()
        assert weights[1, :, :, :3, :4].all()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_model_in_training_is_left_as_it_was(pre_norm):
    model = build_model("detr_tiny", num_classes=3, pre_norm=pre_norm)
    result = raydetr.attention(model, torch.randn(1, 3, 64, 64), points=[(1, 1)])
    assert model.training
    assert not any(value.requires_grad for value in result.values() if isinstance(value, torch.Tensor))
    hooks = [hook for each in model.modules() for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values())]
    assert not hooks, "a training afterwards pays nothing"


@pytest.mark.parametrize("point", [(96, 0), (0, 64), (-1, 5), (math.nan, 5)])
def test_a_point_outside_the_images_is_an_error(tiny, point):
    with pytest.raises(UserError, match="is outside the images, which are 96 x 64 pixels"):
        raydetr.attention(tiny, torch.randn(1, 3, 64, 96), points=[(3, 3), point])


def test_without_an_encoder_only_points_are_an_error():
    model = build_model("detr_tiny", num_classes=3, enc_layers=0).eval()
    images = torch.randn(1, 3, 64, 64)
    assert raydetr.attention(model, images)["decoder_attention"].shape[-2:] == (4, 4)
    with pytest.raises(UserError, match=r"model\.enc_layers is 0"):
        raydetr.attention(model, images, points=[(1, 1)])
