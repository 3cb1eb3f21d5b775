"""The segmentation head and the losses of masks against numbers of the official model."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from raydetr.loss.criterion import build_criterion
from raydetr.loss.masks import mask_numerators
from raydetr.model.detr import MASK_PARTS, build_model, postprocess
from raydetr.model.masks import postprocess_masks
from raydetr.training.engine import MatchedQueries
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
    model = filled(build_model("detr_resnet50", 91, masks=True, num_queries=20, dropout=0.0))
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


def losses_of(model, criterion, images, mask, targets, lean):
    """The losses, from the masks of the matched queries alone or from those of all queries, the official way."""
    if not lean:
        return criterion(model(images, mask), targets)
    matched = MatchedQueries(criterion, targets)
    outputs = model(images, mask, matched)
    assert outputs["pred_masks"].shape[0] == sum(len(target["labels"]) for target in targets)
    return criterion(outputs, targets, pairs=matched.pairs)


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
    criterion = build_criterion(91, masks=True)
    model.train().zero_grad()
    losses = losses_of(model, criterion, *padded(SIZES), targets, lean)
    total = criterion.weighted_sum(losses)
    expected = {name.removeprefix("loss/"): float(value) for name, value in numbers.items() if name.startswith("loss/")}
    assert {name: loss.item() for name, loss in (losses | {"total": total}).items()} == pytest.approx(expected, rel=1e-5)
    total.backward()
    norms = {
        f"grad_norm/{official_name(name)}": each.grad.norm().item() for name, each in model.named_parameters() if each.grad is not None
    }
    assert norms == {name: pytest.approx(float(numbers[name]), rel=1e-3, abs=1e-5) for name in numbers if name.startswith("grad_norm/")}


def official_name(name):
    return name if name.startswith(MASK_PARTS) else f"detr.{name}"


def test_masks_of_chosen_queries_are_those_of_all(official):
    _, targets, model = official
    matched = MatchedQueries(build_criterion(91, masks=True), targets)
    images, mask = padded(SIZES)
    with torch.no_grad():
        every = model.eval()(images, mask)["pred_masks"]
        some = model(images, mask, matched)["pred_masks"]
    torch.testing.assert_close(some, every[matched.pairs.image, matched.pairs.query[-1]], atol=1e-4, rtol=1e-4)


def tiny_batch(*boxes):
    """Images of 64 x 96 pixels with so many boxes each, whose masks are their upper halves."""
    generator = torch.Generator().manual_seed(3)
    targets = []
    for n in boxes:
        masks = torch.zeros(n, 64, 96, dtype=torch.bool)
        masks[:, 16:32, 24:72] = True
        boxes_cxcywh = 0.5 + 0.1 * torch.rand(n, 4, generator=generator)
        targets.append({"labels": torch.zeros(n, dtype=torch.long), "boxes": boxes_cxcywh, "masks": masks})
    return torch.randn(len(boxes), 3, 64, 96, generator=generator), targets


@pytest.mark.parametrize("settings", [{}, {"aux_loss": False}, {"pre_norm": True, "position_embedding": "learned", "enc_layers": 0}])
def test_lean_losses_and_gradients_are_those_of_all_queries(settings):
    model = build_model("detr_tiny", 3, masks=True, **settings)
    criterion = build_criterion(3, dec_layers=3, masks=True, mask_loss_coef=2, dice_loss_coef=3, aux_loss=model.aux_loss)
    images, targets = tiny_batch(3, 0, 2)
    results = []
    for lean in (True, False):
        model.zero_grad()
        losses = losses_of(model, criterion, images, None, targets, lean)
        criterion.weighted_sum(losses).backward()
        results.append((losses, {name: each.grad for name, each in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-3)
    assert not [name for name, grad in results[0][1].items() if grad is None or not grad.isfinite().all()]


def test_weights_of_mask_losses_are_the_settings():
    criterion = build_criterion(3, dec_layers=3, masks=True, mask_loss_coef=2, dice_loss_coef=3)
    assert {name: criterion.weight_dict[name] for name in ("loss_mask", "loss_dice")} == {"loss_mask": 2, "loss_dice": 3}
    assert "loss_mask" not in build_criterion(3).weight_dict
    assert "loss_mask_0" not in criterion.weight_dict  # masks are of the last decoder layer only


def test_a_box_without_a_mask_does_not_count_in_the_mask_losses():
    model, criterion = build_model("detr_tiny", 3, masks=True).eval(), build_criterion(3, dec_layers=3, masks=True)
    images, targets = tiny_batch(3)
    outputs = model(images)
    whole = criterion(outputs, targets)
    targets[0]["has_mask"] = torch.zeros(3, dtype=torch.bool)
    none = criterion(outputs, targets)
    assert none["loss_mask"] == none["loss_dice"] == 0
    assert none["loss_giou"] == whole["loss_giou"]
    targets[0]["has_mask"][1] = True
    assert 0 < criterion(outputs, targets)["loss_dice"] < whole["loss_dice"]


def test_without_a_true_box_the_mask_losses_are_zero_and_their_gradients_defined():
    model, criterion = build_model("detr_tiny", 3, masks=True), build_criterion(3, dec_layers=3, masks=True)
    images, targets = tiny_batch(0)
    losses = losses_of(model, criterion, images, None, targets, lean=True)
    assert losses["loss_mask"].item() == losses["loss_dice"].item() == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert model.mask_head.lay1.weight.grad.isfinite().all()


def test_long_lists_of_masks_are_worked_on_in_parts(monkeypatch):
    logits, true = torch.randn(7, 8, 8), torch.rand(7, 32, 32) > 0.5
    whole = mask_numerators(logits, true)
    monkeypatch.setattr("raydetr.loss.masks.CHUNK", 2 * 32 * 32)
    torch.testing.assert_close(mask_numerators(logits, true), whole)


def test_weights_load_with_and_without_the_official_prefix():
    model = build_model("detr_tiny", 3, masks=True)
    state = model.state_dict()
    assert {name.split(".")[0] for name in state} == {"detr", "bbox_attention", "mask_head"}
    other = copy.deepcopy(build_model("detr_tiny", 3, masks=True))
    for given in (state, {name.removeprefix("detr."): value for name, value in state.items()}):
        other.load_state_dict(torch.nn.Module.state_dict(build_model("detr_tiny", 3, masks=True)))
        other.load_state_dict(given)
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_network_without_masks_is_what_it_was():
    model = build_model("detr_tiny", 3)
    assert not [name for name in model.state_dict() if name.startswith(("detr.", *MASK_PARTS))]
    assert "pred_masks" not in model(torch.randn(1, 3, 32, 32))
