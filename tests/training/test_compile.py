"""``speed.compile``: blocks are compiled in place and one by one; equal ones, and shapes that came before, are not compiled again."""

import functools
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from raydetr.model.backbone import Bottleneck
from raydetr.model.transformer import DecoderLayer, EncoderLayer
from raydetr.training.run import compile_blocks

WIDTH = 16


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter(monkeypatch):
    """Counts what is compiled, and runs it as it is."""
    counter = CompileCounter()
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    return counter


def encoder_layers(number=2, dropout=0.1):
    torch.manual_seed(0)
    return nn.ModuleList(EncoderLayer(WIDTH, 2, 32, dropout, pre_norm=False) for _ in range(number))


def call(layers, cells, padded=True):
    x = torch.randn(2, cells, WIDTH, generator=torch.Generator().manual_seed(cells), requires_grad=True)
    attend = torch.arange(cells)[None, None, None, :].expand(2, 1, 1, -1) < cells - 3 if padded else None
    y = x
    for layer in layers:
        y = layer(y, torch.ones(1, cells, WIDTH), attend)
    y.square().sum().backward()
    return y, x.grad


@pytest.mark.parametrize(("dynamic", "compiled"), [(False, [1, 1, 2, 2]), (True, [1, 1, 1, 1])])
def test_equal_blocks_are_compiled_once_for_each_shape(counter, dynamic, compiled):
    layers = encoder_layers()
    names = list(layers.state_dict())
    compile_blocks(layers, dynamic=dynamic)
    seen = []
    for cells in (12, 12, 20, 12):
        call(layers, cells)
        seen.append(counter.frame_count)
    assert seen == compiled
    assert list(layers.state_dict()) == names


def test_more_shapes_are_compiled_than_pytorch_would(counter):
    layers = encoder_layers(1)
    compile_blocks(layers, dynamic=False)
    for cells in range(8, 18):
        call(layers, cells)
    assert counter.frame_count == 10


def test_blocks_of_a_resnet_are_compiled_whole_in_half_precision_as_well(counter):
    block = Bottleneck(16, 4, 1, 1)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x)
        compile_blocks(nn.Sequential(block), dynamic=False)
        found = block(x)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected)
    found.float().sum().backward()
    assert block.conv2.weight.grad.isfinite().all()


def test_the_decoder_is_compiled_whole(counter):
    layer = DecoderLayer(WIDTH, 2, 32, 0.0, False)
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 12, WIDTH)
    expected = layer(x, torch.ones(1, 5, WIDTH), memory, memory, None)
    compile_blocks(nn.Sequential(layer), dynamic=False)
    torch.testing.assert_close(layer(x, torch.ones(1, 5, WIDTH), memory, memory, None), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++), which PyTorch compiles for a CPU with")
def test_what_the_compiler_makes_computes_the_same():
    """The real compiler, forward and backward, on a block of each kind of operation."""
    layers = encoder_layers(1, dropout=0.0)
    expected = call(layers, 12)
    gradients = [each.grad.clone() for each in layers.parameters()]
    layers.zero_grad()
    compile_blocks(layers, dynamic=False)
    for found, right in zip(call(layers, 12), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    for parameter, right in zip(layers.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-5)
