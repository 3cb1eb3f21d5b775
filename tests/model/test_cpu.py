"""Operations that only CPUs need."""

import pytest
import torch

from raydetr.model.cpu import Dropout, weight_gradient


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_drop_out_zeroes_its_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    dropout = Dropout(rate)
    x = torch.ones(301, 1001, requires_grad=True)
    y = dropout(x)
    assert sorted(set(y.unique().tolist())) == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=5 * deviation)
    # Neighbours share one draw: they must be independent all the same.
    dropped = (y == 0).float()
    for distance in (1, 2, 3, 4):
        assert (dropped[:, distance:] * dropped[:, :-distance]).mean().item() == pytest.approx(rate**2, abs=0.004)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y), "the same seed drops the same"
    assert not torch.equal(dropout(x), y)


def test_drop_out_of_zero_elements_and_of_halves():
    dropout = Dropout(0.1)
    assert dropout(torch.ones(0, 3)).shape == (0, 3)
    assert dropout(torch.ones(8, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (1, 2, 0, 1), (1, 1, 0, 1)])
def test_the_weights_gradient_by_products_is_autograds(size, stride, padding, dilation):
    x = torch.randn(2, 5, 9, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(7, 5, size, size, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation)
    slope = torch.randn_like(y)
    (expected,) = torch.autograd.grad((y * slope).sum(), weight)
    torch.testing.assert_close(weight_gradient(slope, x, size, *((each, each) for each in (stride, padding, dilation))), expected)
