"""The segmentation head and the losses of masks against numbers of the official model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raydetr.config import load_config
from raydetr.loss.criterion import build_criterion
from raydetr.loss.masks import mask_numerators, matched_masks
from raydetr.loss.matcher import match
from raydetr.model.detr import postprocess
from raydetr.model.masks import MaskDETR, postprocess_masks
from tests.networks import filled, padded

SIZES, ORIGINAL = [(192, 256), (224, 160)], [(384, 512), (448, 320)]


def ellipses(boxes, height, width):
    """Bool [n, height, width]: the ellipses inside of boxes (cxcywh, relative)."""
    x = ((torch.arange(width) + 0.5) / width)[None, None]
    y = ((torch.arange(height) + 0.5) / height)[None, :, None]
    cx, cy, w, h = (each[:, None, None] for each in boxes.unbind(1))
    return ((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2 <= 1


@pytest.fixture(scope="module")
def official(oracle_masks):
    numbers, targets = oracle_masks
    model = filled(MaskDETR(load_config({"model.num_queries": 20, "model.dropout": 0.0}).model, 91))
    return numbers, targets, model


@pytest.fixture(scope="module")
def oracle_masks():
    numbers = dict(np.load(Path(__file__).parents[1] / "fixtures" / "detr_resnet50_masks.npz"))
    generator, targets = torch.Generator().manual_seed(11), []
    for n, (height, width) in zip((4, 7), SIZES, strict=True):
        size = torch.rand(n, 2, generator=generator) * 0.3 + 0.05
        center = torch.rand(n, 2, generator=generator) * 0.5 + 0.25
        labels, boxes = torch.randint(0, 91, (n,), generator=generator), torch.cat((center, size), 1)
        targets.append({"labels": labels, "boxes": boxes, "masks": ellipses(boxes, height, width)})
    return numbers, targets


def matched_queries(criterion, targets, found):
    """What chooses the matched queries of the last decoder layer, and keeps the matching in ``found``."""

    def choose(outputs):
        layers = [*outputs.get("aux_outputs", []), outputs]
        logits, boxes = (torch.stack([layer[name].detach() for layer in layers]) for name in ("pred_logits", "pred_boxes"))
        found.append(match(logits, boxes, targets, criterion.costs))
        return found[-1].image, found[-1].query[-1]

    return choose


def losses_of(model, criterion, images, mask, targets, lean):
    """The losses, from the masks of the matched queries alone or from those of all queries, and the outputs."""
    found = []
    choose = matched_queries(criterion, targets, found)
    outputs = model(images, mask, choose if lean else None)
    if not lean:
        image, query = choose(outputs)
        logits = outputs["pred_masks"][image, query]
    else:
        logits = outputs["pred_masks"]
    true = matched_masks([target["masks"] for target in targets], found[-1].target[-1], tuple(images.shape[-2:]))
    num_boxes = sum(len(target["labels"]) for target in targets)
    masks = {name: value / num_boxes for name, value in mask_numerators(logits, true).items()}
    return criterion(outputs, targets) | masks, outputs


def test_names_outputs_and_masks_are_the_official_ones(official):
    numbers, _, model = official
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert names == json.loads(str(numbers["state_keys"]))
    with torch.no_grad():
        outputs = model.eval()(*padded(SIZES))
        for name in ("pred_logits", "pred_boxes", "pred_masks"):
            assert (outputs[name] - torch.from_numpy(numbers[name])).abs().max() < 1e-4
        results = postprocess_masks(outputs["pred_masks"], (224, 256), torch.tensor(SIZES), torch.tensor(ORIGINAL))
    boxes = postprocess(outputs, torch.tensor(ORIGINAL))
    for i, (masks, (height, width)) in enumerate(zip(results, ORIGINAL, strict=True)):
        assert (boxes[i]["scores"] - torch.from_numpy(numbers[f"post{i}_scores"])).abs().max() < 1e-4
        assert masks.shape == (20, height, width)
        # Logits near zero may fall on either side.
        pixels = torch.from_numpy(numbers[f"post{i}_mask_pixels"])
        assert (masks.flatten(1).sum(1) - pixels).abs().max() <= 1e-4 * height * width
        expected = np.unpackbits(numbers[f"post{i}_masks_packed_first5"])[: 5 * height * width].reshape(5, height, width)
        assert (masks[:5].numpy() != expected).mean() < 1e-4


@pytest.mark.parametrize("lean", [True, False])
def test_losses_and_gradients_are_the_official_ones(official, lean):
    """By the masks of the matched queries alone, as in training, and by those of all queries, the official way."""
    numbers, targets, model = official
    criterion = build_criterion(91)
    model.train().zero_grad()
    losses, _ = losses_of(model, criterion, *padded(SIZES), targets, lean)
    total = criterion.weighted_sum(losses) + losses["loss_mask"] + losses["loss_dice"]
    expected = {name.removeprefix("loss/"): float(value) for name, value in numbers.items() if name.startswith("loss/")}
    assert {name: loss.item() for name, loss in (losses | {"total": total}).items()} == pytest.approx(expected, rel=1e-5)
    total.backward()
    norms = {f"grad_norm/{name}": each.grad.norm().item() for name, each in model.named_parameters() if each.grad is not None}
    assert norms == {name: pytest.approx(float(numbers[name]), rel=1e-3, abs=1e-5) for name in numbers if name.startswith("grad_norm/")}


def test_masks_of_chosen_queries_are_those_of_all(official):
    _, targets, model = official
    criterion, found = build_criterion(91), []
    images, mask = padded(SIZES)
    with torch.no_grad():
        every = model.eval()(images, mask)["pred_masks"]
        some = model(images, mask, matched_queries(criterion, targets, found))["pred_masks"]
    torch.testing.assert_close(some, every[found[0].image, found[0].query[-1]], atol=1e-4, rtol=1e-4)


def test_the_tiny_network_has_masks_too():
    model = MaskDETR(load_config({"model.preset": "detr_tiny"}).model, 3)
    images = torch.randn(2, 3, 64, 96)
    outputs = model(images)
    assert outputs["pred_masks"].shape == (2, 25, 16, 24)
    targets = [
        {"labels": torch.zeros(n, dtype=torch.long), "boxes": torch.full((n, 4), 0.5), "masks": torch.ones(n, 64, 96) > 0} for n in (2, 0)
    ]
    criterion = build_criterion(3, dec_layers=3)
    losses, _ = losses_of(model, criterion, images, torch.zeros(2, 64, 96, dtype=torch.bool), targets, lean=True)
    (criterion.weighted_sum(losses) + losses["loss_mask"] + losses["loss_dice"]).backward()
    assert not [name for name, each in model.named_parameters() if each.grad is None or not each.grad.isfinite().all()]


def test_without_a_true_box_the_mask_losses_are_zero_and_their_gradients_defined():
    model = MaskDETR(load_config({"model.preset": "detr_tiny"}).model, 3)
    nothing = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 32, 32) > 0}
    criterion, found = build_criterion(3, dec_layers=3), []
    outputs = model(torch.randn(1, 3, 32, 32), None, matched_queries(criterion, [nothing], found))
    losses = mask_numerators(outputs["pred_masks"], matched_masks([nothing["masks"]], found[-1].target[-1], (32, 32)))
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert model.mask_head.lay1.weight.grad.isfinite().all()
