import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from raydetr.loss.boxes import generalized_iou


def boxes(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return box_convert(torch.rand(n, 4, generator=generator) + 0.05, "cxcywh", "xyxy")


def test_each_with_each_is_torchvisions():
    a, b = boxes(30, 0), boxes(20, 1)
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b))


def test_pairs_are_the_diagonal():
    a, b = boxes(30, 0), boxes(30, 1)
    torch.testing.assert_close(generalized_iou(a, b), generalized_box_iou(a, b).diagonal())


def test_the_bounds():
    box, far, touching = torch.tensor([[0.0, 0, 1, 1], [99.0, 99, 100, 100], [1.0, 0, 2, 1]])
    assert generalized_iou(box, box).item() == 1
    assert generalized_iou(box, far).item() == pytest.approx(-0.9998)
    assert generalized_iou(box, touching).item() == 0


def test_a_box_without_area_is_fine_beside_one_with():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    value = generalized_iou(point, torch.tensor([0.0, 0, 1, 1]))
    value.backward()
    assert value.item() == 0
    assert point.grad.isfinite().all()
