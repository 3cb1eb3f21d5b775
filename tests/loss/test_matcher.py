import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from raydetr.loss.matcher import NonFiniteCost, match

WEIGHTS = (1.0, 5.0, 2.0)


def predictions(layers: int, images: int, queries: int, classes: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(layers, images, queries, classes + 1, generator=generator)
    return logits, 0.1 + 0.4 * torch.rand(layers, images, queries, 4, generator=generator)


def some_targets(counts: list[int], classes: int, seed: int = 1) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"labels": torch.randint(0, classes, (n,), generator=generator), "boxes": 0.1 + 0.4 * torch.rand(n, 4, generator=generator)}
        for n in counts
    ]


def cost_of_one_image(logits, boxes_cxcywh, target, weights) -> torch.Tensor:
    """The paper's cost of one image in one layer, [Q, n]."""
    class_weight, l1_weight, giou_weight = weights
    probability = logits.softmax(-1)[:, target["labels"]]
    distance = (boxes_cxcywh[:, None] - target["boxes"][None]).abs().sum(-1)
    giou = generalized_box_iou(box_convert(boxes_cxcywh, "cxcywh", "xyxy"), box_convert(target["boxes"], "cxcywh", "xyxy"))
    return l1_weight * distance - class_weight * probability - giou_weight * giou


def by_image(matching, layer: int, counts: list[int]) -> list[list[tuple[int, int]]]:
    """(query, true box of that image) of every image."""
    first = [0, *itertools.accumulate(counts)]
    pairs = [[] for _ in counts]
    for image, query, target in zip(matching.image, matching.query[layer], matching.target[layer], strict=True):
        pairs[image].append((query.item(), target.item() - first[image]))
    return pairs


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_coefs"])
def test_the_official_matching(oracle, name):
    numbers, targets = oracle(name)
    logits, boxes_cxcywh = torch.from_numpy(numbers["pred_logits"])[None], torch.from_numpy(numbers["pred_boxes"])[None]
    weights = (2.0, 5.0, 2.0) if name.endswith("coefs") else WEIGHTS
    pairs = by_image(match(logits, boxes_cxcywh, targets, weights), 0, [4, 7])
    for image, found in enumerate(pairs):
        assert [query for query, _ in found] == numbers[f"match{image}_query"].tolist()
        assert [target for _, target in found] == numbers[f"match{image}_target"].tolist()


@pytest.mark.parametrize("weights", [WEIGHTS, (0.0, 1.0, 0.0), (3.0, 0.0, 0.5)])
def test_all_layers_and_images_at_once_are_each_alone(weights):
    """Images with few boxes, none, and more than there are queries."""
    counts = [3, 0, 11, 1]
    logits, boxes_cxcywh = predictions(layers=3, images=4, queries=8, classes=5)
    targets = some_targets(counts, 5)
    matching = match(logits, boxes_cxcywh, targets, weights)
    assert matching.query.shape == matching.target.shape == (3, 3 + 0 + 8 + 1)
    for layer in range(3):
        pairs = by_image(matching, layer, counts)
        for image, target in enumerate(targets):
            cost = cost_of_one_image(logits[layer, image], boxes_cxcywh[layer, image], target, weights)
            rows, columns = linear_sum_assignment(cost)
            assert pairs[image] == list(zip(rows.tolist(), columns.tolist(), strict=True))


def test_no_boxes_at_all():
    matching = match(*predictions(2, 2, 4, 3), some_targets([0, 0], 3), WEIGHTS)
    assert matching.image.shape == (0,)
    assert matching.query.shape == matching.target.shape == (2, 0)


def test_equal_queries_are_all_used_once():
    logits, boxes_cxcywh = torch.zeros(1, 1, 6, 4), torch.full((1, 1, 6, 4), 0.5)
    matching = match(logits, boxes_cxcywh, some_targets([6], 3), WEIGHTS)
    assert matching.query[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert sorted(matching.target[0].tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_numbers_that_are_not_finite_name_the_images(value, where):
    logits, boxes_cxcywh = predictions(2, 3, 4, 3)
    (logits if where == "logits" else boxes_cxcywh)[1, 2, 0] = value
    with pytest.raises(NonFiniteCost, match=r"images at \[2\] of the batch") as caught:
        match(logits, boxes_cxcywh, some_targets([1, 2, 3], 3), WEIGHTS)
    assert caught.value.images == [2]
    assert isinstance(caught.value, FloatingPointError)


def test_matching_leaves_no_trace_in_the_gradient():
    logits, boxes_cxcywh = (each.requires_grad_() for each in predictions(2, 2, 4, 3))
    matching = match(logits, boxes_cxcywh, some_targets([1, 2], 3), WEIGHTS)
    assert not any(each.requires_grad for each in (matching.image, matching.query, matching.target))
