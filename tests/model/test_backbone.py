import copy
import itertools
import pickle
from collections import Counter

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from raydetr.model.backbone import Backbone, Convolution, FrozenBatchNorm, ResNet, folded_conv
from raydetr.model.detr import build_model


def randomize(state: dict) -> dict:
    """Weights of all kinds with statistics far from the identity, so that a mistake in the fold shows."""
    generator = torch.Generator().manual_seed(3)
    filled = {}
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            filled[name] = 0.5 + noise.abs()
        elif tensor.dim() > 1:
            filled[name] = noise / tensor[0].numel() ** 0.5
        else:
            filled[name] = (1 if name.endswith("weight") else 0) + 0.2 * noise
    return filled


@pytest.mark.parametrize(("name", "dilation", "stride"), [("resnet50", False, 32), ("resnet50", True, 16), ("resnet101", True, 16)])
def test_the_folded_resnet_is_torchvisions_with_frozen_normalization(name, dilation, stride):
    """Features and gradients; DC5 is torchvision's ``replace_stride_with_dilation`` of the last stage.

    In float64, where rounding cannot push an element over ReLU's edge.
    """
    build = getattr(torchvision.models, name)
    theirs = build(norm_layer=FrozenBatchNorm2d, replace_stride_with_dilation=[False, False, dilation])
    ours = ResNet(name, dilation)
    state = randomize({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state)
    theirs.load_state_dict(state, strict=False)
    theirs.avgpool = theirs.fc = torch.nn.Identity()
    ours, theirs, images = ours.double(), theirs.double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)

    features = ours(images)
    expected = theirs(images).unflatten(1, (2048, 64 // stride, 96 // stride))
    assert (features - expected).abs().max() < 1e-9 * expected.abs().max()

    slope = torch.randn_like(features)
    (features * slope).sum().backward()
    (expected * slope).sum().backward()
    reference = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if key.startswith(("conv1.", "layer1.")):
            assert parameter.grad is None, key
        else:
            assert (parameter.grad - reference[key].grad).norm() < 1e-9 * reference[key].grad.norm(), key


def test_a_checkpoint_with_batch_counts_loads():
    state = torchvision.models.resnet50().state_dict()
    assert any(key.endswith("num_batches_tracked") for key in state)
    before = set(state)
    missing, unexpected = ResNet("resnet50", dilation=False).load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([], ["fc.weight", "fc.bias"])
    assert set(state) == before, "the caller's dict is not ours to change"


def test_gradients_lie_in_memory_as_their_weights_do():
    """Else the optimizer and DDP would copy every one of them at every step."""
    network = ResNet("resnet50", dilation=False)
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride(), name


def test_gradients_under_autocast_are_those_of_separate_layers():
    """The fold's own backward pass, in half precision and with weights and image in float32."""
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    conv, norm = Convolution(8, 8, 3), FrozenBatchNorm(8)
    norm.load_state_dict(randomize(norm.state_dict()))
    reference = FrozenBatchNorm2d(8)
    reference.load_state_dict(norm.state_dict())
    slope = torch.randn(2, 8, 6, 6)
    gradients = []
    for layers in (lambda: folded_conv(x, conv, norm), lambda: reference(conv(x))):
        with torch.autocast("cpu", torch.bfloat16):
            y = layers()
        gradients.append(torch.autograd.grad((y * slope).sum(), (x, conv.weight)))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_a_frozen_backbone_records_nothing():
    backbone = Backbone("resnet50", dilation=False)
    images = torch.randn(1, 3, 32, 32)
    assert backbone(images, None)[0].requires_grad
    backbone.requires_grad_(False)
    assert not backbone(images, None)[0].requires_grad


def test_changed_weights_count_at_once():
    """Whatever is folded is folded anew: by load_state_dict, in place, and through ``.data``."""
    network = ResNet("resnet50", dilation=False).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        seen = [network(images)]
        network.bn1.weight.mul_(2)
        seen.append(network(images))
        network.layer1[0].conv1.weight.data.mul_(0.5)
        seen.append(network(images))
        network.load_state_dict(randomize(network.state_dict()))
        seen.append(network(images))
    for before, after in itertools.pairwise(seen):
        assert not torch.allclose(before, after)


class Calls(TorchDispatchMode):
    """Counts the kernels of a pass (views have none) by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name != "aten::_unsafe_view":
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_constants_are_computed_once_and_frozen_layers_are_folded_once():
    """On any device but a CPU, where a kernel costs its launch; the meta device stands for one."""
    with torch.device("meta"):
        network, images = ResNet("resnet50", dilation=False), torch.empty(2, 3, 64, 96)
        with Calls() as first:
            network(images)
        with Calls() as second:
            network(images)
    norms, frozen = 53, 11
    assert first.counts["aten::rsqrt"] == norms
    assert second.counts["aten::rsqrt"] == 0
    assert second.counts["aten::mul"] == norms - frozen, "the weights that train are scaled at every step"
    assert second.counts.total() < first.counts.total() - 5 * norms


def test_the_forward_pass_of_detr_has_few_kernels(monkeypatch):
    # The meta device has no fused attention; on a GPU it is one kernel.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with torch.device("meta"):
        model = build_model("detr_resnet50").train()
        images, mask = torch.empty(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
        model(images, mask)
        with Calls() as calls:
            model(images, mask)
    assert calls.counts.total() < 600, "it is 566, and was 861 with constants computed at every step"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_constants_made_in_inference_serve_training(device):
    with torch.device(device):
        network, images = ResNet("resnet50", dilation=False), torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        network(images)
    network(images).sum().backward()
    assert all(each.grad is not None for each in network.layer4.parameters())


def test_a_copy_and_another_device_or_type_have_constants_of_their_own():
    norm = FrozenBatchNorm(4)
    scale, _ = norm.scale_and_shift()
    assert norm.scale_and_shift()[0] is scale, "computed once"
    copied = copy.deepcopy(norm)
    copied.weight.mul_(3)
    torch.testing.assert_close(copied.scale_and_shift()[0], 3 * scale)
    torch.testing.assert_close(norm.scale_and_shift()[0], scale)
    assert norm.to("meta").scale_and_shift()[0].device.type == "meta"
    assert copied.double().scale_and_shift()[0].dtype == torch.float64
    assert pickle.loads(pickle.dumps(copied)).scale_and_shift()[0].dtype == torch.float64


def test_the_mask_shrinks_with_the_map():
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    mask[1, 32:] = True
    features, small = Backbone("resnet50", dilation=False)(torch.zeros(2, 3, 64, 96), mask)
    assert features.shape[-2:] == small.shape[-2:] == (2, 3)
    assert small.tolist() == [[[False] * 3] * 2, [[False, False, True], [True] * 3]]


def test_the_tiny_network_sees_each_image_alone_and_all_of_it_trains():
    backbone = Backbone("tiny", dilation=False)
    images = torch.randn(3, 3, 64, 96)
    features, _ = backbone(images, None)
    assert features.shape == (3, backbone.num_channels, 4, 6)
    torch.testing.assert_close(backbone(images[1:2], None)[0], features[1:2])
    features.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


def test_the_tiny_network_counts_places_in_what_is_not_padded():
    backbone = Backbone("tiny", dilation=False).eval()
    small = torch.randn(1, 3, 64, 64)
    padded, mask = torch.zeros(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool)
    padded[..., :64], mask[..., :64] = small, False
    place = lambda features: features - backbone.body.layers(torch.zeros(1, 3, *[16 * n for n in features.shape[-2:]]))  # noqa: E731
    with torch.no_grad():
        alone, _ = backbone(torch.zeros_like(small), None)
        inside, _ = backbone(torch.zeros_like(padded), mask)
    torch.testing.assert_close(place(inside)[..., :4], place(alone))


@pytest.mark.parametrize("name", ["tiny", "resnet50"])
@pytest.mark.parametrize("size", [(2, 300), (300, 1), (1, 1), (3, 5)])
def test_an_image_may_be_a_line_or_a_pixel(name, size):
    """Very narrow images are that small once their long side has its length."""
    backbone = Backbone(name, dilation=False).eval()
    stride = {"tiny": 16, "resnet50": 32}[name]
    with torch.no_grad():
        features, mask = backbone(torch.randn(1, 3, *size), torch.zeros(1, *size, dtype=torch.bool))
    assert features.isfinite().all()
    assert mask.shape[-2:] == features.shape[-2:]
    assert all(abs(cells - side / stride) <= 1 for cells, side in zip(features.shape[-2:], size, strict=True))
