"""A training step waits for the device once, for the matching: counted on the CPU, where every other wait would show as well."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raydetr.loss.criterion import build_criterion
from raydetr.model.detr import build_model

WAITING = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal", "aten::is_nonzero")
MADE_ON_HOST = "aten::lift_fresh"  # a tensor from numbers of Python or NumPy; with a device, torch.tensor waits for that
TO_HOST = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "nonzero")


class Waits(TorchDispatchMode):
    """Lists the operators that make the host wait for the device, and counts the tensors that are made on the host."""

    def __init__(self):
        super().__init__()
        self.seen, self.made_on_host = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in WAITING:
            self.seen.append(func._schema.name)
        self.made_on_host += func._schema.name == MADE_ON_HOST
        return func(*args, **(kwargs or {}))


@pytest.fixture
def to_host(monkeypatch):
    """The methods by which the host asked the device for numbers, in their order."""
    asked = []
    for name in TO_HOST:
        original = getattr(torch.Tensor, name)

        def counting(self, *args, name=name, original=original):
            asked.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, functools.wraps(original)(counting))
    return asked


def batch(counts):
    generator = torch.Generator().manual_seed(0)
    images, mask = torch.randn(len(counts), 3, 64, 96, generator=generator), torch.zeros(len(counts), 64, 96, dtype=torch.bool)
    mask[0, :, 64:] = True
    targets = [
        {"labels": torch.randint(0, 3, (n,), generator=generator), "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator)}
        for n in counts
    ]
    return images, mask, targets


@pytest.mark.parametrize("dec_layers", [1, 3])
@pytest.mark.parametrize(("counts", "asked"), [((2, 0, 3), ["cpu", "numpy"]), ((0, 0), []), ((30, 1), ["cpu", "numpy"])])
def test_a_step_waits_for_the_matching_alone(to_host, dec_layers, counts, asked):
    """Forward pass, losses of all layers, and backward pass; also without boxes, and with more boxes than queries."""
    model, criterion = build_model("detr_tiny", 3, dec_layers=dec_layers), build_criterion(3, dec_layers=dec_layers)
    images, mask, targets = batch(counts)
    normalizers = criterion.normalizers([targets], model.query_embed.num_embeddings)
    to_host.clear()
    with Waits() as waits:
        losses = criterion(model(images, mask), targets, normalizers)
        criterion.weighted_sum(losses).backward()
    assert waits.seen == []
    assert to_host == asked
    assert waits.made_on_host == any(counts), "the pairs and the counts are sent together"


def test_an_evaluated_batch_waits_for_the_matching_alone(to_host):
    """The counts of its sums are made on the host and sent together."""
    model, criterion = build_model("detr_tiny", 3).eval(), build_criterion(3)
    images, mask, targets = batch((2, 0, 3))
    to_host.clear()
    with torch.no_grad(), Waits() as waits:
        sums = criterion.sums(model(images, mask), targets)
    assert waits.seen == []
    assert waits.made_on_host == 2, "the pairs, and the sums' counts"
    assert to_host == ["cpu", "numpy"]
    assert {name: sums[name].item() for name in ("num_boxes", "matched", "images")} == {"num_boxes": 5, "matched": 5, "images": 3}
